"""The mixture of experts, differentiable: gate weights by the router's logits, experts by their own rows.

The choice of experts is not differentiated: gradients reach the router through the weights of the chosen ones, where
these are not given as constants.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paddle.autograd import PyLayer

from zerokl.kernels.autograd.arrays import Floats, empty, read
from zerokl.kernels.autograd.linear import weight_gradient
from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.moe import ExpertRows, sort_by_expert
from zerokl.kernels.experts import Replay, RouterSpec, Routing

Tensor = Any  # paddle.Tensor
Experts = tuple[tuple[Tensor, Tensor, Tensor], ...]
Ids = NDArray[np.int32]


def route(logits: Tensor, correction: Floats | None, spec: RouterSpec, replay: Replay | None) -> Routing[Tensor]:
    """Ids [T, k] chosen from logits [T, X], or given by `replay`, and their weights, differentiable."""
    ids = np.empty((logits.shape[0], spec.top_k), np.int32) if replay is None else replay.experts.copy()
    return Routing(ids, _Route.apply(logits, correction, spec, ids, replay))


def moe(x: Tensor, routing: Routing[Tensor], experts: Experts, shared: Tensor | None) -> Tensor:
    """See `Ops.moe`; experts are (gate, up, down)."""
    operands = [matrix for expert in experts for matrix in expert]
    order = sort_by_expert(routing.experts, len(experts))
    return _Experts.apply(x, routing.weights, shared, order, *operands)


class _Route(PyLayer):  # type: ignore[misc]  # Paddle has no complete stubs
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, correction: Floats | None, spec: RouterSpec, ids: Ids, replay: Replay | None
    ) -> Tensor:
        weights, array = empty(*ids.shape)
        _cpu.route(read(logits), correction, spec.normalise, spec.norm_min, ids, array, replay is not None)
        if replay is not None:
            replay.put_weights(array)
        ctx.save_for_backward(logits)
        ctx.choice = (spec, ids.astype(np.int64))
        ctx.constant = None if replay is None or replay.weights is None else replay.given
        return weights

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensor()
        spec, ids = ctx.choice
        values = read(logits).astype(np.float64)
        p = np.exp(values - values.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        dchosen = read(dweights).astype(np.float64)
        if ctx.constant is not None:
            dchosen *= ~ctx.constant
        if spec.normalise:
            chosen = np.take_along_axis(p, ids, axis=1)
            total = chosen.sum(axis=1, keepdims=True)
            divisor = np.maximum(total, spec.norm_min)
            through_sum = (dchosen * chosen).sum(axis=1, keepdims=True) / divisor
            dchosen = (dchosen - np.where(total > spec.norm_min, through_sum, 0.0)) / divisor
        dp = np.zeros_like(p)
        np.put_along_axis(dp, ids, dchosen, axis=1)
        dlogits, out = empty(*p.shape)
        out[:] = p * (dp - (dp * p).sum(axis=1, keepdims=True))
        return dlogits


class _Experts(PyLayer):  # type: ignore[misc]
    """Operands: gate, up and down of each expert. Keeps the rows of every product for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, shared: Tensor | None, order: ExpertRows, *operands: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weights, *operands)
        ctx.wanted = [None if t is None else not t.stop_gradient for t in (x, weights, shared, *operands)]
        count, hidden, inner = len(order.tokens), x.shape[1], operands[0].shape[0]
        rows, outputs = np.empty((count, hidden), np.float32), np.empty((count, hidden), np.float32)
        _cpu.gather_rows(read(x), order.tokens, rows)
        gated, lifted, mixed = (np.empty((count, inner), np.float32) for _ in range(3))
        for expert, some in _groups(order):
            gate, up, down = (read(t) for t in operands[3 * expert : 3 * expert + 3])
            _cpu.linear_unpacked(rows[some], gate, None, gated[some])
            _cpu.linear_unpacked(rows[some], up, None, lifted[some])
            _cpu.swiglu(gated[some], lifted[some], mixed[some])
            _cpu.linear_unpacked(mixed[some], down, None, outputs[some])
        out, out_array = empty(*x.shape)
        _cpu.combine(outputs, order.rows, read(weights), None if shared is None else read(shared), out_array)
        ctx.saved = (order, rows, gated, lifted, mixed, outputs)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [flag for flag in ctx.wanted if flag is not None]  # Paddle wants one entry per tensor given
        if dout is None:
            return (None,) * len(wanted)
        _, weights, *operands = ctx.saved_tensor()
        order, outputs, dy = ctx.saved[0], ctx.saved[-1], read(dout)
        drows = dy[order.tokens]
        dweights, dweights_array = empty(*weights.shape)
        dweights_array[:] = (drows * outputs).sum(axis=1)[order.rows]
        by_row = np.empty(len(drows), np.float32)
        by_row[order.rows.ravel()] = read(weights).ravel()
        drows *= by_row[:, None]
        dinputs, gradients = _expert_gradients(ctx.saved, drows, [read(t) for t in operands])
        dx, dx_array = empty(*dy.shape)
        _cpu.combine(dinputs, order.rows, np.ones(order.rows.shape, np.float32), None, dx_array)
        results: list[Tensor | None] = [dx, dweights]
        if ctx.wanted[2] is not None:
            dshared, dshared_array = empty(*dy.shape)
            np.copyto(dshared_array, dy)
            results.append(dshared)
        results += gradients
        return tuple(result if flag else None for result, flag in zip(results, wanted, strict=True))


def _groups(order: ExpertRows) -> list[tuple[int, slice]]:
    """The experts that have rows, with these."""
    pairs = enumerate(pairwise(order.starts.tolist()))
    return [(expert, slice(first, last)) for expert, (first, last) in pairs if first < last]


def _expert_gradients(saved: Any, doutputs: Floats, operands: list[Floats]) -> tuple[Floats, list[Tensor | None]]:
    """Gradients of the gathered rows, and of the operands; None for experts that nobody chose."""
    order, rows, gated, lifted, mixed, _ = saved
    dinputs = np.empty_like(rows)
    gradients: list[Tensor | None] = [None] * len(operands)
    for expert, some in _groups(order):
        gate, up, down = operands[3 * expert : 3 * expert + 3]
        dmixed = np.empty_like(mixed[some])
        _cpu.matmul(doutputs[some], down, dmixed)
        dgated, dlifted = np.empty_like(dmixed), np.empty_like(dmixed)
        _cpu.swiglu_backward(dmixed, gated[some], lifted[some], dgated, dlifted)
        _cpu.matmul(dgated, gate, dinputs[some])
        _cpu.matmul(dlifted, up, dinputs[some], accumulate=True)
        pairs = ((dgated, rows[some]), (dlifted, rows[some]), (doutputs[some], mixed[some]))
        gradients[3 * expert : 3 * expert + 3] = [weight_gradient(left, right) for left, right in pairs]
    return dinputs, gradients
