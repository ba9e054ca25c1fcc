# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Paged causal attention on tensor cores: one order for decode, prefill chunks and cached prefixes.

Keys are taken in splits of SPLIT, aligned to position 0. Inside a split: scores by `tl.dot`, their maximum, weights
2^(score - maximum) rounded to the type of the values, their sum and their product with the values by `tl.dot`. Splits
are merged in order of position by `merge`. Neither the tile nor who computes a split changes a bit: one program may
walk all splits of its rows, or each split has a program and `merge_kernel` walks over what they wrote, or the first
splits of sequences that begin with the same blocks are walked for all of them at once and each goes on from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from zerokl.kernels.gpu import tiles
from zerokl.kernels.gpu.attention_tiles import SHARED_HEAD, SPLIT, TILE_COLUMNS
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.reductions import row_sums_by_dot
from zerokl.kernels.gpu.tiles import Tile
from zerokl.kernels.ops import AttentionSpec, KVPool

LOG2_E = 1.4426950408889634
_ENOUGH_SHARED_ROWS = 16  # least rows of a product on tensor cores
_MEMBERS = 8
_COLUMNS = tl.constexpr(TILE_COLUMNS)
_HEAD = tl.constexpr(SHARED_HEAD)

_NOTHING = tl.constexpr(-1.0e30)  # a maximum over no keys; finite, so that differences are numbers


@triton.jit
def merge(m, total, acc, m_i, total_i, acc_i):
    """The state of the splits so far, joined with the next split's: (maximum, sum, weighted values)."""
    largest = tl.maximum(m, m_i)
    old = tl.exp2(m - largest)
    new = tl.where(m_i > _NOTHING, tl.exp2(m_i - largest), 0.0)
    total = tl.fma(total_i, new, total * old)
    acc = tl.fma(acc_i, tl.broadcast_to(tl.expand_dims(new, -1), acc.shape), acc * tl.expand_dims(old, -1))
    return largest, total, acc


