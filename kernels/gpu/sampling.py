# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Triton kernels from logits to tokens and log-probabilities: the definition of docs/numerics.md, one program per row.

Decisions are on integer masses and on keys that order entries by (logit descending, id ascending). The cut of top-k and
top-p is the smallest key whose prefix is large enough; it is found by bisection over the key's 64 bits, a pass over
the row each: slow and simple.
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

_VOCAB_BLOCK = 1024  # the fixed partition of a row of logits
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
def penalty_kernel(logits_ptr, options_ptr, start_ptr, token_ptr, count_ptr, V, BLOCK: tl.constexpr):
    """Repetition, presence and frequency penalties on the tokens of the row's history, in place."""
    row = tl.program_id(0)
    repetition = option_of(options_ptr, row, REPETITION)
    presence = option_of(options_ptr, row, PRESENCE)
    frequency = option_of(options_ptr, row, FREQUENCY)
    end = tl.load(start_ptr + row + 1)
    for first in range(tl.load(start_ptr + row), end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        at = logits_ptr + row.to(tl.int64) * V + tl.load(token_ptr + j, mask=j < end, other=0)
        count = tl.load(count_ptr + j, mask=j < end, other=0)
        x = tl.load(at, mask=j < end, other=0.0)
        x = tl.where(x > 0.0, tl.div_rn(x, tl.broadcast_to(repetition, x.shape)), x * repetition)
        x = tl.where(count > 0, (x - presence) - frequency * count.to(tl.float32), x)
        tl.store(at, x, mask=j < end)


@triton.jit
def option_of(options_ptr, row, column: tl.constexpr):
    """An option of a row that is a float."""
    return tl.load(options_ptr + row * NUM_OPTIONS + column).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(row_ptr, i, V, temperature):
    x = tl.load(row_ptr + i, mask=i < V, other=float("-inf"))
    return tl.div_rn(x, tl.broadcast_to(temperature, x.shape))


@triton.jit
def _row_max(row_ptr, V, temperature, BLOCK: tl.constexpr):
    """(largest scaled logit, number of entries that are NaN or +inf)."""
    best = tl.full((), float("-inf"), tl.float32)
    broken = tl.zeros((), tl.int32)
    for start in range(0, V, BLOCK):
        x = _scaled(row_ptr, start + tl.arange(0, BLOCK), V, temperature)
        sound = x < float("inf")
        broken += tl.sum(tl.where(sound, 0, 1), axis=0)
        best = tl.maximum(best, tl.max(tl.where(sound, x, float("-inf")), axis=0))
    return best, broken


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
def _order_key(x, i):
    """Ascending keys are descending logits, then ascending ids. Adding 0 makes -0 equal to +0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    ascending = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    return ((~ascending).to(tl.uint64) << 32) | i.to(tl.uint64)


@triton.jit
def _row_sums(row_ptr, V, temperature, best, cut, least, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Over entries with key <= cut and mass >= least: (sum of e, sum of e * d, mass, count); float64, uint64, int64."""
    chunks = tl.arange(0, CHUNKS)
    totals = tl.zeros((CHUNKS,), tl.float32)
    weights = tl.zeros((CHUNKS,), tl.float32)
    mass = tl.zeros((), tl.uint64)
    count = tl.zeros((), tl.int64)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _scaled(row_ptr, i, V, temperature)
        d = x - best
        e = vexp(d)
        keep = (i < V) & (_order_key(x, i) <= cut) & (mass_of(e) >= least)
        e = tl.where(keep, e, 0.0)
        total, weighted = chunk_sums(e, d, BLOCK)
        totals = tl.where(chunks == start // BLOCK, total, totals)
        weights = tl.where(chunks == start // BLOCK, weighted, weights)
        mass += tl.sum(mass_of(e), axis=0)
        count += tl.sum(keep.to(tl.int64), axis=0)
    return join_chunks(totals, CHUNKS), join_chunks(weights, CHUNKS), mass, count


@triton.jit
def _cut_at(row_ptr, V, temperature, best, wanted_count, wanted_mass, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Smallest key whose prefix of the order has that many entries or that much mass."""
    low = tl.zeros((), tl.uint64)
    high = ~low
    zero = low
    for _ in range(64):
        middle = low + ((high - low) >> 1)
        _, _, mass, count = _row_sums(row_ptr, V, temperature, best, middle, zero, BLOCK, CHUNKS)
        enough = (count >= wanted_count) | (mass >= wanted_mass)
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit
def _draw(row_ptr, V, temperature, best, cut, least, rest, BLOCK: tl.constexpr):
    """First id, ascending, whose cumulative kept mass exceeds `rest`."""
    token = tl.full((), -1, tl.int32)
    before = tl.zeros((), tl.uint64)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _scaled(row_ptr, i, V, temperature)
        mass = mass_of(vexp(x - best))
        mass = tl.where((i < V) & (_order_key(x, i) <= cut) & (mass >= least), mass, tl.zeros_like(mass))
        over = before + tl.cumsum(mass, axis=0) > rest
        first = tl.min(tl.where(over, i, V), axis=0)
        token = tl.where((token < 0) & (first < V), first, token)
        before += tl.sum(mass, axis=0)
    return token


@triton.jit
def _first_equal(row_ptr, V, value, BLOCK: tl.constexpr):
    best = V
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + i, mask=i < V, other=float("-inf"))
        best = tl.minimum(best, tl.min(tl.where((x == value) & (i < V), i, V), axis=0))
    return best


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


@triton.jit
def _sample_at_temperature(
    row_ptr, options_ptr, row, V, temperature, best, forced, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    """(token, logprob) of a row of processed logits under its truncated distribution."""
    cut = ~tl.zeros((), tl.uint64)
    least = tl.zeros((), tl.uint64)
    unlimited = ~tl.zeros((), tl.uint64)
    top_k = tl.load(options_ptr + row * NUM_OPTIONS + TOP_K)
    top_p = option_of(options_ptr, row, TOP_P)
    if (top_k > 0) & (top_k < V):
        cut = _cut_at(row_ptr, V, temperature, best, top_k.to(tl.int64), unlimited, BLOCK, CHUNKS)
    if top_p < 1.0:
        _, _, mass, count = _row_sums(row_ptr, V, temperature, best, cut, least, BLOCK, CHUNKS)
        wanted = (top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64).to(tl.uint64)
        wanted = tl.maximum(wanted, tl.full((), 1, tl.uint64))
        cut = _cut_at(row_ptr, V, temperature, best, count + 1, wanted, BLOCK, CHUNKS)
    least = (option_of(options_ptr, row, MIN_P).to(tl.float64) * 1099511627776.0).to(tl.int64).to(tl.uint64)
    total, _, mass, _ = _row_sums(row_ptr, V, temperature, best, cut, least, BLOCK, CHUNKS)
    token = forced
    if forced < 0:
        rest = tl.umulhi(drawn_bits(options_ptr, row), mass)
        token = _draw(row_ptr, V, temperature, best, cut, least, rest, BLOCK)
    x = tl.div_rn(tl.load(row_ptr + token), temperature)
    inside = (_order_key(x, token) <= cut) & (mass_of(vexp(x - best)) >= least)
    return token, tl.where(inside, logprob_of(x, best, total), float("-inf"))


@triton.jit
def sample_kernel(logits_ptr, processed_ptr, options_ptr, out_ptr, V, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Results of a row from its logits [V] and the same after bias and penalties."""
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * V
    processed = processed_ptr + row.to(tl.int64) * V
    forced = tl.load(options_ptr + row * NUM_OPTIONS + FORCED)
    temperature = option_of(options_ptr, row, TEMPERATURE)
    positive = tl.where(temperature == 0.0, 1.0, temperature)
    everything = ~tl.zeros((), tl.uint64)
    zero = tl.zeros((), tl.uint64)
    best, broken = _row_max(logits, V, positive, BLOCK)
    total, weighted, _, _ = _row_sums(logits, V, positive, best, everything, zero, BLOCK, CHUNKS)
    processed_best, processed_broken = _row_max(processed, V, positive, BLOCK)
    valid = (broken + processed_broken == 0) & (best > float("-inf")) & (processed_best > float("-inf"))
    result = out_ptr + row * NUM_RESULTS
    if valid:
        if temperature == 0.0:
            greedy = _first_equal(processed, V, processed_best, BLOCK)
            token = tl.where(forced < 0, greedy, forced)
            logprob = tl.where(token == greedy, 0.0, float("-inf"))
        else:
            token, logprob = _sample_at_temperature(
                processed, options_ptr, row, V, positive, processed_best, forced, BLOCK, CHUNKS
            )
        chosen = tl.load(logits + token)
        policy_logprob = logprob_of(tl.div_rn(chosen, positive), best, total)
        entropy = (tl.log(total) - weighted / total).to(tl.float32)
        one = tl.full((), 1.0, tl.float32)
        raw_best, _ = _row_max(logits, V, one, BLOCK)
        raw_total, _, _, _ = _row_sums(logits, V, one, raw_best, everything, zero, BLOCK, CHUNKS)
        tl.store(result + TOKEN, token)
        tl.store(result + LOGPROB, logprob.to(tl.int32, bitcast=True))
        tl.store(result + POLICY_LOGPROB, policy_logprob.to(tl.int32, bitcast=True))
        tl.store(result + ENTROPY, entropy.to(tl.int32, bitcast=True))
        tl.store(result + RAW_LOGPROB, logprob_of(chosen, raw_best, raw_total).to(tl.int32, bitcast=True))
    else:
        tl.store(result + TOKEN, -1)
        for column in tl.static_range(1, 5):
            tl.store(result + column, 0x7FC00000)  # NaN


def copy(x: Tensor, out: Tensor, count: int) -> None:
    """The first `count` entries of x to out, of one type."""
    copy_kernel[(triton.cdiv(count, _VOCAB_BLOCK),)](x, out, count, BLOCK=_VOCAB_BLOCK)


def sample(logits: Tensor, processed: Tensor, sections: Mapping[str, Tensor], out: Tensor) -> None:
    """Results [R, NUM_RESULTS] int32 of logits [R, V] float32 under any options.

    `sections` are those of `step_arrays.lay_out`; processed [R, V] takes the logits after bias and penalties.
    """
    rows, vocab = logits.shape
    copy(logits, processed, rows * vocab)
    bias_kernel[(rows,)](
        processed, sections["bias_start"], sections["bias_token"], sections["bias_value"], vocab, BLOCK=_ENTRY_BLOCK
    )
    penalty_kernel[(rows,)](
        processed, sections["options"], sections["history_start"], sections["history_token"],
        sections["history_count"], vocab, BLOCK=_ENTRY_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    sample_kernel[(rows,)](
        logits, processed, sections["options"], out, vocab, BLOCK=_VOCAB_BLOCK,
        CHUNKS=triton.next_power_of_2(triton.cdiv(vocab, _VOCAB_BLOCK)), enable_fp_fusion=False,
    )  # fmt: skip
