# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""The kernels of `truncation`, which says how they play together. Rows that nothing cuts off are left alone."""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu import sampling
from zerokl.kernels.gpu.elementwise import vexp_to_one
from zerokl.kernels.gpu.lm_head import row_max, row_temperature
from zerokl.kernels.gpu.sampling import cut_at, mass_of, option_of, order_key, share_of

_LEAST = tl.constexpr(-28.0)  # below the largest logit by more: no mass
_SLACK = tl.constexpr(1e-4)  # relative, far above the error of a tally
_NUDGE = tl.constexpr(2.0**-21)
_LOG2_E = tl.constexpr(1.4426950408889634)
_MASS_ONE = tl.constexpr(1099511627776.0)


@triton.jit
def _wants(options_ptr, kept_ptr, row, V, BY_MASS: tl.constexpr):
    """(whether the row is cut by this rule, mass or count wanted)."""
    active = option_of(options_ptr, row, sampling.TEMPERATURE) != 0.0
    if BY_MASS:
        top_p = option_of(options_ptr, row, sampling.TOP_P)
        active = active & (top_p < 1.0)
        wanted = share_of(top_p, tl.load(kept_ptr + row * 2).to(tl.uint64))
    else:
        top_k = tl.load(options_ptr + row * sampling.NUM_OPTIONS + sampling.TOP_K)
        active = active & (top_k > 0) & (top_k < V)
        wanted = top_k.to(tl.uint64)
    return active, wanted


@triton.jit
def _threshold(interval_ptr, row, j, BINS: tl.constexpr):
    """Thresholds number j of a row's interval, descending: the first is its upper end, the last its lower."""
    low = tl.load(interval_ptr + row * 2)
    high = tl.load(interval_ptr + row * 2 + 1)
    bounded = (low > float("-inf")) & (high < float("inf"))
    top = tl.where(high < float("inf"), high, low)
    width = tl.where(bounded, top - low, 0.0)
    threshold = top - width * (j.to(tl.float32) / (BINS - 1))
    return tl.where(j == BINS - 1, tl.where(bounded, low, threshold), threshold)


@triton.jit
def _scaled_chunk(row_ptr, chunk, V, temperature, CHUNK: tl.constexpr):
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + i, mask=i < V, other=float("-inf"))
    if temperature != 1.0:
        x = tl.div_rn(x, tl.broadcast_to(temperature, x.shape))
    return i, x


@triton.jit
def begin_kernel(masses_ptr, cuts_ptr, kept_ptr, V, NUM_CHUNKS, CHUNKS: tl.constexpr):
    """Nothing is cut off: `kept` is the row's mass and count."""
    row = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    masses = tl.load(masses_ptr + row * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=0)
    tl.store(cuts_ptr + row, tl.full((), -1, tl.int64))
    tl.store(kept_ptr + row * 2, tl.sum(masses, axis=0))
    tl.store(kept_ptr + row * 2 + 1, V.to(tl.int64))


