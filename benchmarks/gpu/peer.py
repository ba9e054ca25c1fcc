"""vLLM on the same load, in a process group of its own that is gone when this returns."""

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

from load_shape import SAMPLES

Row = dict[str, Any]

LIMIT_S = 390.0
"""It takes 80 to 150 s to start, C longer; a part has 9 minutes, of which ours needs up to 2."""
_OPTIONS = {"C": ["--util", "0.95"]}


def peer_rows(script: Path, site: Path, model: str, sizes: Sequence[int], limit_s: float = LIMIT_S) -> list[Row]:
    """What `script` says of vLLM, found in the folder `site`: a row for its start, and rows for each number of
    sequences with tok/s, GPU span and period of a step, with logprobs and without.

    Where it fails or takes longer than `limit_s` the last row says so, after those that it had given.
    """
    groups = ",".join(str(size // SAMPLES) for size in sizes)
    command = [sys.executable, str(script), "--model", model, "--groups", groups, "--steps", "--reps", "1"]
    begun = time.perf_counter()
    output, ending = _run(command + _OPTIONS.get(model, []), _environment(site), limit_s)
    rows = results(output)
    if ending is not None:
        print(output[-2000:], flush=True)
        rows.append({"model": model, "failed": ending})
    for row in rows:
        print("peer", json.dumps(row), flush=True)
    print(f"the peer took {time.perf_counter() - begun:.0f} s", flush=True)
    return [{"peer": True, **row} for row in rows]


def results(output: str) -> list[Row]:
    """The rows that its script has printed."""
    marked = (line for line in output.splitlines() if line.startswith("RESULT "))
    return [json.loads(line[len("RESULT ") :]) for line in marked]


def _environment(site: Path) -> dict[str, str]:
    # Not the libraries and packages that Paddle's build wants.
    dropped = ("LD_LIBRARY_PATH", "PYTHONSAFEPATH", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"PYTHONPATH": str(site)}


def _run(command: Sequence[str], environment: dict[str, str], limit_s: float) -> tuple[str, str | None]:
    """Output, and what was wrong with the end, None for nothing."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # Its engine is a process of its own, which holds the pipe and the GPU's memory.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return output, f"more than {limit_s:.0f} s"
    return output, f"exit status {process.returncode}" if process.returncode else None
