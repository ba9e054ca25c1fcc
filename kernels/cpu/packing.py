"""Weights in the form that the products read them in, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.arena import Slabs
from zerokl.kernels.cpu.moe import PackedExperts

Floats = NDArray[np.float32]

_COLUMNS = 32
_LANES = 16
_COPY_FLOATS = 1 << 18


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Matrices [N_i, K] on top of each other, in panels of 32 outputs."""

    panels: Floats
    """[ceil(N / 32), K, 32], zero padded."""
    bias: Floats | None
    """[N]"""
    num_outputs: int


@dataclass(frozen=True, slots=True)
class PackedGateUp:
    """Gate and up matrices [F, E] in panels of 16 gate and the 16 up outputs beside them."""

    panels: Floats
    """[ceil(F / 16), E, 32], zero padded."""
    num_outputs: int


class Packer:
    """Packs on all threads of the pool or, where steps run meanwhile, panel by panel on the calling thread.

    The pool serves one caller at a time, so that a step would wait for a large matrix to be packed; a single panel is
    packed without it. The bits are the same. Not for use by several threads at once.
    """

    def __init__(self, slabs: Slabs | None = None, *, beside_steps: bool = False) -> None:
        self.slabs = Slabs() if slabs is None else slabs
        self._stride = 1 if beside_steps else 1 << 30

    def next_set(self, *, beside_steps: bool) -> Packer:
        """A packer for another set of weights, in the same memory."""
        self.slabs.finish()
        return Packer(self.slabs, beside_steps=beside_steps)

    def tensor(self, values: Floats) -> Floats:
        """A copy in the memory of packed weights."""
        kept = self.slabs.take(*values.shape)
        source, target = np.ascontiguousarray(values).reshape(-1), kept.reshape(-1)
        for start in range(0, target.size, _COPY_FLOATS):
            np.copyto(target[start : start + _COPY_FLOATS], source[start : start + _COPY_FLOATS])
        return kept

    def pack_linear(self, weights: Sequence[Floats], biases: Sequence[Floats | None]) -> PackedLinear:
        """See `Ops.pack_linear`. A missing bias beside a present one counts as zeros."""
        outputs, inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
        bias = None
        if any(part is not None for part in biases):
            parts = [np.zeros(len(w), np.float32) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = np.concatenate(parts)
        panels = self.slabs.take(-(-outputs // _COLUMNS), inputs, _COLUMNS)
        if any(len(weight) % _COLUMNS for weight in weights[:-1]):
            weights = [np.concatenate(weights)]
        first = 0
        for weight in weights:
            self._pack_rows(np.ascontiguousarray(weight), panels[first:])
            first += len(weight) // _COLUMNS
        return PackedLinear(panels, bias, outputs)

    def pack_gate_up(self, gate: Floats, up: Floats) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        outputs, inputs = gate.shape
        panels = self.slabs.take(-(-2 * outputs // _COLUMNS), inputs, _COLUMNS)
        self._pack_pairs(np.ascontiguousarray(gate), np.ascontiguousarray(up), panels)
        return PackedGateUp(panels, outputs)

    def pack_experts(self, count: int, experts: Iterable[tuple[Floats, Floats, Floats]]) -> PackedExperts:
        """See `Ops.pack_experts`: triples (gate [F, E], up [F, E], down [E, F]) that are read one at a time."""
        source = iter(experts)
        first = next(source)
        inner, hidden = first[0].shape
        gate_up = self.slabs.take(count, -(-inner // _LANES), hidden, _COLUMNS)
        down = self.slabs.take(count, -(-hidden // _COLUMNS), inner, _COLUMNS)
        for index, (gate, up, out) in enumerate(chain([first], source)):
            self._pack_pairs(np.ascontiguousarray(gate), np.ascontiguousarray(up), gate_up[index])
            self._pack_rows(np.ascontiguousarray(out), down[index])
        return PackedExperts(gate_up, down, inner)

    def _pack_pairs(self, gate: Floats, up: Floats, panels: Floats) -> None:
        for index in range(0, len(panels), self._stride):
            rows = slice(index * _LANES, (index + self._stride) * _LANES)
            _cpu.pack_gate_up(gate[rows], up[rows], panels[index : index + self._stride])

    def _pack_rows(self, weight: Floats, panels: Floats) -> None:
        count = -(-len(weight) // _COLUMNS)
        for index in range(0, count, self._stride):
            end = min(index + self._stride, count)
            _cpu.pack_linear(weight[index * _COLUMNS : end * _COLUMNS], panels[index:end])


def unpack_linear(packed: PackedLinear) -> Floats:
    """The matrices on top of each other, [N, K], as they were packed."""
    panels, inputs, columns = packed.panels.shape
    rows = packed.panels.transpose(0, 2, 1).reshape(panels * columns, inputs)
    return np.ascontiguousarray(rows[: packed.num_outputs])


def unpack_gate_up(packed: PackedGateUp) -> tuple[Floats, Floats]:
    """The gate and the up matrix, [F, E] each, as they were packed."""
    panels, inputs, _ = packed.panels.shape
    halves = packed.panels.reshape(panels, inputs, 2, _LANES).transpose(2, 0, 3, 1)
    gate, up = (half.reshape(panels * _LANES, inputs)[: packed.num_outputs] for half in halves)
    return np.ascontiguousarray(gate), np.ascontiguousarray(up)


def unpack_expert(packed: PackedExperts, index: int, hidden_size: int) -> tuple[Floats, Floats, Floats]:
    """Expert `index`'s gate [F, E], up [F, E] and down [E, F], as they were packed."""
    gate, up = unpack_gate_up(PackedGateUp(packed.gate_up[index], packed.inner_size))
    return gate, up, unpack_linear(PackedLinear(packed.down[index], None, hidden_size))
