"""Copies between host and device that nobody waits for: through pinned memory that is used again once it is free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.gpu.device import Device

if TYPE_CHECKING:
    from zerokl.kernels.gpu.elementwise import Tensor

Ints = NDArray[np.int32]


class _Buffers:
    """Pinned arrays, each with the event that says when its copy is over."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: list[Ints] = []

    def take(self, size: int) -> Ints:
        """At least `size` entries."""
        for index, buffer in enumerate(self._free):
            if len(buffer) >= size:
                return self._free.pop(index)
        return self._device.pinned(max(1 << 14, 1 << (size - 1).bit_length()))

    def give(self, buffer: Ints) -> None:
        """The caller's copy is over."""
        self._free.append(buffer)


class Uploads:
    """Copies to the device; the source may be changed as soon as `send` returns."""

    def __init__(self, device: Device, most: int = 3) -> None:
        """`most` copies may be under way."""
        self._device = device
        self._buffers = _Buffers(device)
        self._most = most
        self._under_way: list[tuple[Ints, Any]] = []

    def send(self, values: Ints, tensor: Tensor) -> None:
        """Copy `values` [n] to the first n entries of an int32 tensor, in the order of launches."""
        if len(self._under_way) == self._most:
            buffer, event = self._under_way.pop(0)
            self._device.wait(event)
            self._buffers.give(buffer)
        buffer = self._buffers.take(len(values))
        buffer[: len(values)] = values
        self._device.upload(buffer[: len(values)], tensor)
        self._under_way.append((buffer, self._device.mark()))


class Downloads:
    """Copies to the host that are waited for later."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers = _Buffers(device)

    def fetch(self, tensor: Tensor, size: int) -> Fetch:
        """Begin a copy of the first `size` 4-byte entries of a tensor, as they are after what was launched so far."""
        buffer = self._buffers.take(size)
        self._device.download(tensor, buffer[:size])
        return Fetch(self._device, self._buffers, buffer, size, self._device.mark())


class Fetch:
    """A copy under way."""

    def __init__(self, device: Device, buffers: _Buffers, buffer: Ints, size: int, event: Any) -> None:
        self._device, self._buffers, self._buffer, self._size, self._event = device, buffers, buffer, size, event

    def result(self) -> Ints:
        """Wait; the entries [size], the caller's to keep. Asked for once."""
        self._device.wait(self._event)
        values: Ints = self._buffer[: self._size].copy()
        self._buffers.give(self._buffer)
        return values
