"""The engine on one GPU: exactness, speed, what exactness costs, errors and memory checks, in parts of a few minutes.

    python benchmarks/gpu/run_all.py --part PART [--json] [--sizes N ...]
        [--peer vllm_bench.py --peer-site FOLDER] [--models A B] [--pairs N] [--tokens N] [--gguf smollm2.gguf]

Parts: exact, policy, speed_a, speed_b, c, arrivals, cost, reference, sanitize, sync, ranks.
`sync.py` tells the last one; `--part sync --models A --sizes 0 --updates 1` is its short form.

The load is that of `docs/gpu-results.md`: groups of 8 samples of random prompts of 256 tokens, 256 new tokens each,
temperature 1, logprobs on, random weights whose logits have a real spread. tok/s counts new tokens over the wall time
of `generate`, prefill included, after a warm-up with other prompts. The GPU span of a step is the time between events
before its first copy and after its last; its period is the time between the starts of two steps on the host. With
`--peer` a script that measures vLLM in the same way runs before, in a process of its own.

Each part ends with a short table; with `--json` the last line is one JSON object. A part that cannot be run on the
machine says what is missing and exits with status 2. `benchmarks` and `benchmarks/gpu` must be on the path.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from refusal import PartRefusedError
from row_table import table

Row = dict[str, Any]
Part = Callable[[argparse.Namespace, Path], list[Row]]

PEERS = {"speed_a": "A", "speed_b": "B", "c": "C"}
SIZES = {
    "speed_a": (8, 256, 512),
    "speed_b": (256, 512),
    "c": (128,),
    "arrivals": (64, 256, 512),
    "cost": (256,),
    "sync": (0, 64),
    "ranks": (256,),
}
"""Numbers of sequences by part, where none are given; of part ranks for each rank."""
MODELS = {
    "exact": ("A", "M", "SmolLM2", "B", "C"),
    "policy": ("A", "M", "SmolLM2", "B"),
    "cost": ("A", "B"),
    "reference": ("smollm2", "A, 4 layers"),
    "sync": ("A", "B"),
}
"""Models of parts that let one choose."""
EXACT_KV_BYTES = 7 << 30
"""Of engines whose bits are compared: what 512 sequences need, so that a part can run beside others."""

# Parts are imported when they are run: `sanitize` needs no more than a GPU's tools.


def exact(args: argparse.Namespace, folder: Path) -> list[Row]:
    from exact import exact_rows
    from workload import make_engine

    return exact_rows(folder, partial(make_engine, weight_slots=1, kv_cache_bytes=EXACT_KV_BYTES), args.models)


def policy(args: argparse.Namespace, folder: Path) -> list[Row]:
    from exact import policy_exact_rows
    from workload import make_engine

    make = partial(make_engine, weight_slots=1, kv_cache_bytes=EXACT_KV_BYTES)
    return policy_exact_rows(folder, make, args.models)


def speed_a(args: argparse.Namespace, folder: Path) -> list[Row]:
    from workload import speed

    return speed("A", args.sizes, folder, args.repeats)


def speed_b(args: argparse.Namespace, folder: Path) -> list[Row]:
    from workload import speed

    return speed("B", args.sizes, folder, args.repeats)


def c(args: argparse.Namespace, folder: Path) -> list[Row]:
    from workload import speed

    return speed("C", args.sizes, folder, 1, weight_slots=1, max_num_seqs=256)


def arrivals(args: argparse.Namespace, folder: Path) -> list[Row]:
    from arrivals import arrival_rows
    from workload import make_engine

    return arrival_rows("A", args.sizes, folder, make_engine, args.repeats)


def cost(args: argparse.Namespace, folder: Path) -> list[Row]:
    from cost import cost_rows

    return cost_rows(args.models, args.sizes, folder, args.pairs, args.tokens)


def reference(args: argparse.Namespace, folder: Path) -> list[Row]:
    from reference import reference_rows

    return reference_rows(args.models, folder, args.gguf)


def sanitize(_args: argparse.Namespace, _folder: Path) -> list[Row]:
    from sanitize import sanitize_rows

    return sanitize_rows()


def sync(args: argparse.Namespace, folder: Path) -> list[Row]:
    from sync import sync_rows
    from workload import make_engine

    return sync_rows(folder, make_engine, args.models, args.sizes, args.updates)


def ranks(args: argparse.Namespace, folder: Path) -> list[Row]:
    from ranks import rank_rows

    return rank_rows(folder, "A", args.sizes, args.repeats)


PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (exact, policy, speed_a, speed_b, c, arrivals, cost, reference, sanitize, sync, ranks)
}  # fmt: skip


def run(args: argparse.Namespace, folder: Path) -> list[Row]:
    """The rows of a part, those of the peer first."""
    rows: list[Row] = []
    if args.peer is not None:
        from peer import peer_rows

        rows += peer_rows(args.peer, args.peer_site, PEERS[args.part], args.sizes)
    return rows + PARTS[args.part](args, folder)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked and completed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=PARTS)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", help="sequences at a time")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--peer-site", type=Path)
    parser.add_argument("--models", nargs="+", help=f"of parts {', '.join(MODELS)}")
    parser.add_argument("--pairs", type=int, default=21, help="interleaved pairs of part cost")
    parser.add_argument("--tokens", type=int, default=64, help="new ones a sequence in part cost")
    parser.add_argument("--updates", type=int, default=5, help="of part sync, for each number of sequences")
    kit = Path(os.environ.get("KIT", "/opt/kit"))
    parser.add_argument("--gguf", type=Path, default=kit / "smollm2.gguf", help="real weights of part reference")
    args = parser.parse_args(given)
    args.sizes = tuple(args.sizes or SIZES.get(args.part, ()))
    known = MODELS.get(args.part, ())
    args.models = tuple(args.models or known)
    if not set(args.models) <= set(known):
        parser.error(f"--models of part {args.part} must be among {list(known)}, got {list(args.models)}")
    if args.peer is not None and (args.part not in PEERS or args.peer_site is None):
        parser.error(f"--peer needs --peer-site and a part of {', '.join(PEERS)}")
    return args


def log_to_stdout() -> None:
    """Have the engine's log lines among the output."""
    log = logging.getLogger("zerokl")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False  # Paddle prints what reaches the root


def main(given: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 something has not passed, 2 the part was refused."""
    args = arguments(given)
    log_to_stdout()
    begun = time.perf_counter()
    result: Row = {"part": args.part, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result["rows"] = run(args, Path(scratch))
        except PartRefusedError as refusal:
            result["refused"] = str(refusal)
    result["seconds"] = round(time.perf_counter() - begun)
    print(table(result["rows"]))
    if "refused" in result:
        print(f"part {args.part} was not run: {result['refused']}")
    if args.json:
        print(json.dumps(result))
    return 2 if "refused" in result else int(any(row.get("passed") is False for row in result["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
