"""Part `sanitize` of run_all.py: compute-sanitizer over the kernels' tests, small shapes.

First comes the control, kernels with a planted error of each kind (`planted_errors`), which the tool must find: what a
tool that sees nothing finds nothing in says nothing. Paddle takes every tensor from the system here, so that an access
past its end is one past an allocation. What does not end within its time, or says nothing, has not passed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sanitizer import TOOLS, find_program, read

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 500.0
"""For all runs; a part has 9 minutes."""
_KERNELS = "cache_write or without_a_distribution or against_the_definition or against_float64"
SELECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("test_bfloat16_kernels.py", _KERNELS, TOOLS),
    ("test_shared_prefix.py", "empty_tiles or bits_of_own", TOOLS),
    ("test_general_sampling.py", "equal_logits or without_a_distribution", TOOLS),
    # For the copies of rows, which share no memory between threads.
    ("test_two_layer_model.py", "agrees and llama and bfloat16", ("memcheck",)),
)
"""File of tests/gpu, what of it, and under which tools."""


def sanitize_rows() -> list[Row]:
    """A row for each tool and selection. Raises PartRefusedError where there is no compute-sanitizer."""
    program = find_program()
    deadline = time.monotonic() + BUDGET_S
    rows = []
    for file, chosen, _ in SELECTIONS:
        # Kernels are compiled before, without a tool in the way.
        _run(_pytest(file, chosen), deadline)
    for tool in TOOLS:
        rows.append(_control(program, tool, deadline))
        print(json.dumps(rows[-1]), flush=True)
    for file, chosen, tools in SELECTIONS:
        for tool in tools:
            rows.append(_checked(program, tool, file, chosen, deadline))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _checked(program: str, tool: str, file: str, chosen: str, deadline: float) -> Row:
    begun = time.monotonic()
    output, status = _run([*_under(program, tool), *_pytest(file, chosen)], deadline)
    verdict = read(tool, output)
    passed = verdict.clean and status == 0
    if not passed:
        print(output[-3000:], flush=True)
    return {
        "tool": tool, "tests": f"{file} -k '{chosen}'", "findings": verdict.findings,
        "tests_passed": verdict.tests_passed, "tests_failed": verdict.tests_failed, "status": status,
        "seconds": round(time.monotonic() - begun), "passed": passed,
    }  # fmt: skip


def _control(program: str, tool: str, deadline: float) -> Row:
    begun = time.monotonic()
    planted = [sys.executable, str(Path(__file__).with_name("planted_errors.py")), tool]
    output, status = _run([*_under(program, tool), *planted], deadline)
    findings = read(tool, output).findings
    passed = bool(findings) and "planted error has run" in output
    if not passed:
        print(output[-3000:], flush=True)
    return {
        "tool": tool, "tests": "control: a planted error, must be found", "findings": findings, "status": status,
        "seconds": round(time.monotonic() - begun), "passed": passed,
    }  # fmt: skip


def _under(program: str, tool: str) -> list[str]:
    # Padding: the entry behind a tensor's last is never another tensor's first.
    padding = ["--padding", "1024"] if tool == "memcheck" else []
    return [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20", *padding]


def _pytest(file: str, chosen: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    return [*command, str(ROOT / "tests" / "gpu" / file), "-k", chosen]


def _run(command: Sequence[str], deadline: float) -> tuple[str, int | None]:
    """Output and exit status; None where it was stopped at the deadline."""
    process = subprocess.Popen(
        command, env={"FLAGS_use_system_allocator": "1"} | os.environ, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return output, None
    return output, process.returncode
