"""A real `rollout-server` on four ranks under random faults: each answer comes once, with an undisturbed engine's bits.

    python benchmarks/chaos.py --json
    python benchmarks/chaos.py --layout moe --seconds 120 --seed 7 --no-updates

Ranks are killed and stopped, generation is paused, requests are aborted, weights are updated well and badly, clients
die. docs/chaos.md tells how to read the report; its last line is one JSON object, and the exit status 1 if anything is
wrong.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
from pathlib import Path

from machine_facts import machine_facts

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the run's parts are shared with the tests

from chaos_run.layouts import LAYOUTS
from chaos_run.run import ChaosOptions, ChaosReport, run_chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--seconds", type=float, default=600.0, help="of all layouts together")
    parser.add_argument("--seed", type=int, default=None, help="of all decisions; a new one if left out")
    parser.add_argument("--layout", choices=[*LAYOUTS, "both"], default="both")
    parser.add_argument("--no-updates", action="store_true", help="then the whole batch is held against a calm run")
    parser.add_argument("--no-rank-faults", action="store_true")
    parser.add_argument("--clients", type=int, default=6)
    args = parser.parse_args()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    layouts = list(LAYOUTS) if args.layout == "both" else [args.layout]
    reports = []
    for layout in layouts:
        options = ChaosOptions(
            seconds=args.seconds / len(layouts),
            seed=seed,
            layout=layout,
            updates=not args.no_updates,
            rank_faults=not args.no_rank_faults,
            clients=args.clients,
        )
        with tempfile.TemporaryDirectory(prefix="zerokl-chaos-") as folder:
            reports.append(run_chaos(options, Path(folder)))
        if not args.json:
            tell(reports[-1])
    passed = all(report.passed for report in reports)
    print(json.dumps({"seed": seed, "passed": passed, **totals(reports)} | machine_facts()))
    return 0 if passed else 1


def totals(reports: list[ChaosReport]) -> dict[str, object]:
    """The JSON line's keys: sums over the layouts, and each layout's own report."""
    faults: dict[str, int] = {}
    for report in reports:
        for kind, count in report.faults.items():
            faults[kind] = faults.get(kind, 0) + count
    counts = {name: sum(getattr(one, name) for one in reports) for name in ("requests", "answered_once", "bit_equal")}
    leaks = [leak for report in reports for leak in report.leaks]
    return {**counts, "faults": faults, "leaks": leaks, "runs": [report.to_dict() for report in reports]}


def tell(report: ChaosReport) -> None:
    """One layout's outcome, for people."""
    options = report.options
    verdict = "ok" if report.passed else "FAILED"
    print(f"{verdict}: {options['layout']}, {options['seconds']:g} s, seed {options['seed']}")
    print(f"  requests {report.requests}, answered once {report.answered_once}, bit-equal {report.bit_equal}")
    print(f"  faults survived: {', '.join(f'{kind} {count}' for kind, count in report.faults.items())}")
    print(f"  {', '.join(f'{name} {value:g}' for name, value in report.figures.items())}")
    for line in [*report.failures, *(f"leaked: {leak}" for leak in report.leaks)]:
        print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
