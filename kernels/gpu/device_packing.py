"""Packs tensors that are on the device already: what `HostPacker` makes of arrays, by copies on the device alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.device_tensors import DeviceTensor, Placement, rows_of
from zerokl.kernels.gpu.copy_plan import CopyPlan
from zerokl.kernels.gpu.packed import PackedExperts, PackedGateUp, PackedLinear, Tensor, dtype_of_shape
from zerokl.kernels.row_stream import NonFiniteWeightsError

if TYPE_CHECKING:
    from zerokl.kernels.gpu.weight_slots import SlotUse, WeightSlots

Place = Callable[[CopyPlan], tuple[NDArray[np.uint64], NDArray[np.int32]]]
"""Carries a plan out and waits; gives each source's checksum, as of what came to its place, and how often it holds a
NaN or an infinity."""

_SIZES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class _Filling:
    """How a slot is filled from some tensors."""

    tensors: object
    packed: Any
    names: tuple[str, ...]
    """Of the plan's placements."""
    plan: CopyPlan


class DevicePacker:
    """A `zerokl.kernels.dispatch.WeightPacker` of DeviceTensors into a free slot; `fill` does the copying.

    Matrices get the table's type, vectors float32, as `HostPacker` has them.
    """

    def __init__(self, slots: WeightSlots, dtype: str, place: Place) -> None:
        self._slot = slots.free_slot()
        self.use: SlotUse = self._slot.begin()
        """Holds the slot for the set."""
        self._dtype = dtype
        self._place = place
        self._names: list[str] = []
        self._placements: list[Placement] = []

    def tensor(self, values: DeviceTensor) -> Tensor:
        """See `HostPacker.tensor`."""
        dtype = dtype_of_shape(values.shape, self._dtype)
        target = self._slot.take(values.shape, dtype)
        self._add(values, target, dtype)
        return target

    def pack_linear(self, weights: Sequence[Any], biases: Sequence[Any]) -> PackedLinear:
        """See `HostPacker.pack_linear`; of the biases all are there or none."""
        if len(weights) == 1 and not isinstance(weights[0], DeviceTensor):
            return PackedLinear(weights[0], None)
        weight = self._joined(weights, self._dtype)
        if biases[0] is None:
            assert all(bias is None for bias in biases), "some of the biases"
            return PackedLinear(weight, None)
        return PackedLinear(weight, self._joined(biases, "float32"))

    def pack_gate_up(self, gate: DeviceTensor, up: DeviceTensor) -> PackedGateUp:
        """See `HostPacker.pack_gate_up`."""
        rows, columns = gate.shape
        target = self._slot.take((2 * rows, columns), self._dtype)
        self._add_in_turn(gate, up, target, 0)
        return PackedGateUp(target)

    def pack_experts(
        self, count: int, experts: Iterable[tuple[DeviceTensor, DeviceTensor, DeviceTensor]]
    ) -> PackedExperts:
        """See `HostPacker.pack_experts`."""
        parts = list(experts)
        assert len(parts) == count, f"{count} experts were promised, {len(parts)} came"
        rows, columns = parts[0][0].shape
        gate_up = self._slot.take((count, 2 * rows, columns), self._dtype)
        down = self._slot.take((count, columns, rows), self._dtype)
        for expert, (gate, up, out) in enumerate(parts):
            self._add_in_turn(gate, up, gate_up, expert * 2 * rows * columns)
            self._add(out, down, self._dtype, first=expert * rows * columns)
        return PackedExperts(gate_up, down)

    def fill(self, tensors: object, pack: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        """Copy all that `pack` packs here of these tensors, and wait.

        Returns what `pack` returns, and the checksums of what came to its place, by name. Where the tensors that filled
        this slot last were the same object, `pack` is not called: its result, and what goes where, were kept. Raises
        NonFiniteWeightsError naming a tensor that holds a NaN or an infinity.
        """
        filling: _Filling | None = self._slot.filling
        if filling is None or filling.tensors is not tensors:
            packed = pack()
            filling = _Filling(tensors, packed, tuple(self._names), CopyPlan(self._placements))
            self._slot.filling = filling
        checksums, broken = self._place(filling.plan)
        if broken.any():
            raise NonFiniteWeightsError(filling.names[int(broken.argmax())])
        return filling.packed, dict(zip(filling.names, checksums.tolist(), strict=True))

    def abandon(self) -> None:
        """Give the slot back: there will be no set. An error that is kept somewhere would hold it."""
        self._slot.leave()

    # -- inside --------------------------------------------------------------------------------------------------------
    def _joined(self, parts: Sequence[DeviceTensor], dtype: str) -> Tensor:
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        target = self._slot.take(shape, dtype)
        first = 0
        for part in parts:
            self._add(part, target, dtype, first=first)
            rows, columns = rows_of(part.shape)
            first += rows * columns
        return target

    def _add_in_turn(self, gate: DeviceTensor, up: DeviceTensor, target: Tensor, first: int) -> None:
        columns = gate.shape[1]
        for part, start in ((gate, first), (up, first + columns)):
            self._add(part, target, self._dtype, first=start, stride=2 * columns)

    def _add(
        self, source: DeviceTensor, target: Tensor, dtype: str, *, first: int = 0, stride: int | None = None
    ) -> None:
        """Rows of `source` go to entry `first` of the target, and on from `stride` entries further each."""
        rows, columns = rows_of(source.shape)
        address = int(target.data_ptr()) + first * _SIZES[dtype]
        self._names.append(source.name)
        self._placements.append(
            Placement(
                source.address, rows, columns, source.dtype, address, dtype, columns if stride is None else stride
            )
        )
