"""PyLayer of causal attention over a packed batch, through the engine's paged kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle.autograd import PyLayer

from zerokl.kernels.autograd.arrays import Floats, empty, read
from zerokl.kernels.cpu import _cpu

Tensor = paddle.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """What the kernel needs beside queries, keys and values; the two caches are scratch space for one call."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    seq_starts: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping: NDArray[np.int32]
    key_cache: Floats
    """[blocks, KV, D, B]"""
    value_cache: Floats
    """[blocks, KV, B, D]"""


class Attention(PyLayer):  # type: ignore[misc]  # Paddle has no complete stubs
    """(q [T, H * D], k [T, KV * D], v [T, KV * D], call) -> [T, H * D], each sequence whole and causal.

    Forward writes keys and values to the scratch cache and runs the engine's paged kernel on it; backward works on the
    packed arrays.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.wanted = [not t.stop_gradient for t in (q, k, v)]
        query, key, value = _heads(q, call), _heads(k, call), _heads(v, call)
        out, out_array = empty(*q.shape)
        result = out_array.reshape(query.shape)
        caches = (call.key_cache, call.value_cache)
        _cpu.kv_write(key, value, call.slot_mapping, *caches)
        _cpu.attention(query, *caches, call.block_tables, call.seq_starts, call.context_lens, call.scale, result)
        # Not the caches, which the next layer overwrites, and not the output tensor, which would hold itself alive.
        ctx.call = (call.seq_starts, call.scale, call.head_dim)
        ctx.result = result
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        seq_starts, scale, head_dim = ctx.call
        inputs = [read(t).reshape(t.shape[0], -1, head_dim) for t in ctx.saved_tensor()]
        grads = [empty(array.shape[0], array.shape[1] * head_dim) for array in inputs]
        outputs = [array.reshape(like.shape) for (_, array), like in zip(grads, inputs, strict=True)]
        gradient = read(dout).reshape(ctx.result.shape)
        _cpu.attention_backward(gradient, *inputs, ctx.result, seq_starts, scale, *outputs)
        return tuple(grad if wanted else None for (grad, _), wanted in zip(grads, ctx.wanted, strict=True))


def _heads(x: Tensor, call: AttentionCall) -> Floats:
    return read(x).reshape(x.shape[0], -1, call.head_dim)
