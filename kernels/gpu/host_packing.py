"""Packs weights that are in the host's memory: the operands that every other packer of a GPU gives, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.gpu.device import Device
from zerokl.kernels.gpu.packed import Dtype, PackedExperts, PackedGateUp, PackedLinear, Tensor, dtype_of_shape


class HostPacker:
    """A `zerokl.kernels.dispatch.WeightPacker` of NumPy arrays of float32 or, as uint16 patterns, of bfloat16.

    Keeps nothing: any thread may use it.
    """

    def __init__(self, device: Device, dtype: Dtype) -> None:
        """`dtype`: of matrices."""
        self._device = device
        self._dtype = dtype

    def tensor(self, values: NDArray[Any]) -> Tensor:
        """A copy on the device: matrices in the table's type, vectors and angle tables in float32."""
        return self._place(values, dtype_of_shape(values.shape, self._dtype))

    def pack_linear(self, weights: Sequence[Any], biases: Sequence[Any]) -> PackedLinear:
        """See `Ops.pack_linear`. A missing bias beside a present one counts as zeros.

        A single matrix that is on the device already (the embedding of a tied model) is shared, not copied.
        """
        if len(weights) == 1 and not isinstance(weights[0], np.ndarray):
            assert biases[0] is None
            return PackedLinear(weights[0], None)
        bias = None
        if any(part is not None for part in biases):
            pairs = zip(weights, biases, strict=True)
            parts = [np.zeros(len(w), np.float32) if b is None else _widened(b) for w, b in pairs]
            bias = self._place(np.concatenate(parts), "float32")
        return PackedLinear(self._place(np.concatenate(_alike(weights)), self._dtype), bias)

    def pack_gate_up(self, gate: Any, up: Any) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        return PackedGateUp(self._place(_in_turn(gate, up), self._dtype))

    def pack_experts(self, count: int, experts: Iterable[tuple[Any, Any, Any]]) -> PackedExperts:
        """See `Ops.pack_experts`."""
        parts = [(_in_turn(gate, up), down) for gate, up, down in experts]
        assert len(parts) == count, f"{count} experts were promised, {len(parts)} came"
        gate_ups, downs = (_alike(some) for some in zip(*parts, strict=True))
        return PackedExperts(self._place(np.stack(gate_ups), self._dtype), self._place(np.stack(downs), self._dtype))

    def _place(self, values: NDArray[Any], dtype: str) -> Tensor:
        if dtype == "float32":
            return self._device.put(_widened(values))
        return self._device.put(values if values.dtype == np.uint16 else _bfloat16_bits(values))


def _in_turn(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    return np.stack(_alike([gate, up]), axis=1).reshape(-1, gate.shape[1])


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to nearest even, as bits: Paddle takes uint16 for bfloat16. NaNs may change."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _alike(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The arrays as they are if all are patterns, else as float32."""
    return list(arrays) if all(array.dtype == np.uint16 for array in arrays) else [_widened(a) for a in arrays]


def _widened(values: NDArray[Any]) -> NDArray[np.float32]:
    """float32 values, of bfloat16 patterns too."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(values, np.float32)
