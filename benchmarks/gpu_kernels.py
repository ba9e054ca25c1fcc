"""The bfloat16 kernels at decode and prefill sizes, each beside its floor: bytes over bandwidth or FLOPs over peak.

python benchmarks/gpu_kernels.py [--json] [--models A B C] [--rows 1 8 32 128 256 2048]

A: Qwen3-0.6B, B: Llama-3.1-8B, C: the mixture of Qwen3-30B-A3B. Up to 256 rows are decode at a context of 384; 2048
rows are one prefill. "floor" counts every operand once, at the datasheet's rates; "of it" is the floor over the time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from gpu_timing import PEAK, Bench, Launch, copies_past_cache

from zerokl.kernels.experts import RouterSpec
from zerokl.kernels.gpu import experts, lm_head, matmul, norms, paged_attention, sampling, tiles
from zerokl.kernels.gpu.attention_tiles import attention_tiles
from zerokl.kernels.gpu.step_arrays import sampling_options
from zerokl.kernels.gpu.tiles import Tile
from zerokl.kernels.ops import neutral_sampling

CONTEXT = 384
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model."""

    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    layers: int
    size: int = 128
    experts: int = 0
    top_k: int = 0


MODELS = {
    "A": Shape(1024, 16, 8, 3072, 151_936, 28),
    "B": Shape(4096, 32, 8, 14_336, 128_256, 32),
    "C": Shape(2048, 32, 4, 768, 151_936, 48, experts=128, top_k=8),
}


@dataclass(frozen=True, slots=True)
class Case:
    """An op at a size: `launch(i)` runs it on its operand set number i of `copies`."""

    op: str
    num_bytes: float
    flops: float
    copies: int
    launch: Callable[[int], None]


def linear_case(bench: Bench, op: str, rows: int, n: int, k: int, tile: Tile | None = None) -> Case:
    """A matrix product with an [n, k] weight."""
    copies = copies_past_cache(2 * n * k)
    x, out, w = bench.normal(rows, k), bench.empty(rows, n), [bench.normal(n, k) for _ in range(copies)]
    return Case(
        op, 2.0 * (n * k + rows * (n + k)), 2.0 * rows * n * k, copies,
        lambda i: matmul.linear(x, w[i], None, out, tile=tile),
    )  # fmt: skip


def swiglu_case(bench: Bench, rows: int, n: int, k: int, tile: Tile | None = None) -> Case:
    """Gate and up, [n, k] each."""
    copies = copies_past_cache(4 * n * k)
    x, out = bench.normal(rows, k), bench.empty(rows, n)
    gate_up = [bench.normal(2 * n, k) for _ in range(copies)]
    return Case(
        "gate_up", 2.0 * (2 * n * k + rows * (n + k)), 4.0 * rows * n * k, copies,
        lambda i: matmul.swiglu(x, gate_up[i], out, tile=tile),
    )  # fmt: skip


def norm_case(bench: Bench, rows: int, width: int) -> Case:
    """Residual sum and RMSNorm."""
    copies = copies_past_cache(12 * rows * width)
    residual = [bench.normal(rows, width, dtype="float32") for _ in range(copies)]
    delta = [bench.normal(rows, width) for _ in range(copies)]
    weight, out = bench.normal(width, dtype="float32"), bench.empty(rows, width)
    return Case(
        "add_rms_norm", 12.0 * rows * width, 0.0, copies,
        lambda i: norms.rms_norm(residual[i], weight, 1e-6, out, delta=delta[i]),
    )  # fmt: skip


