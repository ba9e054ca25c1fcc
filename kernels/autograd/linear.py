"""The matrix products, differentiable: fused linears over one input, and the two linears of a SwiGLU block.

Weights are read as they stand ([N, K], never packed): an optimizer writes to them without a trace that would tell that
a packed copy has gone stale. `linear_unpacked` gives the bits of the engine's packed `linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from paddle.autograd import PyLayer

from zerokl.kernels.autograd.arrays import Floats, empty, read
from zerokl.kernels.cpu import _cpu

Tensor = Any  # paddle.Tensor


def fused_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """x [T, K] -> x W_i^T + b_i [T, N_i] for each weight W_i [N_i, K] with its bias b_i [N_i], if it has one."""
    operands = [part for pair in zip(weights, biases, strict=True) for part in pair]
    return tuple(_FusedLinear.apply(x, *operands))


def swiglu_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T): [T, E] by two [F, E] -> [T, F] (arXiv:2002.05202)."""
    return _SwiGLULinear.apply(x, gate, up)


def _product(x: Floats, weight: Floats, bias: Floats | None) -> tuple[Tensor, Floats]:
    out, out_array = empty(x.shape[0], weight.shape[0])
    _cpu.linear_unpacked(x, weight, bias, out_array)
    return out, out_array


def weight_gradient(dout: Floats, x: Floats) -> Tensor:
    """dout^T x: the gradient [N, K] of a matrix, for dout [M, N] and x [M, K]."""
    dweight, dweight_array = empty(dout.shape[1], x.shape[1])
    _cpu.matmul(dout, x, dweight_array, trans_a=True)
    return dweight


def _bias_gradient(dout: Floats) -> Tensor:
    dbias, dbias_array = empty(dout.shape[1])
    np.add.reduce(dout, axis=0, out=dbias_array)  # over the outer axis: rows are added one by one, in order
    return dbias


def _input_gradient(douts: list[Floats], weights: list[Floats], width: int) -> Tensor:
    dx, dx_array = empty(douts[0].shape[0], width)
    for index, (dout, weight) in enumerate(zip(douts, weights, strict=True)):
        _cpu.matmul(dout, weight, dx_array, accumulate=index > 0)
    return dx


class _FusedLinear(PyLayer):  # type: ignore[misc]  # Paddle has no complete stubs
    """Operands: weight_0, bias_0 or None, weight_1, ..."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = operands[0::2], operands[1::2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        ctx.wanted = [None if t is None else not t.stop_gradient for t in (x, *operands)]
        array = read(x)
        products = (
            _product(array, read(weight), None if bias is None else read(bias))
            for weight, bias in zip(weights, biases, strict=True)
        )
        return tuple(out for out, _ in products)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensor()
        array = read(x)
        wanted_x, *wanted = ctx.wanted
        arrays = [None if dout is None else read(dout) for dout in douts]
        used = [(dout, read(weight)) for dout, weight in zip(arrays, weights, strict=True) if dout is not None]
        grads: list[Tensor | None] = [
            _input_gradient([dout for dout, _ in used], [weight for _, weight in used], array.shape[1])
            if wanted_x and used
            else None
        ]
        for index, dout in enumerate(arrays):
            wanted_weight, wanted_bias = wanted[2 * index], wanted[2 * index + 1]
            grads.append(weight_gradient(dout, array) if wanted_weight and dout is not None else None)
            if wanted_bias is not None:  # Paddle wants one entry per tensor that forward was given
                grads.append(_bias_gradient(dout) if wanted_bias and dout is not None else None)
        return tuple(grads)


class _SwiGLULinear(PyLayer):  # type: ignore[misc]
    """Keeps both products for backward, not the result: whoever needs that keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gate, up)
        ctx.wanted = [not t.stop_gradient for t in (x, gate, up)]
        array = read(x)
        _, gated = _product(array, read(gate), None)
        _, lifted = _product(array, read(up), None)
        out, out_array = empty(*gated.shape)
        _cpu.swiglu(gated, lifted, out_array)
        ctx.hidden = (gated, lifted)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None, None, None)
        x, gate, up = ctx.saved_tensor()
        array = read(x)
        gated, lifted = ctx.hidden
        dgated, dlifted = np.empty_like(gated), np.empty_like(lifted)
        _cpu.swiglu_backward(read(dout), gated, lifted, dgated, dlifted)
        wanted_x, wanted_gate, wanted_up = ctx.wanted
        return (
            _input_gradient([dgated, dlifted], [read(gate), read(up)], array.shape[1]) if wanted_x else None,
            weight_gradient(dgated, array) if wanted_gate else None,
            weight_gradient(dlifted, array) if wanted_up else None,
        )
