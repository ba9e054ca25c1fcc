# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""The parts of sampling that docs/numerics.md defines: bias, penalties, integer masses, order keys, chunk sums, draws.

Decisions are on integer masses and on keys that order entries by (logit descending, id ascending). The cut of top-k and
top-p is the smallest key whose prefix is large enough. `cut_at` finds it by bisection over the key's 64 bits, a pass
over the row each: slow and simple; `truncation` is the fast way.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from zerokl.kernels.gpu.elementwise import Tensor, vexp
from zerokl.kernels.gpu.reductions import fold_sum

# Columns of the options array, [R, NUM_OPTIONS] int32; floats by their bits.
TEMPERATURE = tl.constexpr(0)
TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(3)
REPETITION = tl.constexpr(4)
PRESENCE = tl.constexpr(5)
FREQUENCY = tl.constexpr(6)
SEED_LOW = tl.constexpr(7)
SEED_HIGH = tl.constexpr(8)
SAMPLE_INDEX = tl.constexpr(9)
POSITION = tl.constexpr(10)
FORCED = tl.constexpr(11)
NUM_OPTIONS = tl.constexpr(16)

# Columns of the result array, [R, NUM_RESULTS] int32; floats by their bits.
TOKEN = tl.constexpr(0)
LOGPROB = tl.constexpr(1)
POLICY_LOGPROB = tl.constexpr(2)
ENTROPY = tl.constexpr(3)
RAW_LOGPROB = tl.constexpr(4)
NUM_RESULTS = tl.constexpr(8)

