# mypy: ignore-errors
# Launches of kernels, which have no types.
"""Where top-k and top-p cut a row of logits off: exact, in a few passes that all of the chip takes part in.

The cut is the smallest key of `sampling.order_key` whose prefix of the row has the count or the mass that is wanted.
Float32 tallies above BINS thresholds narrow the interval of logits that holds it, up to three times: a row whose
interval surely holds few entries skips the rounds that are left. Then entries above the interval are counted exactly
and those inside are listed, and the cut is found among these by their keys. Whatever the tallies were, the end checks
that the cut lies in the interval: a row where it does not, or whose interval holds more than CANDIDATES entries (equal
logits), is bisected as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.lm_head import CHUNK, chunks_per_program, num_chunks
from zerokl.kernels.gpu.truncation_kernels import begin_kernel, collect_kernel, cut_kernel, narrow_kernel, tally_kernel

BINS = 16
CANDIDATES = 2048
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Search:
    """Arrays of a search over R rows; `parts` programs share a row."""

    cuts: Tensor
    """[R] int64: the result, keys as their bits"""
    kept: Tensor
    """[R, 2] int64: mass and count up to the cut"""
    interval: Tensor
    """[R, 2] float32: scaled logits, the prefix down to the first is large enough, down to the second is not"""
    tallies: Tensor
    """[R, parts, BINS] float32"""
    above: Tensor
    """[R, parts, 2] int64: mass and count above the interval"""
    found: Tensor
    """[R, 2] int32: entries in the interval, whether it is narrow enough"""
    candidates: Tensor
    """[R, CANDIDATES] int64: keys of the entries in the interval, in any order"""


def parts(rows: int, vocab: int) -> int:
    """Programs that share a row."""
    return triton.cdiv(num_chunks(vocab), chunks_per_program(rows))


def begin(masses: Tensor, vocab: int, search: Search) -> None:
    """Cut nothing off; masses [R, chunks] int64 are those of the rows' logits."""
    rows, chunks = masses.shape
    begin_kernel[(rows,)](
        masses, search.cuts, search.kept, vocab, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1
    )


def cut(logits: Tensor, maxima: Tensor, options: Tensor, search: Search, *, by_mass: bool) -> None:
    """Cut rows of logits [R, V] off where top-p wants it (`by_mass`), of what is kept, or top-k.

    maxima [R, n] hold the largest of every tile of a row, options [R, NUM_OPTIONS] as in `sampling`.
    """
    (rows, vocab), tiles, chunks = logits.shape, maxima.shape[1], num_chunks(logits.shape[1])
    per_program, num_parts = chunks_per_program(rows), parts(rows, vocab)
    block = {"TILES_BLOCK": triton.next_power_of_2(tiles), "BY_MASS": by_mass, "enable_fp_fusion": False}
    walk = {**block, "CHUNK": CHUNK, "CHUNKS_PER_PROGRAM": per_program, "num_warps": 1}
    parts_block = triton.next_power_of_2(num_parts)
    for turn in range(_ROUNDS + 1):
        narrow_kernel[(rows,)](
            maxima, options, search.kept, search.interval, search.tallies, search.found, vocab, tiles, num_parts,
            PARTS_BLOCK=parts_block, BINS=BINS, CANDIDATES=CANDIDATES,
            FIRST=turn == 0, **block,
        )  # fmt: skip
        if turn < _ROUNDS:
            tally_kernel[(rows, num_parts)](
                logits, maxima, options, search.kept, search.interval, search.found, search.tallies,
                vocab, tiles, chunks, BINS=BINS, **walk,
            )  # fmt: skip
    collect_kernel[(rows, num_parts)](
        logits, maxima, options, search.kept, search.interval, search.above, search.found, search.candidates, vocab,
        tiles, chunks, CANDIDATES=CANDIDATES, **walk,
    )  # fmt: skip
    cut_kernel[(rows,)](
        logits, maxima, options, search.above, search.found, search.candidates, search.cuts, search.kept, vocab,
        tiles, num_parts, PARTS_BLOCK=parts_block, CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(chunks),
        CANDIDATES=CANDIDATES, num_warps=8, **block,
    )  # fmt: skip
