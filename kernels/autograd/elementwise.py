"""PyLayers of the ops without matrix products: embedding, norms, rotary embedding, SwiGLU, row gather.

Arrays are treated as rows of the op's natural width, so a [T, H * D] tensor can be normed or rotated per head as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle.autograd import PyLayer

from zerokl.kernels.autograd.arrays import Floats, empty, read, zeros
from zerokl.kernels.cpu import _cpu

Tensor = paddle.Tensor
Ids = NDArray[np.int32]


class Embedding(PyLayer):  # type: ignore[misc]  # Paddle has no complete stubs
    """(table [V, E], ids [T]) -> [T, E]. The gradient adds rows in token order."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Ids) -> Tensor:
        ctx.ids, ctx.shape = ids, tuple(table.shape)
        out, out_array = empty(ids.shape[0], table.shape[1])
        _cpu.embedding(ids, read(table), out_array)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        dtable, dtable_array = zeros(*ctx.shape)
        _cpu.embedding_backward(ctx.ids, read(dout), dtable_array)
        return dtable


class GatherRows(PyLayer):  # type: ignore[misc]
    """(x [T, E], rows [R]) -> [R, E]. A row that is taken twice gets both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Ids) -> Tensor:
        ctx.rows, ctx.shape = rows, tuple(x.shape)
        out, out_array = empty(rows.shape[0], x.shape[1])
        _cpu.gather_rows(read(x), rows, out_array)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        dx, dx_array = zeros(*ctx.shape)
        _cpu.embedding_backward(ctx.rows, read(dout), dx_array)
        return dx


def _norm_gradients(dy: Floats, x: Floats, weight: Floats, inv: Floats, dx: Floats) -> Tensor:
    dweight, dweight_array = zeros(weight.shape[0])
    width = weight.shape[0]
    _cpu.rms_norm_backward(dy.reshape(-1, width), x.reshape(-1, width), weight, inv, dx.reshape(-1, width), dweight_array)
    return dweight


class RMSNorm(PyLayer):  # type: ignore[misc]
    """(x [.., k * n], weight [n], eps) -> groups of n entries, each normed and scaled (arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wanted = (not x.stop_gradient, not weight.stop_gradient)
        width = weight.shape[0]
        rows = read(x).reshape(-1, width)
        out, out_array = empty(*x.shape)
        ctx.inv = np.empty(rows.shape[0], np.float32)
        _cpu.rms_norm(rows, read(weight), eps, out_array.reshape(-1, width), ctx.inv)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensor()
        dx, dx_array = empty(*x.shape)
        dweight = _norm_gradients(read(dy), read(x), read(weight), ctx.inv, dx_array)
        wanted_x, wanted_weight = ctx.wanted
        return dx if wanted_x else None, dweight if wanted_weight else None


class AddRMSNorm(PyLayer):  # type: ignore[misc]
    """(residual [T, E], delta [T, E], weight [E], eps) -> (residual + delta, its RMSNorm), both differentiable."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, total_array = empty(*residual.shape)
        out, out_array = empty(*residual.shape)
        ctx.inv = np.empty(residual.shape[0], np.float32)
        _cpu.add_rms_norm(read(residual), read(delta), read(weight), eps, total_array, out_array, ctx.inv)
        # The sum is an output: saved as an array, since a saved output would hold itself alive through the graph.
        ctx.total = total_array
        ctx.save_for_backward(weight)
        ctx.wanted = [not t.stop_gradient for t in (residual, delta, weight)]
        return total, out

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensor()
        dx, dx_array = zeros(*ctx.total.shape)
        dweight = None
        if dy is not None:
            dweight = _norm_gradients(read(dy), ctx.total, read(weight), ctx.inv, dx_array)
        if dtotal is not None:
            np.add(dx_array, read(dtotal), out=dx_array)
        wanted_residual, wanted_delta, wanted_weight = ctx.wanted
        ddelta = None
        if wanted_delta:
            # A copy: Paddle adds further gradients of `residual` into dx in place.
            ddelta, ddelta_array = empty(*dx_array.shape)
            np.copyto(ddelta_array, dx_array)
        return dx if wanted_residual else None, ddelta, dweight if wanted_weight else None


class Rope(PyLayer):  # type: ignore[misc]
    """(x [T, n * D], positions [T], table [P, 2, D / 2], interleaved) -> x rotated by position (arXiv:2104.09864).

    The gradient is the rotation backwards.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Ids, table: Floats, interleaved: bool) -> Tensor:
        ctx.rotation = (positions, table, interleaved)
        return _rotate(x, positions, table, interleaved, False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return _rotate(dout, *ctx.rotation, True)


def _rotate(x: Tensor, positions: Ids, table: Floats, interleaved: bool, inverse: bool) -> Tensor:
    heads = (positions.shape[0], -1, 2 * table.shape[2])
    out, out_array = empty(*x.shape)
    _cpu.rope(read(x).reshape(heads), positions, table, interleaved, inverse, out_array.reshape(heads))
    return out


class SwiGLU(PyLayer):  # type: ignore[misc]
    """(gate [T, F], up [T, F]) -> silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.wanted = (not gate.stop_gradient, not up.stop_gradient)
        out, out_array = empty(*gate.shape)
        _cpu.swiglu(read(gate), read(up), out_array)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensor()
        dgate, dgate_array = empty(*gate.shape)
        dup, dup_array = empty(*up.shape)
        _cpu.swiglu_backward(read(dout), read(gate), read(up), dgate_array, dup_array)
        wanted_gate, wanted_up = ctx.wanted
        return dgate if wanted_gate else None, dup if wanted_up else None
