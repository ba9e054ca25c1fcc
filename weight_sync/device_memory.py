"""What the transport through a GPU's memory asks of the GPU: few calls, so that tests can play one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

DEVICE_DTYPES = ("bfloat16", "float32")
"""Element types of tensors in device memory."""


class StoredTensor(NamedTuple):
    """A C-contiguous tensor in device memory, as rows: one of another rank than 2 is one row."""

    address: int
    rows: int
    columns: int
    dtype: str
    """One of DEVICE_DTYPES."""


def as_rows(address: int, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    """A tensor of this shape as rows."""
    if len(shape) == 2:
        return StoredTensor(address, shape[0], shape[1], dtype)
    return StoredTensor(address, 1, math.prod(shape), dtype)


class MappedMemory(Protocol):
    """One GPU as a process sees it that reads what others have on it, or on a peer.

    Handles are bytes that another process of this machine may open; addresses are numbers of this process.
    Every method raises RuntimeError naming what the driver says, where nothing else is said.
    """

    gpu: str
    """What the GPU is called in all processes of the machine."""

    def reaches(self, gpu: str) -> bool:
        """Whether this GPU can read what others have on the GPU of that name, as far as can be told before trying."""
        ...

    def allocation_of(self, address: int) -> tuple[int, int]:
        """First address and size in bytes of the allocation that holds this one."""
        ...

    def open_memory(self, handle: bytes) -> int:
        """Map another process's allocation; returns its first address here."""
        ...

    def close_memory(self, base: int) -> None:
        """Unmap what `open_memory` mapped."""
        ...


class ReadableMemory(MappedMemory, Protocol):
    """With copies to the host."""

    def download(self, host: int, address: int, size: int) -> None:
        """Copy to the host's memory; there after `synchronize`."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was asked for."""
        ...


class DeviceMemory(MappedMemory, Protocol):
    """With a stream of its own on which all that is asked for here happens in turn."""

    def allocation_ids(self, bases: Sequence[int]) -> list[int]:
        """A number of each allocation, by its first address, which no other of this process ever has."""
        ...

    def gpu_of(self, base: int) -> str:
        """The name, as `gpu`, of the one that an allocation of this process is on."""
        ...

    def export_memory(self, base: int) -> bytes:
        """A handle of the allocation that begins at `base`."""
        ...

    def allocate(self, size: int) -> int:
        """Memory of this process that may be exported, for `free`; its address is a multiple of 256."""
        ...

    def free(self, base: int) -> None:
        """Give back what `allocate` gave."""
        ...

    def settle(self, stream: int | None) -> None:
        """Wait until what was launched on a stream of this process so far is done; None: on the framework's."""
        ...

    def plan(self, tensors: Sequence[StoredTensor], targets: Sequence[int] | None = None) -> Any:
        """How to read these tensors, and with `targets` copy each to an address: for any number of times."""
        ...

    def begin_checksums(self, plan: Any) -> Callable[[], NDArray[np.uint64]]:
        """Have the device carry a plan out; returns at once.

        What it returns waits for it, in any thread, and gives `device_checksum` of each tensor, of a copy as it is
        where it was copied to. It is called once, and before anything else is asked for here.
        """
        ...
