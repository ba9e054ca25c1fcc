# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""LM head, draw and log-probabilities for rows without penalties or truncation: logits stay on the device.

The matrix product writes float32 logits and the largest of every tile; one pass over the logits gives the sums of each
chunk of CHUNK entries; then a row is settled from its chunk sums and the one chunk that holds its token. Sums and
masses are those of docs/numerics.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu import matmul, sampling, tiles
from zerokl.kernels.gpu.elementwise import Tensor, vexp_to_one
from zerokl.kernels.gpu.sampling import (
    chunk_sums,
    drawn_bits,
    join_chunks,
    least_mass,
    logprob_of,
    mass_of,
    option_of,
    order_key,
)
from zerokl.kernels.gpu.tiles import Tile
from zerokl.kernels.ops import SamplingBatch

CHUNK = 1024
_MOST_CHUNKS_PER_PROGRAM = 8


@triton.jit
def row_temperature(options_ptr, row):
    """The temperature of a row's distribution: 1 where the likeliest is taken."""
    given = option_of(options_ptr, row, sampling.TEMPERATURE)
    return tl.where(given == 0.0, 1.0, given)


@triton.jit
def row_max(tile_max_ptr, row, NUM_TILES, TILES_BLOCK: tl.constexpr):
    """The largest entry of a row from the largest of its tiles."""
    i = tl.arange(0, TILES_BLOCK)
    tile_max_ptr += row.to(tl.int64) * NUM_TILES
    return tl.max(tl.load(tile_max_ptr + i, mask=i < NUM_TILES, other=float("-inf")), axis=0)


@triton.jit
def chunk_sums_kernel(
    logits_ptr, tile_max_ptr, options_ptr, cuts_ptr, sums_ptr, masses_ptr, V, NUM_TILES, NUM_CHUNKS,
    TILES_BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS_PER_PROGRAM: tl.constexpr,
    TRUNCATED: tl.constexpr, AT_ONE: tl.constexpr,
):  # fmt: skip
    """sums [R, chunks, 2] float32: sum of e and of e * d; masses [R, chunks] int64. Some chunks of a row a program.

    TRUNCATED counts the entries up to the row's cut (`truncation`) that reach min-p alone; AT_ONE is at temperature 1.
    """
    row = tl.program_id(0)
    temperature = row_temperature(options_ptr, row)
    if AT_ONE:
        temperature = tl.full((), 1.0, tl.float32)
    best = tl.div_rn(row_max(tile_max_ptr, row, NUM_TILES, TILES_BLOCK), temperature)
    if TRUNCATED:
        cut = tl.load(cuts_ptr + row).to(tl.uint64)
        least = least_mass(options_ptr, row)
    first = tl.program_id(1) * CHUNKS_PER_PROGRAM
    for chunk in range(first, tl.minimum(first + CHUNKS_PER_PROGRAM, NUM_CHUNKS)):
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row.to(tl.int64) * V + i, mask=i < V, other=float("-inf"))
        if temperature != 1.0:
            x = tl.div_rn(x, tl.broadcast_to(temperature, x.shape))
        d = x - best
        e = vexp_to_one(d)
        if TRUNCATED:
            e = tl.where((i < V) & (order_key(x, i) <= cut) & (mass_of(e) >= least), e, 0.0)
        total, weighted = chunk_sums(e, d, CHUNK)
        at = row * NUM_CHUNKS + chunk
        tl.store(sums_ptr + at * 2, total)
        tl.store(sums_ptr + at * 2 + 1, weighted)
        tl.store(masses_ptr + at, tl.sum(mass_of(e), axis=0))


@triton.jit
def chunk_of(masses, chunks, wanted):
    """(chunk in which the cumulative mass first exceeds `wanted`, mass before it)."""
    below = tl.cumsum(masses, axis=0) <= wanted
    number = tl.sum(below.to(tl.int32), axis=0)
    return number, tl.sum(tl.where(chunks < number, masses, tl.zeros_like(masses)), axis=0)


@triton.jit
def _first_largest(logits_ptr, maxima_ptr, row, largest, V, NUM_TILES, TILES_BLOCK: tl.constexpr, TILE_N: tl.constexpr):
    """The lowest id among the entries of a row that equal its largest, found by the maxima of its tiles."""
    i = tl.arange(0, TILES_BLOCK)
    maxima = tl.load(maxima_ptr + row.to(tl.int64) * NUM_TILES + i, mask=i < NUM_TILES, other=float("-inf"))
    tile = tl.min(tl.where(maxima == largest, i, NUM_TILES), axis=0)
    i = tile * TILE_N + tl.arange(0, TILE_N)
    x = tl.load(logits_ptr + i, mask=i < V, other=float("-inf"))
    return tl.min(tl.where((x == largest) & (i < V), i, V), axis=0)


