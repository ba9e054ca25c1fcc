# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""The head without log-probabilities and entropy: it draws the tokens that `lm_head.settle` draws, and nothing else.

Left out are the two float32 sums of every chunk of logits and their joining; the masses, which a draw needs, stay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu import lm_head, matmul, sampling, tiles
from zerokl.kernels.gpu.elementwise import Tensor, vexp_to_one


@triton.jit
def masses_kernel(
    logits_ptr, tile_max_ptr, options_ptr, masses_ptr, V, NUM_TILES, NUM_CHUNKS,
    TILES_BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """masses [R, chunks] int64. Some chunks of a row a program."""
    row = tl.program_id(0)
    temperature = lm_head.row_temperature(options_ptr, row)
    best = tl.div_rn(lm_head.row_max(tile_max_ptr, row, NUM_TILES, TILES_BLOCK), temperature)
    first = tl.program_id(1) * CHUNKS_PER_PROGRAM
    for chunk in range(first, tl.minimum(first + CHUNKS_PER_PROGRAM, NUM_CHUNKS)):
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row.to(tl.int64) * V + i, mask=i < V, other=float("-inf"))
        if temperature != 1.0:
            x = tl.div_rn(x, tl.broadcast_to(temperature, x.shape))
        mass = sampling.mass_of(vexp_to_one(x - best))
        tl.store(masses_ptr + row * NUM_CHUNKS + chunk, tl.sum(mass, axis=0))


@triton.jit
def draw_kernel(
    logits_ptr, tile_max_ptr, masses_ptr, options_ptr, out_ptr, V, NUM_TILES, NUM_CHUNKS,
    TILES_BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The token of a row, -1 without a distribution; the other columns of its results are 0."""
    row = tl.program_id(0)
    temperature = lm_head.row_temperature(options_ptr, row)
    best = tl.div_rn(lm_head.row_max(tile_max_ptr, row, NUM_TILES, TILES_BLOCK), temperature)
    token = tl.full((), -1, tl.int32)
    if (best < float("inf")) & (best > float("-inf")):
        chunks = tl.arange(0, CHUNKS)
        masses = tl.load(masses_ptr + row * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=0).to(tl.uint64)
        wanted = tl.umulhi(sampling.drawn_bits(options_ptr, row), tl.sum(masses, axis=0))
        chunk, before = lm_head.chunk_of(masses, chunks, wanted)
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row.to(tl.int64) * V + i, mask=i < V, other=float("-inf"))
        x = tl.div_rn(x, tl.broadcast_to(temperature, x.shape))
        mass = sampling.mass_of(vexp_to_one(x - best))
        token = tl.min(tl.where(before + tl.cumsum(mass, axis=0) > wanted, i, V), axis=0)
    result = out_ptr + row * sampling.NUM_RESULTS
    tl.store(result + sampling.TOKEN, token)
    for column in tl.static_range(1, 5):
        tl.store(result + column, 0)


def settle(
    hidden: Tensor, head: Tensor, options: Tensor, logits: Tensor, tile_max: Tensor, masses: Tensor, out: Tensor
) -> None:
    """As `lm_head.settle`, without what is left out here; rows at a temperature above 0 whose token is not given."""
    rows, vocab = logits.shape
    tile = tiles.choose(tiles.LM_HEAD, rows, vocab, matmul.dtype_of(hidden))
    columns, chunks = tile_max.shape[1], lm_head.num_chunks(vocab)
    some, block = lm_head.chunks_per_program(rows), triton.next_power_of_2(columns)
    matmul.linear_with_tile_max(hidden, head, logits, tile_max, tile=tile)
    masses_kernel[(rows, triton.cdiv(chunks, some))](
        logits, tile_max, options, masses, vocab, columns, chunks, TILES_BLOCK=block, CHUNK=lm_head.CHUNK,
        CHUNKS_PER_PROGRAM=some, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    draw_kernel[(rows,)](
        logits, tile_max, masses, options, out, vocab, columns, chunks, TILES_BLOCK=block, CHUNK=lm_head.CHUNK,
        CHUNKS=triton.next_power_of_2(chunks), enable_fp_fusion=False,
    )  # fmt: skip