@triton.jit
def one_split(
    query, keys_ptr, values_ptr, table_ptr, first_block, kv_head, start, length, position, scale,
    KV_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(maximum [M], sum [M], weighted values [M, SIZE_BLOCK]) of the keys start .. start + SPLIT - 1.

    WHOLE says that every row sees all of them.
    """
    j = start + tl.arange(0, SPLIT)
    d = tl.arange(0, SIZE_BLOCK)
    seen = (j < length) | WHOLE
    block = first_block + tl.load(table_ptr + j // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    at = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + j % BLOCK_SIZE)[:, None] * SIZE + d[None, :]
    if WHOLE and SIZE == SIZE_BLOCK:
        keys = tl.load(keys_ptr + at)
        values = tl.load(values_ptr + at)
    else:
        mask = seen[:, None] & (d < SIZE)[None, :]
        keys = tl.load(keys_ptr + at, mask=mask, other=0.0)
        values = tl.load(values_ptr + at, mask=mask, other=0.0)
    score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if WHOLE:
        m_i = tl.max(score, axis=1)
        weight = tl.exp2(score - m_i[:, None])
    else:
        visible = j[None, :] <= position[:, None]
        score = tl.where(visible, score, _NOTHING)
        m_i = tl.max(score, axis=1)
        weight = tl.where(visible, tl.exp2(score - m_i[:, None]), 0.0)
    weight = weight.to(values.dtype)
    return m_i, row_sums_by_dot(weight, SPLIT), tl.dot(weight, values, input_precision="ieee")


@triton.jit
def attention_kernel(
    query_ptr, keys_ptr, values_ptr, tables_ptr, tiles_ptr, out_ptr, partial_ptr, state_ptr,
    scale, first_block, max_blocks, max_splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, PARTIAL: tl.constexpr, SHARED: tl.constexpr,
    SKIP_MASKS: tl.constexpr,
):  # fmt: skip
    """One program per (tile of query tokens, key head), or with PARTIAL per (tile, key head, split).

    The rows of a program are its tokens times the query heads of its key head. PARTIAL, for tiles of one token, writes
    each split's state to `partial` [tiles, H, max_splits, SIZE] and `state` [tiles, H, max_splits, 2] for
    `merge_kernel`. SHARED goes on from the state that `shared_prefix_kernel` left in these arrays, which are then
    [T, H, SIZE] and [T, H, 2]. SKIP_MASKS takes the splits that every row sees without masks: faster where there is
    much to compute, not where memory is waited for.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile_ptr = tiles_ptr + tl.program_id(0) * _COLUMNS
    kv_head = tl.program_id(1)
    count = tl.load(tile_ptr + 2)
    if count > 0:
        first = tl.load(tile_ptr + 3)
        i = tl.arange(0, ROWS)
        d = tl.arange(0, SIZE_BLOCK)
        token = i // GROUP_BLOCK
        head = i % GROUP_BLOCK
        valid = (token < count) & (head < GROUP)
        position = first + tl.minimum(token, count - 1)
        row = (tl.load(tile_ptr + 1) + token).to(tl.int64) * HEADS + kv_head * GROUP + head
        mask = valid[:, None] & (d < SIZE)[None, :]
        query = tl.load(query_ptr + row[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        table_ptr = tables_ptr + tl.load(tile_ptr).to(tl.int64) * max_blocks
        length = first + count
        if PARTIAL:
            split = tl.program_id(2)
            if split * SPLIT < length:
                m, total, acc = one_split(
                    query, keys_ptr, values_ptr, table_ptr, first_block, kv_head, split * SPLIT, length, position,
                    scale, KV_HEADS, SIZE, SIZE_BLOCK, BLOCK_SIZE, SPLIT, False,
                )  # fmt: skip
                own = tl.program_id(0).to(tl.int64) * HEADS + kv_head * GROUP + head
                at = own * max_splits + split
                tl.store(partial_ptr + at[:, None] * SIZE + d[None, :], acc, mask=mask)
                tl.store(state_ptr + at * 2, m, mask=valid)
                tl.store(state_ptr + at * 2 + 1, total, mask=valid)
        else:
            m = tl.full((ROWS,), _NOTHING, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, SIZE_BLOCK), tl.float32)
            done = 0
            if SHARED:
                done = tl.load(tile_ptr + 4) * SPLIT
                m = tl.load(state_ptr + row * 2, mask=valid & (done > 0), other=_NOTHING)
                total = tl.load(state_ptr + row * 2 + 1, mask=valid & (done > 0), other=0.0)
                acc = tl.load(partial_ptr + row[:, None] * SIZE + d[None, :], mask=mask & (done > 0), other=0.0)
            whole = (first + 1) // SPLIT * SPLIT if SKIP_MASKS else done
            for start in range(done, whole, SPLIT):
                m_i, total_i, acc_i = one_split(
                    query, keys_ptr, values_ptr, table_ptr, first_block, kv_head, start, length, position,
                    scale, KV_HEADS, SIZE, SIZE_BLOCK, BLOCK_SIZE, SPLIT, True,
                )  # fmt: skip
                m, total, acc = merge(m, total, acc, m_i, total_i, acc_i)
            for start in range(whole, length, SPLIT):
                m_i, total_i, acc_i = one_split(
                    query, keys_ptr, values_ptr, table_ptr, first_block, kv_head, start, length, position,
                    scale, KV_HEADS, SIZE, SIZE_BLOCK, BLOCK_SIZE, SPLIT, False,
                )  # fmt: skip
                m, total, acc = merge(m, total, acc, m_i, total_i, acc_i)
            out = tl.div_rn(acc, tl.broadcast_to(total[:, None], acc.shape)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * SIZE + d[None, :], out, mask=mask)


@triton.jit
def shared_prefix_kernel(
    query_ptr, keys_ptr, values_ptr, tables_ptr, tiles_ptr, acc_ptr, state_ptr, scale, first_block, max_blocks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """The state of some rows, `acc` [T, H, SIZE] and `state` [T, H, 2], after the splits that all of them share.

    One program per (shared tile, key head): its rows are the members times the query heads of the key head.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile_ptr = tiles_ptr + tl.program_id(0) * (_HEAD + MEMBERS)
    kv_head = tl.program_id(1)
    count = tl.load(tile_ptr + 1)
    if count > 0:
        i = tl.arange(0, MEMBERS * GROUP_BLOCK)
        d = tl.arange(0, SIZE_BLOCK)
        member = i // GROUP_BLOCK
        head = i % GROUP_BLOCK
        valid = (member < count) & (head < GROUP)
        token = tl.load(tile_ptr + _HEAD + member, mask=valid, other=0).to(tl.int64)
        row = token * HEADS + kv_head * GROUP + head
        mask = valid[:, None] & (d < SIZE)[None, :]
        query = tl.load(query_ptr + row[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        table_ptr = tables_ptr + tl.load(tile_ptr).to(tl.int64) * max_blocks
        length = tl.load(tile_ptr + 2) * SPLIT
        m = tl.full((MEMBERS * GROUP_BLOCK,), _NOTHING, tl.float32)
        total = tl.zeros((MEMBERS * GROUP_BLOCK,), tl.float32)
        acc = tl.zeros((MEMBERS * GROUP_BLOCK, SIZE_BLOCK), tl.float32)
        for start in range(0, length, SPLIT):
            m_i, total_i, acc_i = one_split(
                query, keys_ptr, values_ptr, table_ptr, first_block, kv_head, start, length, length, scale,
                KV_HEADS, SIZE, SIZE_BLOCK, BLOCK_SIZE, SPLIT, True,
            )  # fmt: skip
            m, total, acc = merge(m, total, acc, m_i, total_i, acc_i)
        tl.store(acc_ptr + row[:, None] * SIZE + d[None, :], acc, mask=mask)
        tl.store(state_ptr + row * 2, m, mask=valid)
        tl.store(state_ptr + row * 2 + 1, total, mask=valid)


@triton.jit
def merge_kernel(
    partial_ptr, state_ptr, tiles_ptr, out_ptr, max_splits,
    HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The output of a tile of one token and one head from the states of its splits."""
    tile_ptr = tiles_ptr + tl.program_id(0) * _COLUMNS
    d = tl.arange(0, SIZE_BLOCK)
    if tl.load(tile_ptr + 2) > 0:
        length = tl.load(tile_ptr + 3) + 1
        own = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
        row = tl.load(tile_ptr + 1).to(tl.int64) * HEADS + tl.program_id(1)
        m = tl.full((1,), _NOTHING, tl.float32)
        total = tl.zeros((1,), tl.float32)
        acc = tl.zeros((1, SIZE_BLOCK), tl.float32)
        one = tl.arange(0, 1)
        for split in range(tl.cdiv(length, SPLIT)):
            at = own * max_splits + split
            m_i = tl.load(state_ptr + at * 2 + one)
            total_i = tl.load(state_ptr + at * 2 + 1 + one)
            acc_i = tl.load(partial_ptr + at * SIZE + d[None, :], mask=(d < SIZE)[None, :], other=0.0)
            m, total, acc = merge(m, total, acc, m_i, total_i, acc_i)
        out = tl.div_rn(acc, tl.broadcast_to(total[:, None], acc.shape)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * SIZE + d[None, :], out, mask=(d < SIZE)[None, :])


@dataclass(frozen=True, slots=True)
class Shared:
    """Which tokens share splits, and where their state is kept between the two kernels."""

    tiles: Tensor
    """[n, SHARED_HEAD + members] int32, of `share_prefixes`; one without members is skipped."""
    acc: Tensor
    """[T, H, D] float32"""
    state: Tensor
    """[T, H, 2] float32"""
    tile: Tile = tiles.SHARED_ATTENTION


def attention(
    query: Tensor, pool: KVPool[Tensor], layer: int, tables: Tensor, tile_list: Tensor, out: Tensor,
    spec: AttentionSpec, *, partial: tuple[Tensor, Tensor] | None = None, shared: Shared | None = None,
    tile: Tile = tiles.DECODE_ATTENTION, split: int = SPLIT,
) -> None:  # fmt: skip
    """Attention of the rows that `tile_list` [n, TILE_COLUMNS] names: query and out [T, H D], the pool as in
    `norms.qkv_to_cache`.

    tables [S, max blocks] int32. A tile holds at most `tokens_per_tile(tile, spec)` tokens of one sequence; a tile of
    no rows is skipped. With `partial`, a pair of float32 buffers of n H max splits rows of D and of 2 entries, every
    split has a program of its own; tiles must then hold one token each, at positions below max splits * SPLIT. With
    `shared` the splits that tiles of one token share are read once; without it tiles walk all of theirs.
    """
    assert partial is None or shared is None
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "GROUP_BLOCK": triton.next_power_of_2(heads // kv_heads), "SIZE": size,
        "SIZE_BLOCK": max(16, triton.next_power_of_2(size)), "BLOCK_SIZE": pool.block_size, "SPLIT": split,
        "enable_fp_fusion": False,
    }  # fmt: skip
    where = tables, layer * pool.keys.shape[1], tables.shape[1]
    buffer, state = partial or (out, out)
    if shared is not None:
        buffer, state = shared.acc, shared.state
        _walk_shared(query, pool, where, shared, spec, constants)
    max_splits = 1 if partial is None else math.prod(buffer.shape[:-1]) // (tile_list.shape[0] * heads)
    attention_kernel[(tile_list.shape[0], kv_heads, max_splits)](
        query, pool.keys, pool.values, tables, tile_list, out, buffer, state,
        spec.scale * LOG2_E, *where[1:], max_splits,
        ROWS=tile.BLOCK_M, PARTIAL=partial is not None, SHARED=shared is not None, SKIP_MASKS=tile.BLOCK_M > 16,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **constants,
    )  # fmt: skip
    if partial is not None:
        merge_kernel[(tile_list.shape[0], heads)](
            buffer, state, tile_list, out, max_splits, HEADS=heads, SIZE=size, SIZE_BLOCK=constants["SIZE_BLOCK"],
            SPLIT=split, enable_fp_fusion=False, num_warps=1,
        )  # fmt: skip


def _walk_shared(query, pool, where, shared, spec, constants):
    tables, first_block, max_blocks = where
    shared_prefix_kernel[(shared.tiles.shape[0], spec.num_kv_heads)](
        query, pool.keys, pool.values, tables, shared.tiles, shared.acc, shared.state, spec.scale * LOG2_E,
        first_block, max_blocks, MEMBERS=members_per_tile(spec), num_warps=shared.tile.num_warps,
        num_stages=shared.tile.num_stages, **constants,
    )  # fmt: skip


def tokens_per_tile(tile: Tile, spec: AttentionSpec) -> int:
    """Query tokens that a program of this tile takes."""
    return tile.BLOCK_M // triton.next_power_of_2(spec.num_heads // spec.num_kv_heads)


def members_per_tile(spec: AttentionSpec) -> int:
    """Sequences that a program of shared splits serves."""
    return max(_MEMBERS, _ENOUGH_SHARED_ROWS // triton.next_power_of_2(spec.num_heads // spec.num_kv_heads))
