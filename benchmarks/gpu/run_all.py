"""The engine on one GPU: exactness and speed, in parts of a few minutes.

    python benchmarks/gpu/run_all.py --part exact|speed_a|speed_b|c|sync|sanitize [--json]

The load is that of `docs/gpu-results.md`: groups of 8 samples of random prompts of 256 tokens, 256 new tokens each,
temperature 1, logprobs on, random weights whose logits have a real spread. tok/s counts new tokens over the wall time
of `generate`, prefill included, after a warm-up with other prompts. The GPU span of a step is the time between events
before its first copy and after its last; its period is the time between the starts of two steps on the host.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from step_times import TimedWorker

from models import write_model
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

PROMPT, OUTPUT, SAMPLES = 256, 256, 8
Prompts = list[NDArray[np.int32]]


def prompts(count: int, vocab: int, seed: int) -> Prompts:
    return list(np.random.default_rng(seed).integers(10, vocab, (count, PROMPT)).astype(np.int32))


def make_engine(model: str, folder: Path, **options: Any) -> RolloutEngine:
    defaults: dict[str, Any] = {
        "model": str(write_model(model, folder / model)),
        "device": "gpu",
        "max_model_len": 2048,
        "max_num_seqs": 512,
        "max_num_batched_tokens": 8192,
    }
    return RolloutEngine(EngineConfig(**(defaults | options)), make_worker=TimedWorker)


def load(engine: RolloutEngine, sequences: int, tokens: int, seed: int, **params: Any) -> tuple[list[Rollout], float]:
    """Rollouts and wall seconds of one call."""
    asked = prompts(sequences // SAMPLES, engine.model_config.vocab_size, seed)
    options = SamplingParams(**({"n": SAMPLES, "max_tokens": tokens, "ignore_eos": True, "seed": seed} | params))
    start = time.perf_counter()
    rollouts = engine.generate(asked, options)
    seconds = time.perf_counter() - start
    assert all(len(rollout.token_ids) == tokens for rollout in rollouts)
    return rollouts, seconds


def speed(model: str, sizes: tuple[int, ...], folder: Path, repeats: int, **options: Any) -> list[dict[str, Any]]:
    begun = time.perf_counter()
    write_model(model, folder / model)
    written = time.perf_counter()
    with make_engine(model, folder, **options) as engine:
        load(engine, SAMPLES, 1, 0)
        started = time.perf_counter()
        print(f"{model} written in {written - begun:.1f} s, first token {started - written:.1f} s later", flush=True)
        rows = []
        for sequences in sizes:
            load(engine, sequences, 32, 1000 + sequences)
            for repeat in range(repeats):
                TimedWorker.latest.take(sequences)
                _, seconds = load(engine, sequences, OUTPUT, 2000 + sequences + repeat)
                row = {
                    "model": model,
                    "sequences": sequences,
                    "tok_s": round(sequences * OUTPUT / seconds),
                    **TimedWorker.latest.take(sequences),
                }
                print(json.dumps(row), flush=True)
                rows.append(row)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=("exact", "speed_a", "speed_b", "c", "sync", "sanitize"))
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--folder", type=Path, help="where models are written and kept (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="*")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.part == "speed_a":
            rows = speed("A", tuple(args.sizes or (8, 256, 512)), folder, args.repeats)
        elif args.part == "speed_b":
            rows = speed("B", tuple(args.sizes or (256, 512)), folder, args.repeats)
        else:
            raise SystemExit(f"part {args.part} is not there yet")
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
