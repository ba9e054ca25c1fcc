"""The bfloat16 kernels at the sizes of models, each as something to time; attention is in gpu_attention_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gpu_timing import Bench, Launch, copies_past_cache

from zerokl.kernels.experts import RouterSpec
from zerokl.kernels.gpu import experts, general_sampling, lm_head, matmul, norms, sampling
from zerokl.kernels.gpu.step_arrays import sampling_options, sampling_sections
from zerokl.kernels.gpu.tiles import Tile
from zerokl.kernels.ops import neutral_sampling


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


def launches(case: Case) -> list[Launch]:
    """One launch for each operand set."""
    return [lambda i=i: case.launch(i) for i in range(case.copies)]  # type: ignore[misc]
