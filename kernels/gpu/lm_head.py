# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""LM head, draw and log-probabilities for rows without penalties or truncation: logits stay on the device.

The matrix product writes float32 logits and the largest of every tile; one pass over the logits gives the sums of each
chunk of CHUNK entries; then a row is settled from its chunk sums and the one chunk that holds its token. Sums and
masses are those of `sampling.sample_kernel`, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu import matmul, sampling, tiles
from zerokl.kernels.gpu.elementwise import Tensor, vexp_to_one
from zerokl.kernels.gpu.sampling import chunk_sums, drawn_bits, join_chunks, logprob_of, mass_of, option_of
from zerokl.kernels.gpu.tiles import Tile
from zerokl.kernels.ops import SamplingBatch

CHUNK = 1024
_MOST_CHUNKS_PER_PROGRAM = 8


@triton.jit
def _temperature(options_ptr, row):
    given = option_of(options_ptr, row, sampling.TEMPERATURE)
    return tl.where(given == 0.0, 1.0, given)


@triton.jit
def _row_max(tile_max_ptr, row, NUM_TILES, TILES_BLOCK: tl.constexpr):
    i = tl.arange(0, TILES_BLOCK)
    tile_max_ptr += row.to(tl.int64) * NUM_TILES
    return tl.max(tl.load(tile_max_ptr + i, mask=i < NUM_TILES, other=float("-inf")), axis=0)


@triton.jit
def chunk_sums_kernel(
    logits_ptr, tile_max_ptr, options_ptr, sums_ptr, masses_ptr, V, NUM_TILES, NUM_CHUNKS,
    TILES_BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """sums [R, chunks, 2] float32: sum of e and of e * d; masses [R, chunks] int64. Some chunks of a row a program."""
    row = tl.program_id(0)
    temperature = _temperature(options_ptr, row)
    best = tl.div_rn(_row_max(tile_max_ptr, row, NUM_TILES, TILES_BLOCK), temperature)
    first = tl.program_id(1) * CHUNKS_PER_PROGRAM
    for chunk in range(first, tl.minimum(first + CHUNKS_PER_PROGRAM, NUM_CHUNKS)):
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row.to(tl.int64) * V + i, mask=i < V, other=float("-inf"))
        if temperature != 1.0:
            x = tl.div_rn(x, tl.broadcast_to(temperature, x.shape))
        d = x - best
        e = vexp_to_one(d)
        total, weighted = chunk_sums(e, d, CHUNK)
        at = row * NUM_CHUNKS + chunk
        tl.store(sums_ptr + at * 2, total)
        tl.store(sums_ptr + at * 2 + 1, weighted)
        tl.store(masses_ptr + at, tl.sum(mass_of(e), axis=0))


@triton.jit
def _chunk_of(masses, chunks, wanted):
    """(chunk in which the cumulative mass first exceeds `wanted`, mass before it)."""
    below = tl.cumsum(masses, axis=0) <= wanted
    number = tl.sum(below.to(tl.int32), axis=0)
    return number, tl.sum(tl.where(chunks < number, masses, tl.zeros_like(masses)), axis=0)


@triton.jit
def settle_kernel(
    logits_ptr, tile_max_ptr, options_ptr, sums_ptr, masses_ptr, out_ptr, V, NUM_TILES, NUM_CHUNKS,
    TILES_BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Token, log-probabilities and entropy of a row, as columns of `sampling`."""
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * V
    forced = tl.load(options_ptr + row * sampling.NUM_OPTIONS + sampling.FORCED)
    greedy = option_of(options_ptr, row, sampling.TEMPERATURE) == 0.0
    temperature = _temperature(options_ptr, row)
    largest = _row_max(tile_max_ptr, row, NUM_TILES, TILES_BLOCK)
    best = tl.div_rn(largest, temperature)
    chunks = tl.arange(0, CHUNKS)
    at = row * NUM_CHUNKS + chunks
    here = chunks < NUM_CHUNKS
    total = join_chunks(tl.load(sums_ptr + at * 2, mask=here, other=0.0), CHUNKS)
    weighted = join_chunks(tl.load(sums_ptr + at * 2 + 1, mask=here, other=0.0), CHUNKS)
    result = out_ptr + row * sampling.NUM_RESULTS
    if (total == total) & (best < float("inf")) & (best > float("-inf")):
        token = forced
        likeliest = forced
        if greedy:
            i = tl.arange(0, TILES_BLOCK)
            maxima = tl.load(tile_max_ptr + row.to(tl.int64) * NUM_TILES + i, mask=i < NUM_TILES, other=float("-inf"))
            tile = tl.min(tl.where(maxima == largest, i, NUM_TILES), axis=0)
            i = tile * TILE_N + tl.arange(0, TILE_N)
            x = tl.load(logits + i, mask=i < V, other=float("-inf"))
            likeliest = tl.min(tl.where((x == largest) & (i < V), i, V), axis=0)
            if forced < 0:
                token = likeliest
        if (not greedy) & (forced < 0):
            masses = tl.load(masses_ptr + at, mask=here, other=0).to(tl.uint64)
            wanted = tl.umulhi(drawn_bits(options_ptr, row), tl.sum(masses, axis=0))
            chunk, before = _chunk_of(masses, chunks, wanted)
            i = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + i, mask=i < V, other=float("-inf"))
            mass = mass_of(vexp_to_one(tl.div_rn(x, tl.broadcast_to(temperature, x.shape)) - best))
            token = tl.min(tl.where(before + tl.cumsum(mass, axis=0) > wanted, i, V), axis=0)
        chosen = tl.load(logits + token)
        policy = logprob_of(tl.div_rn(chosen, temperature), best, total)
        logprob = policy
        if greedy:
            logprob = tl.where(token == likeliest, 0.0, float("-inf"))
        entropy = (tl.log(total) - weighted / total).to(tl.float32)
        tl.store(result + sampling.TOKEN, token)
        tl.store(result + sampling.LOGPROB, logprob.to(tl.int32, bitcast=True))
        tl.store(result + sampling.POLICY_LOGPROB, policy.to(tl.int32, bitcast=True))
        tl.store(result + sampling.ENTROPY, entropy.to(tl.int32, bitcast=True))
        # Asked for only where it is the same: see `serves`.
        tl.store(result + sampling.RAW_LOGPROB, policy.to(tl.int32, bitcast=True))
    else:
        tl.store(result + sampling.TOKEN, -1)
        for column in tl.static_range(1, 5):
            tl.store(result + column, 0x7FC00000)  # NaN


def serves(batch: SamplingBatch) -> bool:
    """Whether `settle` gives what `sampling.sample_kernel` would: no bias, penalty or truncation in any row."""
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
    matmul.linear_with_tile_max(hidden, head, logits, tile_max, tile=tile)
    block = {"TILES_BLOCK": triton.next_power_of_2(columns), "CHUNK": CHUNK, "enable_fp_fusion": False}
    per_program = chunks_per_program(rows)
    chunk_sums_kernel[(rows, triton.cdiv(chunks, per_program))](
        logits, tile_max, options, sums, masses, vocab, columns, chunks,
        CHUNKS_PER_PROGRAM=per_program, num_warps=1, **block,
    )  # fmt: skip
    settle_kernel[(rows,)](
        logits, tile_max, options, sums, masses, out, vocab, columns, chunks,
        CHUNKS=triton.next_power_of_2(chunks), TILE_N=tile.BLOCK_N, **block,
    )  # fmt: skip
