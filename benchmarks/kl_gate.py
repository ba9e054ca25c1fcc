"""The KL gate: every way to schedule a job, each held against the trainer's own forward. Exactly 0, or exit status 1.

    python benchmarks/kl_gate.py --json
    python benchmarks/kl_gate.py --model models/SmolLM2-135M-Instruct

One dense and one MoE policy, small and random unless a folder is given. docs/kl_gate.md tells how to read the output;
its last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine_facts import machine_facts

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the matrix is shared with the tests

from gate.controls import CONTROLS, ControlReport, run_control
from gate.measure import VariantReport, plain_runs, run_variant
from gate.policies import GatePolicy, Size, folder_policy, synthetic_policy
from gate.story import Chapter, tell
from gate.tables import tables
from gate.variants import VARIANTS
from rich.console import Console

from zerokl.rollout.models.config import ModelConfig


def policies(args: argparse.Namespace, folder: Path) -> Iterator[GatePolicy]:
    """The given models, and a tiny one of each kind that none was given for."""
    size = Size(prompts=args.prompts, samples=args.samples, tokens=args.tokens)
    given = {"dense" if ModelConfig.from_json(path).moe is None else "moe": path for path in args.model}
    for name in args.policies:
        if name in given:
            yield folder_policy(name, given[name], size)
        else:
            yield synthetic_policy(name, folder / name, size)


class Gate:
    """Runs the parts, tells each one's outcome as it comes, and keeps the reports."""

    def __init__(self, console: Console, only: str) -> None:
        self.console = console
        self.only = only
        self.variants: list[VariantReport] = []
        self.controls: list[ControlReport] = []
        self.chapters: list[Chapter] = []

    def run(self, policy: GatePolicy, arrivals: int) -> None:
        """Everything for one policy."""
        plain_runs(policy)
        for variant in VARIANTS:
            if self.only in variant.name and (policy.is_moe or not variant.moe_only):
                self.variants.append(run_variant(policy, variant))
                self._tell(self.variants[-1].name, not self.variants[-1].failures)
        if self.only:
            return
        for control in CONTROLS:
            self.controls.append(run_control(policy, control))
            self._tell(f"{self.controls[-1].name} (must be caught)", self.controls[-1].caught)
        self.chapters += tell(policy, arrivals)

    @property
    def failures(self) -> list[str]:
        """What fails the gate, each by name."""
        failed = [f"{one.name}: {why}" for one in self.variants for why in one.failures]
        failed += [f"{one.name}: not caught" for one in self.controls if not one.caught]
        failed += [f"{one.policy}: {one.kernels}, two schedules: not 0" for one in self.chapters if not one.passed]
        return failed if self.variants else ["no variant was run"]

    def report(self) -> dict[str, Any]:
        """The JSON line's keys."""
        return {
            "passed": not self.failures,
            "failures": self.failures,
            "variants": [one.to_dict() for one in self.variants],
            "negative_controls": [one.to_dict() for one in self.controls],
            "story": [one.to_dict() for one in self.chapters],
        }

    def _tell(self, name: str, good: bool) -> None:
        self.console.print(f"{'ok' if good else 'FAILED':6s} {name}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--model", action="append", default=[], metavar="DIR", help="in place of a tiny one")
    parser.add_argument("--policies", nargs="+", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--arrivals", type=int, default=96, help="of the story, a multiple of 8")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name holds it, without controls")
    args = parser.parse_args()
    console = Console(quiet=args.json, width=None if sys.stdout.isatty() else 150)
    gate = Gate(console, args.only)
    with tempfile.TemporaryDirectory() as folder:
        for policy in policies(args, Path(folder)):
            gate.run(policy, args.arrivals)
    console.print(*tables(gate.variants, gate.controls, gate.chapters))
    for failure in gate.failures:
        console.print(f"[bold red]FAILED[/] {failure}", highlight=False)
    print(json.dumps(gate.report() | machine_facts()))
    return 1 if gate.failures else 0


if __name__ == "__main__":
    sys.exit(main())
