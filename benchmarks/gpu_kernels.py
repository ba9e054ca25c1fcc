"""The bfloat16 kernels at decode and prefill sizes, each beside its floor: bytes over bandwidth or FLOPs over peak.

python benchmarks/gpu_kernels.py [--json] [--models A B C] [--rows 1 8 32 128 256 2048]

A: Qwen3-0.6B, B: Llama-3.1-8B, C: the mixture of Qwen3-30B-A3B. Up to 512 rows are decode at a context of 384; 2048
rows are one prefill. "n=8": eight sequences share a prompt of 256 keys, read once for all of them, or ("own") by each.
"floor" counts every operand once, at the datasheet's rates; "of it" is the floor over the time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

from gpu_attention_cases import MOST_SEQUENCES, attention_cases, shared_attention_cases
from gpu_cases import (
    MODELS,
    Case,
    Shape,
    head_case,
    launches,
    linear_case,
    mixture_case,
    norm_case,
    swiglu_case,
    truncated_head_case,
)
from gpu_timing import PEAK, Bench

SHARED_ROWS = 64  # fewer have a program for each split


def cases(bench: Bench, shape: Shape, rows: int) -> Iterator[Callable[[], Iterator[Case]]]:
    """The ops of a layer and the head, made one at a time."""
    e, q, kv = shape.hidden, shape.heads * shape.size, shape.kv_heads * shape.size
    yield lambda: iter([linear_case(bench, "qkv", rows, q + 2 * kv, e)])
    yield lambda: iter([linear_case(bench, "o", rows, e, q)])
    if shape.experts:
        yield lambda: iter([mixture_case(bench, shape, rows)])
    else:
        yield lambda: iter([swiglu_case(bench, rows, shape.inner, e)])
        yield lambda: iter([linear_case(bench, "down", rows, e, shape.inner)])
    yield lambda: iter([norm_case(bench, rows, e)])
    yield lambda: attention_cases(bench, shape, rows)
    if SHARED_ROWS <= rows <= MOST_SEQUENCES:
        yield lambda: shared_attention_cases(bench, shape, rows)
    if rows <= MOST_SEQUENCES:
        yield lambda: iter([head_case(bench, shape, rows)])
        yield lambda: iter([truncated_head_case(bench, shape, rows)])


def measure(bench: Bench, name: str, rows: int) -> list[dict[str, Any]]:
    """A line for each op."""
    lines = []
    for make in cases(bench, MODELS[name], rows):
        for case in make():
            seconds = bench.seconds(launches(case))
            floor = max(case.num_bytes / bench.bandwidth, case.flops / PEAK)
            lines.append({"model": name, "rows": rows, "op": case.op, "us": seconds * 1e6, "floor_us": floor * 1e6})
            print(
                f"{name} {rows:5d} {case.op:14s} {seconds * 1e6:9.2f} us  floor {floor * 1e6:9.2f}"
                f"  {floor / seconds:6.1%} of it  {case.num_bytes / seconds / 1e12:5.2f} TB/s"
                f" {case.flops / seconds / 1e12:6.1f} TFLOP/s",
                flush=True,
            )
    return lines


def step_milliseconds(lines: list[dict[str, Any]], shape: Shape, attention: str) -> tuple[float, float]:
    """Kernel time of a decode step and its floor: two norms a layer, one head, and the attention of that name."""
    total = floor = 0.0
    for line in lines:
        if (line["op"].startswith("attention") and line["op"] != attention) or line["op"] == "lm_head+top_p":
            continue
        times = 1 if line["op"] == "lm_head+draw" else shape.layers * (2 if line["op"] == "add_rms_norm" else 1)
        total, floor = total + times * line["us"] / 1e3, floor + times * line["floor_us"] / 1e3
    return total, floor


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 256, 2048])
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    options = parser.parse_args()
    bench = Bench()
    ceilings = bench.ceilings()
    print(bench.name, {name: f"{value:.3e}" for name, value in ceilings.items()}, flush=True)
    lines: list[dict[str, Any]] = []
    steps = []
    for name in options.models:
        for rows in options.rows:
            part = measure(bench, name, rows)
            lines += part
            for op in sorted({line["op"] for line in part if line["op"].startswith("attention")}):
                total, floor = step_milliseconds(part, MODELS[name], op)
                steps.append({"model": name, "rows": rows, "attention": op, "ms": total, "floor_ms": floor})
    for step in steps:
        print(
            f"{step['model']} {step['rows']:5d} rows: {step['ms']:8.3f} ms a step, floor {step['floor_ms']:8.3f}"
            f" ({step['attention']})"
        )
    if options.json:
        print(json.dumps({"device": bench.name, **ceilings, "ops": lines, "steps": steps}))


if __name__ == "__main__":
    main()
