"""Checks of what a caller hands to `PolicyModel`: each error names the field, the value and its bound."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zerokl.rollout.models.config import ModelConfig

Ints = NDArray[np.int32]


def checked_batch(token_ids: ArrayLike, cu_seqlens: ArrayLike, config: ModelConfig) -> tuple[Ints, Ints]:
    """(token_ids [T], cu_seqlens [S + 1]) as int32 arrays that describe non-empty sequences the model can hold."""
    ids = _ids("token_ids", token_ids, config.vocab_size)
    starts = _integers("cu_seqlens", cu_seqlens)
    if len(starts) < 2:
        raise ValueError(f"cu_seqlens must have at least 2 entries, got {len(starts)}")
    if starts[0] != 0 or starts[-1] != len(ids):
        raise ValueError(f"cu_seqlens must run from 0 to {len(ids)} (tokens given), got {starts[0]} to {starts[-1]}")
    lengths = np.diff(starts)
    if lengths.min() < 1:
        at = int(lengths.argmin())
        raise ValueError(f"cu_seqlens must ascend: sequence {at} has {lengths[at]} tokens, must have at least 1")
    if lengths.max() > config.max_position_embeddings:
        at = int(lengths.argmax())
        raise ValueError(
            f"cu_seqlens: sequence {at} has {lengths[at]} tokens, the model holds at most "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    return ids, starts.astype(np.int32)


def default_rows(starts: Ints) -> Ints:
    """All tokens but the last of each sequence."""
    has_next = np.ones(starts[-1], bool)
    has_next[starts[1:] - 1] = False
    return np.flatnonzero(has_next).astype(np.int32)


def checked_rows(rows: ArrayLike, num_tokens: int, starts: Ints | None = None) -> Ints:
    """`rows` as int32 indices into the tokens; with `starts`, also none that is the last of its sequence."""
    wanted = _integers("rows", rows)
    _refuse_outside("rows", wanted, num_tokens)
    if starts is not None:
        last = np.isin(wanted, starts[1:] - 1)
        if last.any():
            at = int(last.argmax())
            raise ValueError(f"rows[{at}] is {wanted[at]}, the last token of its sequence: no next token to score")
    return wanted.astype(np.int32)


def checked_targets(targets: ArrayLike, num_rows: int, vocab_size: int) -> Ints:
    """`targets` as int32 token ids, one per row."""
    ids = _ids("targets", targets, vocab_size)
    if len(ids) != num_rows:
        raise ValueError(f"targets must have one entry per row of hidden ({num_rows}), got {len(ids)}")
    return ids


def checked_routing(routing: ArrayLike, num_tokens: int, config: ModelConfig) -> Ints:
    """`routing` as int32 expert ids [mixtures, T, experts per token]: distinct per token, or -1 throughout a row."""
    ids = np.asarray(routing)
    if config.moe is None:
        raise ValueError(f"routing must be None: {config.architecture} has no mixture of experts")
    expected = (len(config.moe.layers), num_tokens, config.moe.top_k)
    if ids.shape != expected or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"routing must hold integers in shape {expected}, got {ids.dtype} in shape {ids.shape}")
    free = (ids == -1).all(axis=-1, keepdims=True)
    _refuse_outside("routing", np.where(free, 0, ids).ravel(), config.moe.num_experts)
    ordered = np.sort(ids, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1) & ~free[..., 0]
    if twice.any():
        mixture, token = np.argwhere(twice)[0]
        raise ValueError(f"routing[{mixture}, {token}] must hold distinct experts, got {ids[mixture, token].tolist()}")
    return np.ascontiguousarray(ids, np.int32)


def checked_routing_weights(weights: ArrayLike, routing: Ints | None) -> NDArray[np.float32]:
    """`weights` as float32 gate weights in the shape of `routing`, finite wherever experts are given."""
    if routing is None:
        raise ValueError("routing_weights must be None where routing is: they belong to its experts")
    values = np.asarray(weights)
    if values.shape != routing.shape or values.dtype != np.float32:
        raise ValueError(
            f"routing_weights must be float32 in shape {routing.shape}, got {values.dtype} in shape {values.shape}"
        )
    wrong = ~np.isfinite(values) & (routing >= 0)
    if wrong.any():
        at = [int(index) for index in np.argwhere(wrong)[0]]
        raise ValueError(f"routing_weights{at} must be finite, got {values[tuple(at)]}")
    return np.ascontiguousarray(values)


def _ids(name: str, values: ArrayLike, vocab_size: int) -> Ints:
    ids = _integers(name, values)
    _refuse_outside(name, ids, vocab_size)
    return np.ascontiguousarray(ids, np.int32)


def _integers(name: str, values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got dtype {array.dtype}")
    return array


def _refuse_outside(name: str, values: NDArray[Any], bound: int) -> None:
    outside = (values < 0) | (values >= bound)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(f"{name}[{at}] must be in [0, {bound}), got {values[at]}")
