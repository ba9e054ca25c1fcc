"""Op tables that are not batch invariant, in ways that real engines are: what exactness tests must find out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu.ops import CpuOps, PackedLinear
from zerokl.kernels.ops import KVPool, StepInputs
from zerokl.rollout import model_runner

Floats = NDArray[np.float32]
Product = Callable[[Floats, Floats], Floats]
MakeOps = Callable[[int | None], CpuOps]
"""From a number of threads."""


def numpy_product(x: Floats, weight: Floats) -> Floats:
    """[T, K] x [N, K] -> [T, N]; the library picks its order of additions by the number of rows."""
    return np.matmul(x, weight.T)


@dataclass(frozen=True, slots=True)
class PlainLinear(PackedLinear):
    weight: Floats


class OrdinaryOps(CpuOps):
    """CpuOps with a library's matrix products, for every step or for those with few rows."""

    def __init__(
        self, product: Product = numpy_product, num_threads: int | None = None, *, below_rows: float = np.inf
    ) -> None:
        super().__init__(num_threads)
        self._product = product
        self._below_rows = below_rows

    def pack_linear(self, weights: Any, biases: Any) -> PackedLinear:
        packed = super().pack_linear(weights, biases)
        return PlainLinear(packed.panels, packed.bias, packed.num_outputs, np.concatenate(weights))

    def linear(self, x: Floats, weight: PackedLinear) -> Floats:
        if len(x) >= self._below_rows:
            return super().linear(x, weight)
        assert isinstance(weight, PlainLinear)
        out = self._product(x, weight.weight)
        return out if weight.bias is None else out + weight.bias

    qkv_linear = linear


class PhaseOps(CpuOps):
    """CpuOps whose matrix products round their inputs to bfloat16 in steps of one phase, and are ours in the others.

    A step is of the phase "prefill" if any sequence has more than one token in it, else "decode": as an engine that has
    a kernel for each phase, one of them aligned with the trainer, chooses by what else is in the batch.
    """

    def __init__(self, rounded_phase: str, num_threads: int | None = None) -> None:
        super().__init__(num_threads)
        self._rounded_phase = rounded_phase
        self._rounds = False

    def begin_step(self, inputs: StepInputs, pool: KVPool[Floats]) -> None:
        phase = "prefill" if (np.diff(inputs.seq_starts) > 1).any() else "decode"
        self._rounds = phase == self._rounded_phase
        super().begin_step(inputs, pool)

    def linear(self, x: Floats, weight: PackedLinear) -> Floats:
        return super().linear(as_bfloat16(x) if self._rounds else x, weight)

    qkv_linear = linear


def as_bfloat16(x: Floats) -> Floats:
    """Rounded to the nearest bfloat16, ties to even; finite values."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@contextmanager
def engines_use(make_ops: MakeOps) -> Iterator[None]:
    """Workers that are made inside, in this process, run on these ops."""
    with mock.patch.object(model_runner, "get_ops", lambda device, num_threads, *given: make_ops(num_threads)):
        yield
