"""The ops without matrix products, differentiable: embedding, row gather, norms, rotary embedding.

Norms and rotation take rows of their own width out of the last axis, so that a [T, H * D] tensor is normed or rotated
per head as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paddle.autograd import PyLayer

from zerokl.kernels.autograd.arrays import Floats, empty, read, zeros
from zerokl.kernels.cpu import _cpu

Tensor = Any  # paddle.Tensor
Ids = NDArray[np.int32]


def embedding(table: Tensor, ids: Ids) -> Tensor:
    """[V, E], [T] -> [T, E]. The table's gradient adds rows in token order."""
    return _TakeRows.apply(table, ids, _cpu.embedding)


def gather_rows(x: Tensor, rows: Ids) -> Tensor:
    """[T, E], [R] -> [R, E]. A row that is taken twice gets both gradients, in order."""
    return _TakeRows.apply(x, rows, _gather)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each group of n entries of x [.., k * n] normed to unit mean square and times weight [n] (arXiv:1910.07467)."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + delta, its rms_norm), both [T, E] and both differentiable."""
    total, normed = _AddRMSNorm.apply(residual, delta, weight, eps)
    return total, normed


def rope(x: Tensor, positions: Ids, table: Floats, interleaved: bool) -> Tensor:
    """x [T, n * D] rotated by its positions [T] (arXiv:2104.09864); table [P, 2, D / 2] holds cosines and sines."""
    return _Rope.apply(x, positions, table, interleaved)


class _TakeRows(PyLayer):  # type: ignore[misc]  # Paddle has no complete stubs
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Ids, kernel: Callable[[Ids, Floats, Floats], None]) -> Tensor:
        ctx.rows, ctx.shape = rows, tuple(table.shape)
        out, out_array = empty(rows.shape[0], table.shape[1])
        kernel(rows, read(table), out_array)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        dtable, dtable_array = zeros(*ctx.shape)
        _cpu.embedding_backward(ctx.rows, read(dout), dtable_array)
        return dtable


def _gather(rows: Ids, x: Floats, out: Floats) -> None:
    _cpu.gather_rows(x, rows, out)


def _norm_gradients(dy: Floats, x: Floats, weight: Floats, inv: Floats, dx: Floats) -> Tensor:
    dweight, dweight_array = empty(weight.shape[0])
    dy, x, dx = (array.reshape(-1, weight.shape[0]) for array in (dy, x, dx))
    _cpu.rms_norm_backward(dy, x, weight, inv, dx, dweight_array)
    return dweight


class _RMSNorm(PyLayer):  # type: ignore[misc]
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


class _AddRMSNorm(PyLayer):  # type: ignore[misc]
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
        dx, dx_array = empty(*ctx.total.shape)
        dweight = None
        if dy is None:
            dx_array.fill(0.0)
        else:
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


class _Rope(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Ids, table: Floats, interleaved: bool) -> Tensor:
        ctx.rotation = (positions, table, interleaved)
        return _rotate(x, positions, table, interleaved, False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        positions, table, interleaved = ctx.rotation
        return _rotate(dout, positions, table, interleaved, True)


def _rotate(x: Tensor, positions: Ids, table: Floats, interleaved: bool, inverse: bool) -> Tensor:
    heads = (positions.shape[0], -1, 2 * table.shape[2])
    out, out_array = empty(*x.shape)
    _cpu.rope(read(x).reshape(heads), positions, table, interleaved, inverse, out_array.reshape(heads))
    return out
