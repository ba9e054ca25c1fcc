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
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from gpu_timing import PEAK, Bench, Launch, copies_past_cache

from zerokl.kernels.experts import RouterSpec
from zerokl.kernels.gpu import experts, general_sampling, lm_head, matmul, norms, paged_attention, sampling, tiles
from zerokl.kernels.gpu.attention_tiles import attention_tiles, share_prefixes
from zerokl.kernels.gpu.step_arrays import sampling_options, sampling_sections
from zerokl.kernels.gpu.tiles import Tile
from zerokl.kernels.ops import neutral_sampling

CONTEXT = 384
PROMPT = 256
SAMPLES = 8
SHARED_ROWS = 64  # fewer have a program for each split
MOST_SEQUENCES = 512  # more rows are one prefill
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
    step = AttentionStep(bench, shape, rows)
    qkv = bench.normal(rows, (shape.heads + 2 * shape.kv_heads) * shape.size)
    yield Case(
        "qkv_to_cache", 4.0 * rows * (shape.heads + 2 * shape.kv_heads) * shape.size, 0.0, step.copies,
        lambda i: norms.qkv_to_cache(
            qkv, step.norm, step.norm, step.rope, step.positions, step.slots, step.pool, i, step.query, step.spec
        ),
    )  # fmt: skip
    yield step.case("attention", tile=tile, split=split)


def shared_attention_cases(
    bench: Bench, shape: Shape, rows: int, walk: Tile = tiles.SHARED_ATTENTION, own: Tile = tiles.DECODE_ATTENTION
) -> Iterator[Case]:
    """The same for decode where SAMPLES sequences share the blocks of their PROMPT: read once, and each on its own."""
    step = AttentionStep(bench, shape, rows, SAMPLES)
    yield step.case("attention n=8, own", tile=own)
    yield step.case("attention n=8", tile=own, shared=step.shared(walk))


