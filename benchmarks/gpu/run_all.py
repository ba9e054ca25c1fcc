"""The engine on one GPU: exactness and speed, in parts of a few minutes.

    python benchmarks/gpu/run_all.py --part exact|speed_a|speed_b|c|sync [--json] [--sizes N ...]
        [--peer vllm_bench.py --peer-site FOLDER]

The load is that of `docs/gpu-results.md`: groups of 8 samples of random prompts of 256 tokens, 256 new tokens each,
temperature 1, logprobs on, random weights whose logits have a real spread. tok/s counts new tokens over the wall time
of `generate`, prefill included, after a warm-up with other prompts. The GPU span of a step is the time between events
before its first copy and after its last; its period is the time between the starts of two steps on the host. With
`--peer` a script that measures vLLM in the same way runs before, in a process of its own.

Part `sync` is told in `sync.py`; its `--sizes` are the sequences that run meanwhile, and
`--part sync --models A --sizes 0 --updates 1` is its short form.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from exact import exact_rows
from numpy.typing import NDArray
from step_times import TimedWorker
from sync import sync_rows

from models import model_folder
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.sampling_params import SamplingParams

PROMPT, OUTPUT, SAMPLES = 256, 256, 8
Row = dict[str, Any]


def prompts(count: int, vocab: int, seed: int) -> list[NDArray[np.int32]]:
    return list(np.random.default_rng(seed).integers(10, vocab, (count, PROMPT)).astype(np.int32))


def make_engine(folder: Path, **options: Any) -> RolloutEngine:
    defaults: Row = {"device": "gpu", "max_model_len": 2048, "max_num_seqs": 512, "max_num_batched_tokens": 8192}
    make_worker = options.pop("make_worker", TimedWorker)
    return RolloutEngine(EngineConfig(model=str(folder), **(defaults | options)), make_worker=make_worker)


def load(engine: RolloutEngine, sequences: int, tokens: int, seed: int, **params: Any) -> float:
    """Wall seconds of one call."""
    asked = prompts(sequences // SAMPLES, engine.model_config.vocab_size, seed)
    options = SamplingParams(n=SAMPLES, max_tokens=tokens, ignore_eos=True, seed=seed, **params)
    start = time.perf_counter()
    rollouts = engine.generate(asked, options)
    seconds = time.perf_counter() - start
    assert all(len(rollout.token_ids) == tokens for rollout in rollouts)
    return seconds


def speed(model: str, sizes: tuple[int, ...], folder: Path, repeats: int, **options: Any) -> list[Row]:
    begun = time.perf_counter()
    rows: list[Row] = []
    with make_engine(model_folder(model, folder / model), **options) as engine:
        load(engine, SAMPLES, 1, 0)
        print(f"{model}: first token after {time.perf_counter() - begun:.1f} s", flush=True)
        for sequences in sizes:
            load(engine, sequences, 32, 1000 + sequences)
            for repeat in range(repeats):
                TimedWorker.latest.take(sequences)
                seconds = load(engine, sequences, OUTPUT, 2000 + sequences + repeat)
                row = {"model": model, "sequences": sequences, "tok_s": round(sequences * OUTPUT / seconds)}
                rows.append(row | TimedWorker.latest.take(sequences))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def peer(script: Path, site: Path, model: str, groups: list[int]) -> list[Row]:
    """What `script` says of vLLM, found in `site`, on the same load."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LD_LIBRARY_PATH", "PYTHONSAFEPATH")}
    command = [sys.executable, str(script), "--model", model, "--groups", ",".join(map(str, groups)), "--reps", "2"]
    done = subprocess.run(
        command, env=kept | {"PYTHONPATH": str(site)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    rows = [json.loads(line[len("RESULT ") :]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode:
        print(done.stdout[-2000:], flush=True)
    for row in rows:
        print("peer", json.dumps(row), flush=True)
    return [{"peer": True, **row} for row in rows]


def run(part: str, args: argparse.Namespace, folder: Path) -> list[Row]:
    parts: dict[str, Callable[[], list[Row]]] = {
        "exact": lambda: exact_rows(folder, make_engine),
        "speed_a": lambda: speed("A", tuple(args.sizes or (8, 256, 512)), folder, args.repeats),
        "speed_b": lambda: speed("B", tuple(args.sizes or (256, 512)), folder, args.repeats),
        "c": lambda: speed("C", tuple(args.sizes or (128,)), folder, 1, weight_slots=1, max_num_seqs=256),
        "sync": lambda: sync_rows(folder, make_engine, tuple(args.models), tuple(args.sizes or (0, 64)), args.updates),
    }
    rows: list[Row] = []
    if args.peer is not None:
        model = {"speed_a": "A", "speed_b": "B", "c": "C"}[part]
        rows += peer(args.peer, args.peer_site, model, [size // SAMPLES for size in args.sizes or (8, 256, 512)])
    return rows + parts[part]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=("exact", "speed_a", "speed_b", "c", "sync"))
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="*", help="sequences at a time")
    parser.add_argument("--models", nargs="+", default=["A", "B"], choices=("A", "B"), help="of part sync")
    parser.add_argument("--updates", type=int, default=5, help="of part sync, for each number of sequences")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--peer-site", type=Path)
    args = parser.parse_args()
    log = logging.getLogger("zerokl")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False  # Paddle prints what reaches the root
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(args.part, args, Path(scratch))
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