VOCAB_BLOCK = 1024  # the fixed partition of a row of logits
_ENTRY_BLOCK = 64


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = x, n entries of one type."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def bias_kernel(logits_ptr, start_ptr, token_ptr, value_ptr, V, BLOCK: tl.constexpr):
    """logits[row, token] += value for the row's entries, in place."""
    row = tl.program_id(0)
    end = tl.load(start_ptr + row + 1)
    for first in range(tl.load(start_ptr + row), end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        at = logits_ptr + row.to(tl.int64) * V + tl.load(token_ptr + j, mask=j < end, other=0)
        value = tl.load(value_ptr + j, mask=j < end, other=0).to(tl.float32, bitcast=True)
        tl.store(at, tl.load(at, mask=j < end) + value, mask=j < end)


@triton.jit
def drawn_kernel(start_ptr, token_ptr, count_ptr, results_ptr, BLOCK: tl.constexpr):
    """Count the token that a row of the last results has drawn, where the row's history ends with a place for it.

    Such an entry has token -1 and count -1 - r. It becomes the token's own unless the history has one: then that one
    counts it, and the token stays -1. Counts below 0 mean 1.
    """
    row = tl.program_id(0)
    first = tl.load(start_ptr + row)
    last = tl.load(start_ptr + row + 1) - 1
    count = tl.load(count_ptr + last, mask=last >= first, other=0)
    if count < 0:
        drawn = tl.load(results_ptr + (-1 - count) * NUM_RESULTS + TOKEN)
        num_known = tl.zeros((), tl.int32)
        for begin in range(first, last, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            known = (tl.load(token_ptr + j, mask=j < last, other=-1) == drawn) & (j < last)
            tl.store(count_ptr + j, tl.load(count_ptr + j, mask=known, other=0) + 1, mask=known)
            num_known += tl.sum(known.to(tl.int32), axis=0)
        tl.store(token_ptr + last, tl.where(num_known > 0, -1, drawn))


@triton.jit
def penalty_kernel(logits_ptr, options_ptr, start_ptr, token_ptr, count_ptr, V, BLOCK: tl.constexpr):
    """Repetition, presence and frequency penalties on the tokens of the row's history, in place.

    Entries whose token is -1 are none; a count below 0 is 1 (`drawn_kernel`).
    """
    row = tl.program_id(0)
    repetition = option_of(options_ptr, row, REPETITION)
    presence = option_of(options_ptr, row, PRESENCE)
    frequency = option_of(options_ptr, row, FREQUENCY)
    end = tl.load(start_ptr + row + 1)
    for first in range(tl.load(start_ptr + row), end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        token = tl.load(token_ptr + j, mask=j < end, other=-1)
        some = token >= 0
        at = logits_ptr + row.to(tl.int64) * V + token
        count = tl.load(count_ptr + j, mask=some, other=0)
        count = tl.where(count < 0, 1, count)
        x = tl.load(at, mask=some, other=0.0)
        x = tl.where(x > 0.0, tl.div_rn(x, tl.broadcast_to(repetition, x.shape)), x * repetition)
        x = tl.where(count > 0, (x - presence) - frequency * count.to(tl.float32), x)
        tl.store(at, x, mask=some)


@triton.jit
def option_of(options_ptr, row, column: tl.constexpr):
    """An option of a row that is a float."""
    return tl.load(options_ptr + row * NUM_OPTIONS + column).to(tl.float32, bitcast=True)


@triton.jit
def least_mass(options_ptr, row):
    """floor(min_p * 2^40) of a row."""
    return (option_of(options_ptr, row, MIN_P).to(tl.float64) * 1099511627776.0).to(tl.int64).to(tl.uint64)


@triton.jit
def share_of(top_p, mass):
    """floor(top_p * mass), at least 1."""
    wanted = (top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64).to(tl.uint64)
    return tl.maximum(wanted, tl.full((), 1, tl.uint64))


@triton.jit
def scaled(row_ptr, i, V, temperature):
    """Entries i of a row over its temperature, -inf past its end."""
    x = tl.load(row_ptr + i, mask=i < V, other=float("-inf"))
    return tl.div_rn(x, tl.broadcast_to(temperature, x.shape))


@triton.jit
def mass_of(e):
    """floor(e * 2^40), which float32 holds exactly before rounding down."""
    return (e * 1099511627776.0).to(tl.int64).to(tl.uint64)


@triton.jit
def chunk_sums(e, d, BLOCK: tl.constexpr):
    """(sum of e, sum of e * d) of a chunk of a row of logits, float32, folded in halves."""
    return fold_sum(e, BLOCK), fold_sum(e * tl.maximum(d, -88.0), BLOCK)


@triton.jit
def join_chunks(sums, CHUNKS: tl.constexpr):
    """A row's sum in float64 from those of its chunks, padded with zeros to a power of two and folded in halves."""
    return fold_sum(sums.to(tl.float64), CHUNKS)


@triton.jit
def order_key(x, i):
    """Ascending keys are descending logits, then ascending ids. Adding 0 makes -0 equal to +0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    ascending = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    return ((~ascending).to(tl.uint64) << 32) | i.to(tl.uint64)


@triton.jit
def row_sums(row_ptr, V, temperature, best, cut, least, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Over entries with key <= cut and mass >= least: (sum of e, sum of e * d, mass, count); float64, uint64, int64."""
    chunks = tl.arange(0, CHUNKS)
    totals = tl.zeros((CHUNKS,), tl.float32)
    weights = tl.zeros((CHUNKS,), tl.float32)
    mass = tl.zeros((), tl.uint64)
    count = tl.zeros((), tl.int64)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = scaled(row_ptr, i, V, temperature)
        d = x - best
        e = vexp(d)
        keep = (i < V) & (order_key(x, i) <= cut) & (mass_of(e) >= least)
        e = tl.where(keep, e, 0.0)
        total, weighted = chunk_sums(e, d, BLOCK)
        totals = tl.where(chunks == start // BLOCK, total, totals)
        weights = tl.where(chunks == start // BLOCK, weighted, weights)
        mass += tl.sum(mass_of(e), axis=0)
        count += tl.sum(keep.to(tl.int64), axis=0)
    return join_chunks(totals, CHUNKS), join_chunks(weights, CHUNKS), mass, count


@triton.jit
def cut_at(row_ptr, V, temperature, best, wanted_count, wanted_mass, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """(smallest key whose prefix of the order has that many entries or that much mass, mass, count of the prefix)."""
    low = tl.zeros((), tl.uint64)
    high = ~low
    zero = low
    for _ in range(64):
        middle = low + ((high - low) >> 1)
        _, _, mass, count = row_sums(row_ptr, V, temperature, best, middle, zero, BLOCK, CHUNKS)
        enough = (count >= wanted_count) | (mass >= wanted_mass)
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    _, _, mass, count = row_sums(row_ptr, V, temperature, best, high, zero, BLOCK, CHUNKS)
    return high, mass, count


@triton.jit
def logprob_of(x, best, total):
    """x - best - log(total) in float64, rounded once."""
    return ((x - best).to(tl.float64) - tl.log(total)).to(tl.float32)


@triton.jit
def drawn_bits(options_ptr, row):
    """64 random bits of the row: Philox4x32-10 with the key seed and the counter (position, sample index, 0, 0)."""
    option = options_ptr + row * NUM_OPTIONS
    low = tl.load(option + SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(option + SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = tl.zeros((), tl.uint32)
    position = tl.load(option + POSITION).to(tl.uint32, bitcast=True)
    sample_index = tl.load(option + SAMPLE_INDEX).to(tl.uint32, bitcast=True)
    first, second, _, _ = tl.philox(low | (high << 32), position, sample_index, zero, zero)
    return first.to(tl.uint64) | (second.to(tl.uint64) << 32)


def copy(x: Tensor, out: Tensor, count: int) -> None:
    """The first `count` entries of x to out, of one type."""
    copy_kernel[(triton.cdiv(count, VOCAB_BLOCK),)](x, out, count, BLOCK=VOCAB_BLOCK)


def count_drawn(sections: Mapping[str, Tensor], results: Tensor) -> None:
    """Complete the histories of a step by what the step before has drawn: `results` [R, NUM_RESULTS] int32 are its."""
    rows = sections["history_start"].shape[0] - 1
    drawn_kernel[(rows,)](
        sections["history_start"], sections["history_token"], sections["history_count"], results, BLOCK=_ENTRY_BLOCK
    )


def process(processed: Tensor, sections: Mapping[str, Tensor]) -> None:
    """Logit bias, then penalties, on logits [R, V] float32, in place; `sections` are those of `step_arrays.lay_out`."""
    rows, vocab = processed.shape
    bias_kernel[(rows,)](
        processed, sections["bias_start"], sections["bias_token"], sections["bias_value"], vocab, BLOCK=_ENTRY_BLOCK
    )
    penalty_kernel[(rows,)](
        processed, sections["options"], sections["history_start"], sections["history_token"],
        sections["history_count"], vocab, BLOCK=_ENTRY_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