@triton.jit
def narrow_kernel(
    maxima_ptr, options_ptr, kept_ptr, interval_ptr, tallies_ptr, found_ptr, V, NUM_TILES, NUM_PARTS,
    TILES_BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr, BINS: tl.constexpr, CANDIDATES: tl.constexpr,
    FIRST: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """The interval between the neighbouring thresholds that hold the cut; FIRST: all logits that have mass."""
    row = tl.program_id(0)
    active, wanted = _wants(options_ptr, kept_ptr, row, V, BY_MASS)
    if active:
        temperature = row_temperature(options_ptr, row)
        best = tl.div_rn(row_max(maxima_ptr, row, NUM_TILES, TILES_BLOCK), temperature)
        if FIRST:
            tl.store(interval_ptr + row * 2, best + _LEAST)
            tl.store(interval_ptr + row * 2 + 1, best)
            tl.store(found_ptr + row * 2, 0)
            tl.store(found_ptr + row * 2 + 1, 0)
        elif tl.load(found_ptr + row * 2 + 1) == 0:
            j = tl.arange(0, BINS)
            part = tl.arange(0, PARTS_BLOCK)
            at = (row * NUM_PARTS + part)[:, None] * BINS + j[None, :]
            tally = tl.sum(tl.load(tallies_ptr + at, mask=(part < NUM_PARTS)[:, None], other=0.0), axis=0)
            target = wanted.to(tl.float32)
            slack = 0.0
            if BY_MASS:
                target = target / _MASS_ONE
                slack = _SLACK
            threshold = _threshold(interval_ptr, row, j, BINS)
            enough = tally >= target * (1.0 + slack)
            short = tally < target * (1.0 - slack)
            low = tl.max(tl.where(enough, threshold, float("-inf")), axis=0)
            high = tl.min(tl.where(short, threshold, float("inf")), axis=0)
            inside = tl.min(tl.where(enough, tally, float("inf")), axis=0)
            inside -= tl.max(tl.where(short, tally, 0.0), axis=0)
            if BY_MASS:
                inside = inside / tl.exp2((low - best) * _LOG2_E)  # none of them has less
            tl.debug_barrier()
            tl.store(interval_ptr + row * 2, low)
            tl.store(interval_ptr + row * 2 + 1, high)
            tl.store(found_ptr + row * 2 + 1, (inside <= CANDIDATES // 2).to(tl.int32))


@triton.jit
def tally_kernel(
    logits_ptr, maxima_ptr, options_ptr, kept_ptr, interval_ptr, found_ptr, tallies_ptr, V, NUM_TILES, NUM_CHUNKS,
    TILES_BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS_PER_PROGRAM: tl.constexpr, BINS: tl.constexpr,
    BY_MASS: tl.constexpr,
):  # fmt: skip
    """tallies[row, part, j]: mass (of 1 for the likeliest) or count of the entries from threshold j up, about.

    Thresholds are put at logits that were not scaled, a little low, so that an entry at a threshold counts.
    """
    row = tl.program_id(0)
    active, _ = _wants(options_ptr, kept_ptr, row, V, BY_MASS)
    if active & (tl.load(found_ptr + row * 2 + 1) == 0):
        temperature = row_temperature(options_ptr, row)
        largest = row_max(maxima_ptr, row, NUM_TILES, TILES_BLOCK)
        factor = _LOG2_E / temperature
        j = tl.arange(0, BINS)
        tally = tl.zeros((BINS,), tl.float32)
        first = tl.program_id(1) * CHUNKS_PER_PROGRAM
        for chunk in range(first, tl.minimum(first + CHUNKS_PER_PROGRAM, NUM_CHUNKS)):
            i = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits_ptr + row.to(tl.int64) * V + i, mask=i < V, other=float("-inf"))
            weight = tl.where(i < V, 1.0, 0.0)
            if BY_MASS:
                weight = tl.exp2((x - largest) * factor)
            for number in tl.static_range(BINS):
                threshold = _threshold(interval_ptr, row, tl.full((), number, tl.int32), BINS) * temperature
                threshold -= tl.abs(threshold) * _NUDGE
                tally += tl.where(j == number, tl.sum(tl.where(x >= threshold, weight, 0.0), axis=0), 0.0)
        tl.store(tallies_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * BINS + j, tally)


@triton.jit
def collect_kernel(
    logits_ptr, maxima_ptr, options_ptr, kept_ptr, interval_ptr, above_ptr, found_ptr, candidates_ptr, V, NUM_TILES,
    NUM_CHUNKS, TILES_BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS_PER_PROGRAM: tl.constexpr,
    CANDIDATES: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """Exact mass and count above the interval, and the keys of the entries in it, as many as there is room for."""
    row = tl.program_id(0)
    active, _ = _wants(options_ptr, kept_ptr, row, V, BY_MASS)
    if active:
        temperature = row_temperature(options_ptr, row)
        best = tl.div_rn(row_max(maxima_ptr, row, NUM_TILES, TILES_BLOCK), temperature)
        low = tl.load(interval_ptr + row * 2)
        high = tl.load(interval_ptr + row * 2 + 1)
        mass = tl.zeros((), tl.int64)
        count = tl.zeros((), tl.int64)
        first = tl.program_id(1) * CHUNKS_PER_PROGRAM
        for chunk in range(first, tl.minimum(first + CHUNKS_PER_PROGRAM, NUM_CHUNKS)):
            i, x = _scaled_chunk(logits_ptr + row.to(tl.int64) * V, chunk, V, temperature, CHUNK)
            above = (x >= high) & (i < V)
            mass += tl.sum(mass_of(tl.where(above, vexp_to_one(x - best), 0.0)).to(tl.int64), axis=0)
            count += tl.sum(above.to(tl.int32), axis=0).to(tl.int64)
            inside = (x >= low) & (x < high) & (i < V)
            number = tl.sum(inside.to(tl.int32), axis=0)
            if number > 0:
                at = tl.atomic_add(found_ptr + row * 2, number) + tl.cumsum(inside.to(tl.int32), axis=0) - 1
                keys = order_key(x, i).to(tl.int64, bitcast=True)
                tl.store(candidates_ptr + row.to(tl.int64) * CANDIDATES + at, keys, mask=inside & (at < CANDIDATES))
        at = (row * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(above_ptr + at, mass)
        tl.store(above_ptr + at + 1, count)


@triton.jit
def _logit_of(key):
    """The scaled logit of an order key."""
    ascending = ~(key >> 32).to(tl.uint32)
    bits = tl.where(ascending >> 31 != 0, ascending & 0x7FFFFFFF, ~ascending)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def cut_kernel(
    logits_ptr, maxima_ptr, options_ptr, above_ptr, found_ptr, candidates_ptr, cuts_ptr, kept_ptr, V, NUM_TILES,
    NUM_PARTS, TILES_BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """The cut of a row, and what is kept up to it."""
    row = tl.program_id(0)
    active, wanted = _wants(options_ptr, kept_ptr, row, V, BY_MASS)
    if active:
        temperature = row_temperature(options_ptr, row)
        best = tl.div_rn(row_max(maxima_ptr, row, NUM_TILES, TILES_BLOCK), temperature)
        part = tl.arange(0, PARTS_BLOCK)
        at = (row * NUM_PARTS + part) * 2
        mass_above = tl.sum(tl.load(above_ptr + at, mask=part < NUM_PARTS, other=0), axis=0).to(tl.uint64)
        count_above = tl.sum(tl.load(above_ptr + at + 1, mask=part < NUM_PARTS, other=0), axis=0).to(tl.uint64)
        found = tl.load(found_ptr + row * 2)
        j = tl.arange(0, CANDIDATES)
        here = j < found
        keys = tl.load(candidates_ptr + row.to(tl.int64) * CANDIDATES + j, mask=here, other=-1).to(tl.uint64)
        masses = mass_of(vexp_to_one(_logit_of(keys) - best))
        masses = tl.where(here, masses, tl.zeros_like(masses))
        ones = here.to(tl.uint64)
        if BY_MASS:
            weights = masses
            lacking = wanted - mass_above
            short = mass_above < wanted
        else:
            weights = ones
            lacking = wanted - count_above
            short = count_above < wanted
        if short & (found <= CANDIDATES) & (tl.sum(weights, axis=0) >= lacking):
            low = tl.zeros((), tl.uint64)
            high = ~low
            for _ in range(64):
                middle = low + ((high - low) >> 1)
                enough = tl.sum(tl.where(keys <= middle, weights, tl.zeros_like(weights)), axis=0) >= lacking
                high = tl.where(enough, middle, high)
                low = tl.where(enough, low, middle + 1)
            cut = high
            kept = keys <= cut
            mass = mass_above + tl.sum(tl.where(kept, masses, tl.zeros_like(masses)), axis=0)
            count = count_above + tl.sum(tl.where(kept, ones, tl.zeros_like(ones)), axis=0)
        else:
            row_ptr = logits_ptr + row.to(tl.int64) * V
            wanted_count = wanted.to(tl.int64)
            wanted_mass = ~tl.zeros((), tl.uint64)
            if BY_MASS:
                wanted_count = V.to(tl.int64) + 1
                wanted_mass = wanted
            cut, mass, entries = cut_at(row_ptr, V, temperature, best, wanted_count, wanted_mass, CHUNK, CHUNKS)
            count = entries.to(tl.uint64)
        tl.store(cuts_ptr + row, cut.to(tl.int64))
        tl.store(kept_ptr + row * 2, mass.to(tl.int64))
        tl.store(kept_ptr + row * 2 + 1, count.to(tl.int64))
