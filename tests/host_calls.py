"""The calls of `zerokl.kernels.gpu.cuda_calls.CudaCalls` over the host's memory, for kernels under the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class HostCalls:
    """One process: what others would open cannot be opened, and events are reached at once."""

    stream = 1
    gpu = "host"

    def __init__(self) -> None:
        self._arrays: dict[int, NDArray[np.uint8]] = {}

    def gpu_of(self, base: int) -> str:
        return self.gpu

    def reaches(self, gpu: str) -> bool:
        return True

    def allocate(self, size: int) -> int:
        array = np.zeros(size + 256, np.uint8)
        base = -(-array.ctypes.data // 256) * 256
        self._arrays[base] = array
        return base

    def free(self, base: int) -> None:
        del self._arrays[base]

    allocate_pinned, free_pinned = allocate, free

    def allocation_of(self, address: int) -> tuple[int, int]:
        """The page, as if all that follows belonged to it."""
        return address & ~0xFFF, 1 << 30

    def allocation_ids(self, bases: Sequence[int]) -> list[int]:
        return list(bases)

    def export_memory(self, base: int) -> bytes:
        return bytes(64)

    def new_event(self) -> int:
        return 1

    def record(self, event: int) -> None: ...

    def await_event(self, event: int) -> None: ...

    def upload(self, address: int, host: int, size: int) -> None:
        ctypes.memmove(address, host, size)

    def download(self, host: int, address: int, size: int) -> None:
        ctypes.memmove(host, address, size)

    def clear(self, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    def synchronize(self) -> None: ...

    def settle(self, stream: int) -> None: ...

    def open_memory(self, handle: bytes) -> int:
        raise RuntimeError("CUDA: cudaErrorInvalidContext")

    def close_memory(self, base: int) -> None: ...