class AttentionStep:
    """Keys, values and metadata of a decode step (or of one prefill of `rows` tokens), random, in scattered blocks."""

    def __init__(self, bench: Bench, shape: Shape, rows: int, samples: int = 1) -> None:
        self._bench, self._rows, self._prefill = bench, rows, rows > MOST_SEQUENCES
        sequences, context = (1, rows) if self._prefill else (rows, CONTEXT)
        heads, kv, size = shape.heads, shape.kv_heads, shape.size
        self.spec: Any = SimpleNamespace(
            num_heads=heads, num_kv_heads=kv, head_dim=size, scale=size**-0.5, rotary_layout="half", norm_eps=1e-6
        )
        self._context = context
        self._tables = _tables(sequences, context, samples)
        blocks = int(self._tables.max()) + 1
        self._kv_bytes = 4.0 * blocks * BLOCK_SIZE * kv * size
        self.copies = copies_past_cache(int(self._kv_bytes))
        self.pool: Any = SimpleNamespace(
            keys=bench.normal(self.copies, blocks, kv, BLOCK_SIZE, size),
            values=bench.normal(self.copies, blocks, kv, BLOCK_SIZE, size),
            block_size=BLOCK_SIZE,
        )
        counts = np.full(sequences, context if self._prefill else 1)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        positions = np.arange(rows) if self._prefill else np.full(rows, context - 1)
        owner = np.repeat(np.arange(sequences), counts)
        slots = self._tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        self.positions, self.slots = (bench.ints(v.astype(np.int32)) for v in (positions, slots))
        self.rope = bench.normal(max(4096, context), 2, size // 2, dtype="float32")
        self.norm = bench.normal(size, dtype="float32")
        self.query = bench.normal(rows, heads * size)
        self._tables_there, self._out = bench.ints(self._tables), bench.empty(rows, heads * size)

    def _tiles(self, tile: Tile) -> Any:
        contexts = np.full(len(self._tables), self._context, np.int32)
        return attention_tiles(self._starts, contexts, paged_attention.tokens_per_tile(tile, self.spec))[self._prefill]

    def shared(self, walk: Tile) -> paged_attention.Shared:
        """The groups of the step."""
        members = paged_attention.members_per_tile(self.spec)
        singles = self._tiles(tiles.DECODE_ATTENTION)
        listed = share_prefixes(singles, self._tables, BLOCK_SIZE, members, paged_attention.SPLIT)
        self._shared_singles = self._bench.ints(singles)
        acc, state = (
            self._bench.empty(self._rows, self.spec.num_heads, width, dtype="float32")
            for width in (self.spec.head_dim, 2)
        )
        return paged_attention.Shared(self._bench.ints(listed), acc, state, walk)

    def case(
        self, op: str, *, tile: Tile | None = None, split: int = paged_attention.SPLIT,
        shared: paged_attention.Shared | None = None,
    ) -> Case:  # fmt: skip
        """Attention; `shared` is of this step."""
        spec, rows = self.spec, self._rows
        heads, size = spec.num_heads, spec.head_dim
        tile = tile or (tiles.PREFILL_ATTENTION if self._prefill else tiles.DECODE_ATTENTION)
        tile_list = self._shared_singles if shared else self._bench.ints(self._tiles(tile))
        partial = None
        if not self._prefill and paged_attention.splits_pay(rows, spec.num_kv_heads, self._context) and not shared:
            buffer = (rows, heads, -(-self._context // split))
            partial = (
                self._bench.empty(*buffer, size, dtype="float32"), self._bench.empty(*buffer, 2, dtype="float32"),
            )  # fmt: skip
        pairs = self._context * (self._context + 1) / 2 if self._prefill else rows * self._context
        return Case(
            op, self._kv_bytes + 4.0 * rows * heads * size, 4.0 * pairs * heads * size, self.copies,
            lambda i: paged_attention.attention(
                self.query, self.pool, i, self._tables_there, tile_list, self._out, spec, partial=partial,
                shared=shared, tile=tile, split=split,
            ),
        )  # fmt: skip


def _tables(sequences: int, context: int, samples: int) -> Any:
    """Block tables in which `samples` sequences after one another begin with the same PROMPT keys."""
    shared = PROMPT // BLOCK_SIZE if samples > 1 else 0
    own = context // BLOCK_SIZE - shared
    groups = sequences // samples
    order = np.random.default_rng(1).permutation(groups * shared + sequences * own).astype(np.int32)
    prompts = np.repeat(order[: groups * shared].reshape(groups, shared), samples, axis=0)
    return np.concatenate([prompts, order[groups * shared :].reshape(sequences, own)], axis=1)


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


def truncated_head_case(bench: Bench, shape: Shape, rows: int) -> Case:
    """The same with top-p of 0.95 at temperature 0.7 in every row."""
    batch = replace(
        neutral_sampling(rows), temperature=np.full(rows, 0.7, np.float32), top_p=np.full(rows, 0.95, np.float32)
    )
    hidden, head = bench.normal(rows, shape.hidden), bench.normal(shape.vocab, shape.hidden, scale=0.05)
    sections = {name: bench.ints(values) for name, values in sampling_sections(batch, rows).items()}
    out, needs = bench.empty(rows, int(sampling.NUM_RESULTS), dtype="int32"), general_sampling.needs_of(batch)
    buffers: list[Any] = []

    def launch(_: int) -> None:
        given = iter(list(buffers))

        def take(*shape: int, dtype: str) -> Any:
            if (buffer := next(given, None)) is None:
                buffer = bench.empty(*shape, dtype=dtype)
                buffers.append(buffer)
            return buffer

        general_sampling.sample(hidden, head, sections, out, needs, take)

    operations = 2.0 * rows * shape.vocab * shape.hidden
    return Case("lm_head+top_p", 2.0 * (shape.vocab + rows) * shape.hidden, operations, 1, launch)


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
    if SHARED_ROWS <= rows <= MOST_SEQUENCES:
        yield lambda: shared_attention_cases(bench, shape, rows)
    if rows <= MOST_SEQUENCES:
        yield lambda: iter([head_case(bench, shape, rows)])
        yield lambda: iter([truncated_head_case(bench, shape, rows)])


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
