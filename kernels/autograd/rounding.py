"""Weights rounded for the forward, while their gradients reach the unrounded ones as they are."""

from __future__ import annotations

from typing import Any

from paddle.autograd import PyLayer

from zerokl.kernels.autograd.arrays import empty, read
from zerokl.kernels.cpu import _cpu

Tensor = Any  # paddle.Tensor


def round_to_bfloat16(x: Tensor) -> Tensor:
    """Each float32 value of x as the nearest bfloat16 value, ties to even; the gradient passes through unchanged."""
    return _Round.apply(x)


class _Round(PyLayer):  # type: ignore[misc]  # Paddle has no complete stubs
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        out, out_array = empty(*x.shape)
        _cpu.round_bfloat16(read(x).reshape(-1), out_array.reshape(-1))
        return out

    @staticmethod
    def backward(_ctx: Any, dout: Tensor) -> Tensor:
        return dout.clone()
