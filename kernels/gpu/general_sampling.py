# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Sampling under any options on the whole chip: bias, penalties, top-k, top-p, min-p, raw log-probabilities.

Every option that no row has costs nothing: `needs_of` says which there are, and a recorded step serves steps that need
the same. Results have the bits of `lm_head.settle` where that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from zerokl.kernels.gpu import lm_head, matmul, sampling, tiles, truncation
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.lm_head import CHUNK
from zerokl.kernels.ops import SamplingBatch

Take = Callable[..., Tensor]
"""(*shape, dtype=name) -> an uninitialised buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What at least one row of a batch asks for."""

    processed: bool
    """Bias or penalties."""
    top_k: bool
    top_p: bool
    min_p: bool
    raw: bool
    """Log-probabilities at temperature 1 of rows with another."""


def needs_of(batch: SamplingBatch) -> Needs:
    """The needs of a batch."""
    warm = batch.temperature != 0
    penalties = (batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0)
    return Needs(
        processed=len(batch.bias_token) > 0 or bool(np.any(penalties)),
        top_k=bool(np.any(warm & (batch.top_k > 0))),
        top_p=bool(np.any(warm & (batch.top_p < 1))),
        min_p=bool(np.any(warm & (batch.min_p > 0))),
        raw=batch.want_raw and bool(np.any(warm & (batch.temperature != 1))),
    )


@triton.jit
def chunk_max_kernel(x_ptr, max_ptr, V, CHUNK: tl.constexpr):
    """The largest entry of each chunk of a row."""
    row = tl.program_id(0)
    i = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + row.to(tl.int64) * V + i, mask=i < V, other=float("-inf"))
    tl.store(max_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.max(x, axis=0))


def sample(hidden: Tensor, head: Tensor, sections: Mapping[str, Tensor], out: Tensor, needs: Needs, take: Take) -> None:
    """Results [R, NUM_RESULTS] int32 of hidden [R, E] under head [V, E], without copies to the host.

    `sections` are those of `step_arrays.lay_out`; `take` gives buffers that nothing else of the step writes.
    """
    rows, vocab = hidden.shape[0], head.shape[0]
    options = sections["options"]
    tile = tiles.choose(tiles.LM_HEAD, rows, vocab, matmul.dtype_of(hidden))
    logits = take(rows, vocab, dtype="float32")
    tile_max = take(rows, triton.cdiv(vocab, tile.BLOCK_N), dtype="float32")
    matmul.linear_with_tile_max(hidden, head, logits, tile_max, tile=tile)
    sums, masses = _sums(logits, tile_max, options, take)
    processed, maxima, width, kept_sums = logits, tile_max, tile.BLOCK_N, sums
    if needs.processed:
        processed, width = take(rows, vocab, dtype="float32"), CHUNK
        maxima = take(rows, lm_head.num_chunks(vocab), dtype="float32")
        sampling.copy(logits, processed, rows * vocab)
        sampling.process(processed, sections)
        chunk_max_kernel[tuple(maxima.shape)](processed, maxima, vocab, CHUNK=CHUNK, num_warps=1)
        kept_sums, masses = _sums(processed, maxima, options, take)
    search = _search(rows, vocab, take)
    truncation.begin(masses, vocab, search)
    if needs.top_k:
        truncation.cut(processed, maxima, options, search, by_mass=False)
    if needs.top_p:
        truncation.cut(processed, maxima, options, search, by_mass=True)
    if needs.top_k or needs.top_p or needs.min_p:
        kept_sums, masses = _sums(processed, maxima, options, take, cuts=search.cuts)
    raw_sums = _sums(logits, tile_max, options, take, at_one=True)[0] if needs.raw else sums
    lm_head.settle_kernel[(rows,)](
        logits, tile_max, sums, processed, maxima, kept_sums, masses, raw_sums, options, search.cuts, out, vocab,
        tile_max.shape[1], maxima.shape[1], lm_head.num_chunks(vocab),
        TILES_BLOCK=triton.next_power_of_2(tile_max.shape[1]),
        PROCESSED_TILES_BLOCK=triton.next_power_of_2(maxima.shape[1]), PROCESSED_TILE_N=width, CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(lm_head.num_chunks(vocab)), GENERAL=True, enable_fp_fusion=False,
    )  # fmt: skip


def _sums(logits, maxima, options, take, **which):
    rows, chunks = logits.shape[0], lm_head.num_chunks(logits.shape[1])
    sums, masses = take(rows, chunks, 2, dtype="float32"), take(rows, chunks, dtype="int64")
    lm_head.sum_chunks(logits, maxima, options, sums, masses, **which)
    return sums, masses


def _search(rows: int, vocab: int, take: Take) -> truncation.Search:
    parts = truncation.parts(rows, vocab)
    return truncation.Search(
        cuts=take(rows, dtype="int64"), kept=take(rows, 2, dtype="int64"), interval=take(rows, 2, dtype="float32"),
        tallies=take(rows, parts, truncation.BINS, dtype="float32"), above=take(rows, parts, 2, dtype="int64"),
        found=take(rows, 2, dtype="int32"), candidates=take(rows, truncation.CANDIDATES, dtype="int64"),
    )  # fmt: skip
