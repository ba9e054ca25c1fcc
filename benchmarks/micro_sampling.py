"""Micro-benchmark of the sampler and of its gradient: microseconds a row on one thread, by options and vocabulary.

    python benchmarks/micro_sampling.py [--rows 16] [--vocab 49152 152064] [--seconds 0.2] [--json]

Rows are peaked as a language model's are (a few likely tokens, a long tail). `read_gb_s` is the rate at which a single
pass over the logits would have to read them to take as long.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
from machine_facts import machine_facts
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.ops import SamplingBatch, neutral_sampling

Floats = NDArray[np.float32]

OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "argmax": {"temperature": 0.0},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.95},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
}


def peaked_logits(rows: int, vocab: int) -> Floats:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(rows, vocab))
    logits[:, :20] += 14
    return logits.astype(np.float32)


def batch_of(rows: int, options: dict[str, float]) -> SamplingBatch:
    batch = neutral_sampling(rows)
    given = {name: np.full(rows, value, getattr(batch, name).dtype) for name, value in options.items()}
    return replace(batch, position=np.arange(rows, dtype=np.uint32), **given)


def sampling_call(logits: Floats, batch: SamplingBatch) -> Callable[[], None]:
    inputs = [getattr(batch, field.name) for field in fields(batch) if field.name != "want_raw"]
    tokens = np.empty(len(logits), np.int32)
    outputs = [np.empty(len(logits), np.float32) for _ in range(3)]
    return lambda: _cpu.sample(logits, *inputs, tokens, *outputs, None)


def gradient_call(logits: Floats) -> Callable[[], None]:
    rows = len(logits)
    ones, targets, work = np.ones(rows, np.float32), np.zeros(rows, np.int32), logits.copy()
    return lambda: _cpu.log_softmax_backward(work, targets, ones, ones, ones)


def best_seconds(call: Callable[[], None], seconds: float) -> float:
    """Least time of one call over `seconds` of calls, after one that is not counted."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def measure(rows: int, vocab: int, seconds: float) -> list[dict[str, Any]]:
    logits = peaked_logits(rows, vocab)
    calls = {name: sampling_call(logits, batch_of(rows, options)) for name, options in OPTIONS.items()}
    calls["gradient"] = gradient_call(logits)
    results = []
    for name, call in calls.items():
        row = best_seconds(call, seconds) / rows
        results.append({"case": name, "vocab": vocab, "us_per_row": row * 1e6, "read_gb_s": 4 * vocab / row / 1e9})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 152064])
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each case")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    _cpu.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for vocab in args.vocab:
        for result in measure(args.rows, vocab, args.seconds):
            rows.append(result)
            print(
                f"{vocab:>7} {result['case']:<12} {result['us_per_row']:7.1f} us/row  {result['read_gb_s']:6.1f} GB/s"
            )
    if args.json:
        print(json.dumps({**machine_facts(), "instruction_set": _cpu.instruction_set(), "rows": rows}))


if __name__ == "__main__":
    main()
