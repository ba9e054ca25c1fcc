"""Causal attention over a packed batch of whole sequences, differentiable, by the engine's paged kernels."""

from __future__ import annotations

from typing import Any

from paddle.autograd import PyLayer

from zerokl.kernels.autograd.arrays import Floats, empty, read
from zerokl.kernels.cpu import _cpu
from zerokl.kernels.ops import AttentionSpec, StepInputs

Tensor = Any  # paddle.Tensor


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, step: StepInputs, spec: AttentionSpec, caches: tuple[Floats, Floats]
) -> Tensor:
    """q [T, H * D], k and v [T, KV * D], rotated -> [T, H * D].

    `caches` ([blocks, KV, D, B] and [blocks, KV, B, D]) are scratch space: forward writes keys and values there for the
    paged kernel to read, backward works on the packed arrays and does not look at them.
    """
    return _Attention.apply(q, k, v, step, spec, caches)


class _Attention(PyLayer):  # type: ignore[misc]  # Paddle has no complete stubs
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, step: StepInputs, spec: AttentionSpec, caches: tuple[Floats, Floats]
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.wanted = [not t.stop_gradient for t in (q, k, v)]
        query, key, value = (_by_head(t, spec.head_dim) for t in (q, k, v))
        out, out_array = empty(*q.shape)
        result = out_array.reshape(query.shape)
        _cpu.kv_write(key, value, step.slot_mapping, *caches)
        _cpu.attention(query, *caches, step.block_tables, step.seq_starts, step.context_lens, spec.scale, result)
        # The result as an array: a saved output tensor would hold itself alive through the graph.
        ctx.saved = (result, step.seq_starts, spec)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        result, seq_starts, spec = ctx.saved
        q, k, v = ctx.saved_tensor()
        grads = [empty(*t.shape) for t in (q, k, v)]
        _cpu.attention_backward(
            _by_head(dout, spec.head_dim),
            *(_by_head(t, spec.head_dim) for t in (q, k, v)),
            result,
            seq_starts,
            spec.scale,
            *(array.reshape(len(array), -1, spec.head_dim) for _, array in grads),
        )
        return tuple(grad if wanted else None for (grad, _), wanted in zip(grads, ctx.wanted, strict=True))


def _by_head(x: Tensor, head_dim: int) -> Floats:
    return read(x).reshape(x.shape[0], -1, head_dim)