def attention_cases(
    bench: Bench, shape: Shape, rows: int, tile: Tile | None = None, split: int = paged_attention.SPLIT
) -> Iterator[Case]:
    """The write of keys and values, and attention: `rows` sequences at CONTEXT, or one prefill of `rows` tokens."""
    prefill = rows > 256
    sequences, context = (1, rows) if prefill else (rows, CONTEXT)
    heads, kv, size = shape.heads, shape.kv_heads, shape.size
    spec = SimpleNamespace(
        num_heads=heads, num_kv_heads=kv, head_dim=size, scale=size**-0.5, rotary_layout="half", norm_eps=1e-6
    )
    blocks = sequences * context // BLOCK_SIZE
    kv_bytes = 4 * sequences * context * kv * size
    copies = copies_past_cache(kv_bytes)
    pool = SimpleNamespace(
        keys=bench.normal(copies, blocks, kv, BLOCK_SIZE, size),
        values=bench.normal(copies, blocks, kv, BLOCK_SIZE, size),
        block_size=BLOCK_SIZE,
    )
    table_rows = np.random.default_rng(1).permutation(blocks).astype(np.int32).reshape(sequences, -1)
    counts = np.full(sequences, context if prefill else 1)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.arange(rows) if prefill else np.full(rows, context - 1)
    owner = np.repeat(np.arange(sequences), counts)
    slots = table_rows[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    on_device = {name: bench.ints(v.astype(np.int32)) for name, v in (("positions", positions), ("slots", slots))}
    rope = bench.normal(max(4096, context), 2, size // 2, dtype="float32")
    norm = bench.normal(size, dtype="float32")
    qkv, query = bench.normal(rows, (heads + 2 * kv) * size), bench.normal(rows, heads * size)
    yield Case(
        "qkv_to_cache", 4.0 * rows * (heads + 2 * kv) * size, 0.0, copies,
        lambda i: norms.qkv_to_cache(
            qkv, norm, norm, rope, on_device["positions"], on_device["slots"], pool, i, query, spec
        ),
    )  # fmt: skip
    tile = tile or (tiles.PREFILL_ATTENTION if prefill else tiles.DECODE_ATTENTION)
    lists = attention_tiles(starts, np.full(sequences, context, np.int32), paged_attention.tokens_per_tile(tile, spec))
    tile_list, table, out = bench.ints(lists[prefill]), bench.ints(table_rows), bench.empty(rows, heads * size)
    partial = None
    if not prefill and paged_attention.splits_pay(sequences, kv, context):
        buffer = (rows, heads, -(-context // split))
        partial = bench.empty(*buffer, size, dtype="float32"), bench.empty(*buffer, 2, dtype="float32")
    pairs = context * (context + 1) / 2 if prefill else sequences * context
    yield Case(
        "attention", kv_bytes + 4.0 * rows * heads * size, 4.0 * pairs * heads * size, copies,
        lambda i: paged_attention.attention(
            query, pool, i, table, tile_list, out, spec, partial=partial, tile=tile, split=split
        ),
    )  # fmt: skip


def head_case(bench: Bench, shape: Shape, rows: int, tile: Tile | None = None) -> Case:
    """LM head, log-softmax and draw."""
    vocab, chunks = shape.vocab, lm_head.num_chunks(shape.vocab)
    hidden, head = bench.normal(rows, shape.hidden), bench.normal(vocab, shape.hidden, scale=0.05)
    options = bench.ints(sampling_options(neutral_sampling(rows), rows))
    logits = bench.empty(rows, vocab, dtype="float32")
    columns = lm_head.num_tiles(rows, vocab, "bfloat16") if tile is None else -(-vocab // tile.BLOCK_N)
    tile_max = bench.empty(rows, columns, dtype="float32")
    sums, masses = bench.empty(rows, chunks, 2, dtype="float32"), bench.empty(rows, chunks, dtype="int64")
    out = bench.empty(rows, int(sampling.NUM_RESULTS), dtype="int32")
    # The floor has no logits in memory: a kernel that keeps them on the chip could do without.
    return Case(
        "lm_head+draw", 2.0 * (vocab + rows) * shape.hidden, 2.0 * rows * vocab * shape.hidden, 1,
        lambda _: lm_head.settle(hidden, head, options, logits, tile_max, sums, masses, out, tile=tile),
    )  # fmt: skip


def mixture_case(bench: Bench, shape: Shape, rows: int, tile: Tile | None = None) -> Case:
    """Choice, sort, grouped products and sum; router logits are given."""
    x_count, k, f, e = shape.experts, shape.top_k, shape.inner, shape.hidden
    spec = RouterSpec(top_k=k, normalise=True, norm_min=0.0, index=0)
    x, logits = bench.normal(rows, e), bench.normal(rows, x_count, dtype="float32")
    gate_up, down = (bench.normal(x_count, *s) for s in ((2 * f, e), (e, f)))
    ids, weights = bench.empty(rows, k, dtype="int32"), bench.empty(rows, k, dtype="float32")
    tile = tile or experts.expert_tile(rows * k, x_count, "bfloat16")
    num_tiles = experts.num_tiles(rows * k, x_count, tile.BLOCK_M)
    counts, tile_expert = bench.empty(x_count, dtype="int32"), bench.empty(num_tiles, dtype="int32")
    order = bench.empty(num_tiles * tile.BLOCK_M, dtype="int32")
    inner, outputs = bench.empty(rows * k, f), bench.empty(rows * k, e, dtype="float32")
    out = bench.empty(rows, e)

    def launch(_: int) -> None:
        experts.choose_experts(logits, None, spec, ids, weights)
        experts.sort_slots(ids, x_count, counts, order, tile_expert, tile)
        experts.mixture(x, gate_up, down, ids, weights, order, tile_expert, inner, outputs, None, out, tile=tile)

    touched = x_count * (1 - (1 - k / x_count) ** rows)
    return Case("mixture", 6.0 * touched * e * f + 4.0 * rows * e, 6.0 * rows * k * e * f, 1, launch)


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
    if rows <= 256:
        yield lambda: iter([head_case(bench, shape, rows)])


def launches(case: Case) -> list[Launch]:
    """One launch for each operand set."""
    return [lambda i=i: case.launch(i) for i in range(case.copies)]  # type: ignore[misc]


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


def step_milliseconds(lines: list[dict[str, Any]], shape: Shape) -> tuple[float, float]:
    """Kernel time of a decode step and its floor: two norms a layer, one head."""
    total = floor = 0.0
    for line in lines:
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
            total, floor = step_milliseconds(part, MODELS[name])
            steps.append({"model": name, "rows": rows, "ms": total, "floor_ms": floor})
    for step in steps:
        print(f"{step['model']} {step['rows']:5d} rows: {step['ms']:8.3f} ms a step, floor {step['floor_ms']:8.3f}")
    if options.json:
        print(json.dumps({"device": bench.name, **ceilings, "ops": lines, "steps": steps}))


if __name__ == "__main__":
    main()
