"""Weights in the form that the products read them in, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.arena import Slabs
from zerokl.kernels.cpu.moe import PackedExperts
from zerokl.kernels.row_stream import ArrayRows, NonFiniteWeightsError, RowStream

Floats = NDArray[np.float32]
Operand = Floats | RowStream

_COLUMNS = 32
_LANES = 16
_PIECE_BYTES = 1 << 19
"""Read, looked at, and packed while in the second-level cache."""


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
    """Packs piece by piece on the calling thread.

    A piece lies in that thread's cache: to share it out over the pool takes longer. And the pool serves one caller at a
    time, which is to be a step. Tensors are arrays or `RowStream`s; those that bear a name must be finite
    (NonFiniteWeightsError). Not for use by several threads at once.
    """

    def __init__(self, slabs: Slabs | None = None) -> None:
        self.slabs = Slabs() if slabs is None else slabs

    def next_set(self) -> Packer:
        """A packer for another set of weights, in the same memory."""
        self.slabs.finish()
        return Packer(self.slabs)

    def tensor(self, values: Operand) -> Floats:
        """A copy in the memory of packed weights."""
        source = _stream(values)
        kept = self.slabs.take(*source.shape)
        self._copy_rows(source, kept.reshape(_matrix(source)))
        return kept

    def pack_linear(self, weights: Sequence[Operand], biases: Sequence[Operand | None]) -> PackedLinear:
        """See `Ops.pack_linear`. A missing bias beside a present one counts as zeros."""
        sources = [_stream(weight) for weight in weights]
        outputs, inputs = sum(source.shape[0] for source in sources), sources[0].shape[1]
        bias = None
        if any(part is not None for part in biases):
            parts = [
                np.zeros(source.shape[0], np.float32) if part is None else self._whole(_stream(part))
                for source, part in zip(sources, biases, strict=True)
            ]
            bias = np.concatenate(parts)
        panels = self.slabs.take(-(-outputs // _COLUMNS), inputs, _COLUMNS)
        if any(source.shape[0] % _COLUMNS for source in sources[:-1]):
            sources = [ArrayRows(np.concatenate([self._whole(source) for source in sources]))]
        first = 0
        for source in sources:
            self._pack_rows(source, panels[first:])
            first += source.shape[0] // _COLUMNS
        return PackedLinear(panels, bias, outputs)

    def pack_gate_up(self, gate: Operand, up: Operand) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        gates, ups = _stream(gate), _stream(up)
        outputs, inputs = gates.shape
        panels = self.slabs.take(-(-2 * outputs // _COLUMNS), inputs, _COLUMNS)
        self._pack_pairs(gates, ups, panels)
        return PackedGateUp(panels, outputs)

    def pack_experts(self, count: int, experts: Iterable[tuple[Operand, Operand, Operand]]) -> PackedExperts:
        """See `Ops.pack_experts`: triples (gate [F, E], up [F, E], down [E, F]) that are read one at a time."""
        source = iter(experts)
        first = next(source)
        inner, hidden = first[0].shape
        gate_up = self.slabs.take(count, -(-inner // _LANES), hidden, _COLUMNS)
        down = self.slabs.take(count, -(-hidden // _COLUMNS), inner, _COLUMNS)
        for index, (gate, up, out) in enumerate(chain([first], source)):
            self._pack_pairs(_stream(gate), _stream(up), gate_up[index])
            self._pack_rows(_stream(out), down[index])
        return PackedExperts(gate_up, down, inner)

    def _pack_pairs(self, gate: RowStream, up: RowStream, panels: Floats) -> None:
        for start, stop in _pieces(gate, _LANES):
            gate.wait(stop)
            up.wait(stop)
            rows, others = gate.read(stop), up.read(stop)
            if rows.dtype != others.dtype:
                rows, others = _widened(rows), _widened(others)
            part = panels[start // _LANES : -(-stop // _LANES)]
            if not _cpu.pack_gate_up(rows, others, part, pool=False):
                _refuse(gate if not np.isfinite(_widened(rows)).all() else up)

    def _pack_rows(self, source: RowStream, panels: Floats) -> None:
        for start, stop in _pieces(source, _COLUMNS):
            part = panels[start // _COLUMNS : -(-stop // _COLUMNS)]
            if not _cpu.pack_linear(source.read(stop), part, pool=False):
                _refuse(source)

    def _copy_rows(self, source: RowStream, target: Floats) -> None:
        for start, stop in _pieces(source, 1):
            if not _cpu.copy_weights(source.read(stop).reshape(-1), target[start:stop].reshape(-1)):
                _refuse(source)

    def _whole(self, source: RowStream) -> Floats:
        values = np.empty(_matrix(source), np.float32)
        self._copy_rows(source, values)
        return values.reshape(source.shape)


def _stream(operand: Operand) -> RowStream:
    return ArrayRows(operand) if isinstance(operand, np.ndarray) else operand


def _matrix(source: RowStream) -> tuple[int, int]:
    shape = source.shape
    return (shape[0], shape[1]) if len(shape) == 2 else (1, int(np.prod(shape)))


def _pieces(source: RowStream, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, whole groups of them but for the last, that fit the cache."""
    rows, width = _matrix(source)
    count = max(1, _PIECE_BYTES // (4 * group * max(1, width))) * group
    for start in range(0, rows, count):
        yield start, min(start + count, rows)


def _refuse(source: RowStream) -> None:
    if source.name is not None:
        raise NonFiniteWeightsError(source.name)


def _widened(rows: NDArray[Any]) -> Floats:
    """Rows of a stream as float32."""
    wide: Floats = rows
    if rows.dtype == np.float32:
        return wide
    wide = np.empty(rows.shape, np.float32)
    _cpu.copy_weights(rows.reshape(-1), wide.reshape(-1))
    return wide


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