@triton.jit
def settle_kernel(
    logits_ptr, maxima_ptr, sums_ptr, processed_ptr, processed_maxima_ptr, kept_sums_ptr, masses_ptr, raw_sums_ptr,
    options_ptr, cuts_ptr, out_ptr, V, NUM_TILES, NUM_PROCESSED_TILES, NUM_CHUNKS,
    TILES_BLOCK: tl.constexpr, PROCESSED_TILES_BLOCK: tl.constexpr, PROCESSED_TILE_N: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    """Token, log-probabilities and entropy of a row, as columns of `sampling`.

    Policy columns come from logits and sums, the draw from processed logits and the masses kept. Without GENERAL
    these are the same, nothing is cut off, and the raw log-probability is the policy's.
    """
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * V
    processed = processed_ptr + row.to(tl.int64) * V
    forced = tl.load(options_ptr + row * sampling.NUM_OPTIONS + sampling.FORCED)
    greedy = option_of(options_ptr, row, sampling.TEMPERATURE) == 0.0
    temperature = row_temperature(options_ptr, row)
    largest = row_max(maxima_ptr, row, NUM_TILES, TILES_BLOCK)
    best = tl.div_rn(largest, temperature)
    chunks = tl.arange(0, CHUNKS)
    at = row * NUM_CHUNKS + chunks
    here = chunks < NUM_CHUNKS
    total = join_chunks(tl.load(sums_ptr + at * 2, mask=here, other=0.0), CHUNKS)
    weighted = join_chunks(tl.load(sums_ptr + at * 2 + 1, mask=here, other=0.0), CHUNKS)
    valid = (total == total) & (best < float("inf")) & (best > float("-inf"))
    processed_largest = largest
    processed_best = best
    kept = total
    if GENERAL:
        processed_largest = row_max(processed_maxima_ptr, row, NUM_PROCESSED_TILES, PROCESSED_TILES_BLOCK)
        processed_best = tl.div_rn(processed_largest, temperature)
        kept = join_chunks(tl.load(kept_sums_ptr + at * 2, mask=here, other=0.0), CHUNKS)
        cut = tl.load(cuts_ptr + row).to(tl.uint64)
        least = least_mass(options_ptr, row)
        valid = valid & (kept == kept) & (processed_best < float("inf")) & (processed_best > float("-inf"))
    result = out_ptr + row * sampling.NUM_RESULTS
    if valid:
        token = forced
        likeliest = forced
        if greedy:
            likeliest = _first_largest(
                processed, processed_maxima_ptr, row, processed_largest, V, NUM_PROCESSED_TILES,
                PROCESSED_TILES_BLOCK, PROCESSED_TILE_N,
            )  # fmt: skip
            if forced < 0:
                token = likeliest
        if (not greedy) & (forced < 0):
            masses = tl.load(masses_ptr + at, mask=here, other=0).to(tl.uint64)
            wanted = tl.umulhi(drawn_bits(options_ptr, row), tl.sum(masses, axis=0))
            chunk, before = chunk_of(masses, chunks, wanted)
            i = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(processed + i, mask=i < V, other=float("-inf"))
            x = tl.div_rn(x, tl.broadcast_to(temperature, x.shape))
            mass = mass_of(vexp_to_one(x - processed_best))
            if GENERAL:
                mass = tl.where((order_key(x, i) <= cut) & (mass >= least), mass, tl.zeros_like(mass))
            token = tl.min(tl.where(before + tl.cumsum(mass, axis=0) > wanted, i, V), axis=0)
        chosen = tl.load(logits + token)
        policy = logprob_of(tl.div_rn(chosen, temperature), best, total)
        logprob = policy
        raw = policy
        if GENERAL:
            x = tl.div_rn(tl.load(processed + token), temperature)
            inside = (order_key(x, token) <= cut) & (mass_of(vexp_to_one(x - processed_best)) >= least)
            logprob = tl.where(inside, logprob_of(x, processed_best, kept), float("-inf"))
            raw_total = join_chunks(tl.load(raw_sums_ptr + at * 2, mask=here, other=0.0), CHUNKS)
            raw = logprob_of(chosen, largest, raw_total)
        if greedy:
            logprob = tl.where(token == likeliest, 0.0, float("-inf"))
        entropy = (tl.log(total) - weighted / total).to(tl.float32)
        tl.store(result + sampling.TOKEN, token)
        tl.store(result + sampling.LOGPROB, logprob.to(tl.int32, bitcast=True))
        tl.store(result + sampling.POLICY_LOGPROB, policy.to(tl.int32, bitcast=True))
        tl.store(result + sampling.ENTROPY, entropy.to(tl.int32, bitcast=True))
        tl.store(result + sampling.RAW_LOGPROB, raw.to(tl.int32, bitcast=True))
    else:
        tl.store(result + sampling.TOKEN, -1)
        for column in tl.static_range(1, 5):
            tl.store(result + column, 0x7FC00000)  # NaN


def serves(batch: SamplingBatch) -> bool:
    """Whether `settle` gives what `general_sampling.sample` would: no bias, penalty or truncation in any row."""
    penalties = (batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0)
    truncated = (batch.top_k > 0) | (batch.top_p < 1) | (batch.min_p > 0)
    raw = (batch.temperature != 1) & (batch.temperature != 0) & batch.want_raw
    return not len(batch.bias_token) and not bool((penalties | truncated | raw).any())


def num_tiles(rows: int, vocab: int, dtype: str) -> int:
    """Column tiles of the head's product: the width of `tile_max` for `settle`."""
    return triton.cdiv(vocab, tiles.choose(tiles.LM_HEAD, rows, vocab, dtype).BLOCK_N)


def num_chunks(vocab: int) -> int:
    """Chunks of a row of logits."""
    return triton.cdiv(vocab, CHUNK)


def chunks_per_program(rows: int) -> int:
    """Chunks of a row that a program sums: few where rows alone do not fill the chip."""
    return max(1, min(_MOST_CHUNKS_PER_PROGRAM, triton.next_power_of_2(rows) // 16))


def sum_chunks(
    logits: Tensor, tile_max: Tensor, options: Tensor, sums: Tensor, masses: Tensor,
    *, cuts: Tensor | None = None, at_one: bool = False,
) -> None:  # fmt: skip
    """The sums [R, num_chunks, 2] and masses [R, num_chunks] of logits [R, V] whose largest are in tile_max [R, n].

    `cuts` [R] int64 truncates rows; `at_one` puts temperature 1 in place of the rows' own.
    """
    (rows, vocab), columns, chunks = logits.shape, tile_max.shape[1], num_chunks(logits.shape[1])
    per_program = chunks_per_program(rows)
    chunk_sums_kernel[(rows, triton.cdiv(chunks, per_program))](
        logits, tile_max, options, masses if cuts is None else cuts, sums, masses, vocab, columns, chunks,
        TILES_BLOCK=triton.next_power_of_2(columns), CHUNK=CHUNK, CHUNKS_PER_PROGRAM=per_program,
        TRUNCATED=cuts is not None, AT_ONE=at_one, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def settle(
    hidden: Tensor, head: Tensor, options: Tensor, logits: Tensor, tile_max: Tensor, sums: Tensor, masses: Tensor,
    out: Tensor, *, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Results of every row of hidden [R, E] under head [V, E], without copies to the host.

    Written: logits [R, V] float32, tile_max [R, num_tiles] float32, sums [R, num_chunks, 2] float32, masses
    [R, num_chunks] int64, out [R, NUM_RESULTS] int32. options [R, NUM_OPTIONS] int32; `serves` must hold.
    """
    rows, vocab = logits.shape
    tile = tile or tiles.choose(tiles.LM_HEAD, rows, vocab, matmul.dtype_of(hidden))
    columns, chunks = triton.cdiv(vocab, tile.BLOCK_N), num_chunks(vocab)
    block = triton.next_power_of_2(columns)
    matmul.linear_with_tile_max(hidden, head, logits, tile_max, tile=tile)
    sum_chunks(logits, tile_max, options, sums, masses)
    settle_kernel[(rows,)](
        logits, tile_max, sums, logits, tile_max, sums, masses, sums, options, masses, out, vocab, columns, columns,
        chunks, TILES_BLOCK=block, PROCESSED_TILES_BLOCK=block, PROCESSED_TILE_N=tile.BLOCK_N, CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(chunks), GENERAL=False, enable_fp_fusion=False,
    )  # fmt: skip
