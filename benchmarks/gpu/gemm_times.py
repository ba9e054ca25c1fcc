"""Times of every candidate for the products of a model, each checked against ours before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from choices import Candidate, Gemm, Measured, gemms_of
from cuda.bindings import runtime
from gpu_timing import Bench, check, copies_past_cache
from numpy.typing import NDArray
from products import Products
from triton.runtime.errors import OutOfResources

from zerokl.kernels.gpu import lm_head as heads
from zerokl.kernels.gpu import tiles
from zerokl.rollout.models.config import ModelConfig

MOST_HEAD_ROWS = 512
"""Rows of logits that the engine computes at once."""
_CHECKED_ROWS = 64
_TOLERANCE = 0.02


def measure(config: ModelConfig, row_counts: Sequence[int]) -> list[Measured]:
    """Every product of a dense model at every number of rows. Raises PartRefusedError where there is no cuBLASLt."""
    bench = Bench()
    products = Products(int(bench.stream), bench_empty(bench), wide_entries(config, row_counts))
    return [
        _measure(bench, products, gemm, rows)
        for gemm in gemms_of(config)
        for rows in row_counts
        if gemm.op != "head" or rows <= MOST_HEAD_ROWS
    ]


def wide_entries(config: ModelConfig, row_counts: Sequence[int]) -> int:
    """Of the largest product of gate and up."""
    return 2 * config.intermediate_size * max(row_counts)


def bench_empty(bench: Bench) -> Callable[[Sequence[int], str], Any]:
    """`Bench.empty` as `Products` takes it."""
    return lambda shape, dtype: bench.empty(*shape, dtype=dtype)


def _measure(bench: Bench, products: Products, gemm: Gemm, rows: int) -> Measured:
    weights = [bench.normal(gemm.n, gemm.k, scale=0.05) for _ in range(copies_past_cache(2 * gemm.n * gemm.k))]
    launch, out = _launcher(bench, products, gemm, rows)
    expected: NDArray[np.float32] | None = None
    seconds: dict[Candidate, float] = {}
    for candidate in products.candidates(gemm, rows):
        try:
            launch(candidate, weights[0])
            got = _first_rows(bench, out)
            seconds[candidate] = bench.seconds([partial(launch, candidate, weight) for weight in weights], repeats=5)
        except (RuntimeError, OutOfResources) as error:
            print(f"{gemm.name} {rows}: {candidate.label()} does not run: {str(error)[:80]}", flush=True)
            continue
        expected = got if expected is None else expected
        off = float(np.abs(got - expected).max() / np.abs(expected).max())
        assert off < _TOLERANCE, f"{gemm}, {rows} rows: {candidate.label()} is off by {off:.2g} of the largest value"
    return Measured(gemm, rows, seconds)


def _launcher(bench: Bench, products: Products, gemm: Gemm, rows: int) -> tuple[Callable[[Candidate, Any], None], Any]:
    """Launches a candidate with a weight; and where the result is."""
    x = bench.normal(rows, gemm.k)
    if gemm.op == "head":
        tile = tiles.choose(tiles.LM_HEAD, rows, gemm.n, "bfloat16")
        logits = bench.empty(rows, gemm.n, dtype="float32")
        maxima = bench.empty(rows, heads.num_tiles(rows, gemm.n, "bfloat16"), dtype="float32")
        return lambda candidate, weight: products.head(candidate, x, weight, logits, maxima, tile), maxima
    out = bench.empty(rows, gemm.n if gemm.op == "linear" else gemm.n // 2)
    run = products.linear if gemm.op == "linear" else products.swiglu
    return lambda candidate, weight: run(candidate, x, weight, out), out


def _first_rows(bench: Bench, tensor: Any) -> NDArray[np.float32]:
    check(runtime.cudaStreamSynchronize(bench.stream))
    values = np.asarray(tensor[: min(_CHECKED_ROWS, tensor.shape[0])].numpy())
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(values).all()
    return np.array(values, np.float32)
