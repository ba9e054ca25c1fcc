# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Mixture of experts: router in float32, rows sorted by expert, one grouped product, sums in slot order.

Letters as in `zerokl.kernels.experts`. A slot is an entry of the choice [T, k], numbered token * k + place. Sorting
only places rows in tiles; every result is written back at its slot, so bits depend on the token's row and choice alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.experts import RouterSpec
from zerokl.kernels.gpu import tiles
from zerokl.kernels.gpu.elementwise import Tensor, vexp
from zerokl.kernels.gpu.matmul import product, swiglu_of
from zerokl.kernels.gpu.reductions import fold_sum
from zerokl.kernels.gpu.tiles import Tile

_SORT_BLOCK = 1024


@triton.jit
def choose_kernel(
    logits_ptr, correction_ptr, given_ptr, given_weights_ptr, ids_ptr, weights_ptr, norm_min,
    X: tl.constexpr, X_BLOCK: tl.constexpr, SLOTS: tl.constexpr, SLOTS_BLOCK: tl.constexpr,
    HAS_CORRECTION: tl.constexpr, NORMALISE: tl.constexpr, GIVEN: tl.constexpr, WEIGHTS_GIVEN: tl.constexpr,
):  # fmt: skip
    """ids [T, k] and weights [T, k] of a token from its router logits [T, X]; given ids are not chosen.

    Given weights (the bits of float32) count for tokens whose ids are given.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, X_BLOCK)
    slots = tl.arange(0, SLOTS_BLOCK)
    x = tl.load(logits_ptr + token * X + i, mask=i < X, other=float("-inf"))
    e = vexp(x - tl.max(x, axis=0))
    p = tl.div_rn(e, tl.broadcast_to(fold_sum(e, X_BLOCK), e.shape))
    score = p
    if HAS_CORRECTION:
        score = p + tl.load(correction_ptr + i, mask=i < X, other=0.0)
    score = tl.where(i < X, score, float("-inf"))
    taken = i >= X
    chosen = tl.zeros((SLOTS_BLOCK,), tl.int32)
    weights = tl.zeros((SLOTS_BLOCK,), tl.float32)
    total = tl.zeros((), tl.float32)
    for slot in tl.static_range(SLOTS):
        best = tl.max(tl.where(taken, float("-inf"), score), axis=0)
        expert = tl.min(tl.where((score == best) & (taken == 0), i, X - 1), axis=0)
        if GIVEN:
            given = tl.load(given_ptr + token * SLOTS + slot)
            expert = tl.where(given < 0, expert, given)
        taken = taken | (i == expert)
        weight = tl.sum(tl.where(i == expert, p, 0.0), axis=0)  # one term is not 0: exact
        total += weight
        chosen = tl.where(slots == slot, expert, chosen)
        weights = tl.where(slots == slot, weight, weights)
    if NORMALISE:
        weights = tl.div_rn(weights, tl.broadcast_to(tl.maximum(total, norm_min), weights.shape))
    if WEIGHTS_GIVEN:
        bits = tl.load(given_weights_ptr + token * SLOTS + slots, mask=slots < SLOTS, other=0)
        weights = tl.where(tl.load(given_ptr + token * SLOTS) < 0, weights, bits.to(tl.float32, bitcast=True))
    tl.store(ids_ptr + token * SLOTS + slots, chosen, mask=slots < SLOTS)
    tl.store(weights_ptr + token * SLOTS + slots, weights, mask=slots < SLOTS)


@triton.jit(do_not_specialize=["num_slots"])
def count_kernel(ids_ptr, counts_ptr, num_slots, BLOCK: tl.constexpr):
    """counts[expert] = slots that chose it. One program per expert."""
    expert = tl.program_id(0)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_slots, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count += (tl.load(ids_ptr + i, mask=i < num_slots, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["num_slots", "max_tiles"])
def place_kernel(
    ids_ptr, counts_ptr, sorted_ptr, tile_expert_ptr, num_slots, max_tiles,
    X: tl.constexpr, X_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Places of each expert, whole tiles: its slots in `sorted`, then -1; the expert of each tile, -1 for none."""
    expert = tl.program_id(0)
    i = tl.arange(0, X_BLOCK)
    num_tiles = tl.cdiv(tl.load(counts_ptr + i, mask=i < X, other=0), BLOCK_M)
    first_tile = tl.sum(tl.where(i < expert, num_tiles, 0), axis=0)
    own_tiles = tl.sum(tl.where(i == expert, num_tiles, 0), axis=0)
    for tile in range(own_tiles):
        tl.store(tile_expert_ptr + first_tile + tile, expert)
    if expert == X - 1:
        for tile in range(first_tile + own_tiles, max_tiles):
            tl.store(tile_expert_ptr + tile, -1)
    at = first_tile * BLOCK_M
    for start in range(0, num_slots, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mine = tl.load(ids_ptr + j, mask=j < num_slots, other=-1) == expert
        place = at + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(sorted_ptr + place, j, mask=mine)
        at += tl.sum(mine.to(tl.int32), axis=0)
    rest = at + tl.arange(0, BLOCK_M)
    tl.store(sorted_ptr + rest, tl.full((BLOCK_M,), -1, tl.int32), mask=rest < (first_tile + own_tiles) * BLOCK_M)


@triton.jit
def _tile_rows(sorted_ptr, tile_expert_ptr, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(expert, slots [BLOCK_M], column tile): column tiles of a row tile are neighbours."""
    columns = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // columns
    expert = tl.load(tile_expert_ptr + tile)
    slots = tl.load(sorted_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M), mask=expert >= 0, other=-1)
    return expert, slots, tl.program_id(0) % columns


@triton.jit
def experts_swiglu_kernel(
    x_ptr, weight_ptr, sorted_ptr, tile_expert_ptr, out_ptr, N, K,
    SLOTS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[slot] = silu(x[token] gate^T) * (x[token] up^T) with the slot's expert; weight [X, N, K] as in `swiglu`."""
    expert, slots, column = _tile_rows(sorted_ptr, tile_expert_ptr, N, BLOCK_M, BLOCK_N)
    if expert >= 0:
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = product(
            x_ptr, weight_ptr + expert.to(tl.int64) * N * K, 0, tl.maximum(slots, 0) // SLOTS, 0,
            tl.minimum(n, N - 1), K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, False, False,
        )  # fmt: skip
        y = swiglu_of(acc, BLOCK_M, BLOCK_N).to(out_ptr.dtype.element_ty)
        f = column * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        inside = (slots >= 0)[:, None] & (f < N // 2)[None, :]
        tl.store(out_ptr + slots.to(tl.int64)[:, None] * (N // 2) + f[None, :], y, mask=inside)


@triton.jit
def experts_linear_kernel(
    x_ptr, weight_ptr, sorted_ptr, tile_expert_ptr, out_ptr, N, K,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[slot] = x[slot] weight^T with the slot's expert; weight [X, E, F]."""
    expert, slots, column = _tile_rows(sorted_ptr, tile_expert_ptr, N, BLOCK_M, BLOCK_N)
    if expert >= 0:
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = product(
            x_ptr, weight_ptr + expert.to(tl.int64) * N * K, 0, tl.maximum(slots, 0), 0, tl.minimum(n, N - 1), K,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, False, False,
        )  # fmt: skip
        inside = (slots >= 0)[:, None] & (n < N)[None, :]
        tl.store(out_ptr + slots.to(tl.int64)[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    outputs_ptr, weights_ptr, shared_ptr, out_ptr, WIDTH, SLOTS: tl.constexpr, HAS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over slots, in order, by fma from 0, of weight * output; then + shared."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    acc = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        weight = tl.load(weights_ptr + token * SLOTS + slot)
        output = tl.load(outputs_ptr + (token * SLOTS + slot) * WIDTH + column, mask=inside, other=0.0)
        acc = tl.fma(tl.broadcast_to(weight, acc.shape), output.to(tl.float32), acc)
    if HAS_SHARED:
        acc += tl.load(shared_ptr + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + column, acc.to(out_ptr.dtype.element_ty), mask=inside)


def choose_experts(
    logits: Tensor, correction: Tensor | None, spec: RouterSpec, ids: Tensor, weights: Tensor,
    *, given: Tensor | None = None, given_weights: Tensor | None = None,
) -> None:  # fmt: skip
    """ids [T, k] int32 and weights [T, k] float32 from router logits [T, X] float32; see `RouterSpec`.

    correction [X] float32 or None; `given` [T, k] int32 takes the place of the choice, but for rows of -1, and with it
    `given_weights` [T, k] int32, the bits of float32, that of the weights.
    """
    assert given_weights is None or given is not None, "weights without experts"
    tokens, experts = logits.shape
    choose_kernel[(tokens,)](
        logits, logits if correction is None else correction, ids if given is None else given,
        ids if given_weights is None else given_weights, ids, weights, spec.norm_min,
        X=experts, X_BLOCK=triton.next_power_of_2(experts), SLOTS=spec.top_k,
        SLOTS_BLOCK=triton.next_power_of_2(spec.top_k), HAS_CORRECTION=correction is not None,
        NORMALISE=spec.normalise, GIVEN=given is not None, WEIGHTS_GIVEN=given_weights is not None,
        enable_fp_fusion=False, num_warps=1,
    )  # fmt: skip


def num_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """Most tiles that a step can need, which is the number that are launched."""
    return min(num_slots, triton.cdiv(num_slots, block_m) + num_experts)


def expert_tile(num_slots: int, num_experts: int, dtype: str) -> Tile:
    """The tile of the grouped products of a step."""
    return tiles.choose(tiles.EXPERTS, triton.cdiv(num_slots, num_experts), 0, dtype)


def sort_slots(ids: Tensor, num_experts: int, counts: Tensor, order: Tensor, tile_expert: Tensor, tile: Tile) -> None:
    """Places of the slots ids [T, k] in tiles of `tile.BLOCK_M`.

    Written, int32: counts [X], order [num_tiles * BLOCK_M], and the expert of each tile, tile_expert [num_tiles].
    """
    num_slots = ids.shape[0] * ids.shape[1]
    count_kernel[(num_experts,)](ids, counts, num_slots, BLOCK=_SORT_BLOCK)
    place_kernel[(num_experts,)](
        ids, counts, order, tile_expert, num_slots, tile_expert.shape[0], X=num_experts,
        X_BLOCK=triton.next_power_of_2(num_experts), BLOCK=_SORT_BLOCK, BLOCK_M=tile.BLOCK_M,
    )  # fmt: skip


def mixture(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, order: Tensor, tile_expert: Tensor,
    inner: Tensor, outputs: Tensor, shared: Tensor | None, out: Tensor, *, tile: Tile,
) -> None:  # fmt: skip
    """out [T, E] from x [T, E], the sorted slots and the experts' gate_up [X, 2 F, E] and down [X, E, F].

    Written on the way: inner [T k, F] in the type of x, outputs [T k, E] float32. shared [T, E] or None.
    """
    (tokens, slots), (_, k, width) = ids.shape, down.shape
    grid = tile_expert.shape[0]
    options = {"enable_fp_fusion": False, **tile.options()}
    experts_swiglu_kernel[(grid * triton.cdiv(2 * width, tile.BLOCK_N),)](
        x, gate_up, order, tile_expert, inner, 2 * width, k, SLOTS=slots, EVEN_K=k % tile.BLOCK_K == 0, **options
    )
    experts_linear_kernel[(grid * triton.cdiv(k, tile.BLOCK_N),)](
        inner, down, order, tile_expert, outputs, k, width, EVEN_K=width % tile.BLOCK_K == 0, **options
    )
    combine_kernel[(tokens, triton.cdiv(k, _SORT_BLOCK))](
        outputs, weights, outputs if shared is None else shared, out, k, SLOTS=slots, HAS_SHARED=shared is not None,
        BLOCK=_SORT_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
