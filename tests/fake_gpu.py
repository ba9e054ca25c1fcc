"""A GPU of ordinary bytes: allocations are files that processes map, so that a test can play trainer and engine.

Each process sees an allocation at another address. Kernels are NumPy. It is a
`zerokl.weight_sync.device_memory.DeviceMemory` with the `place` of `zerokl.kernels.gpu.shared_memory`.
"""

from __future__ import annotations

import ctypes
import mmap
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.device_tensors import Placement
from zerokl.kernels.gpu.copy_plan import CopyPlan
from zerokl.weight_sync.device_checksums import device_checksum

_FIXED = 0x10
"""MAP_FIXED: what is mapped there already makes way."""
_LIBC = ctypes.CDLL(None)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]

_STORED: dict[str, Any] = {"bfloat16": np.uint16, "float32": np.uint32}
_EXPONENT = {"bfloat16": 0x7F80, "float32": 0x7F800000}


class FakeTensor:
    """What a publisher asks of a Paddle tensor."""

    def __init__(self, address: int, shape: Sequence[int], dtype: str) -> None:
        self.shape, self.dtype, self._address = list(shape), f"paddle.{dtype}", address

    def data_ptr(self) -> int:
        return self._address

    @property
    def values(self) -> NDArray[Any]:
        """The elements' patterns, to read and to write."""
        return elements(self._address, tuple(self.shape), self.dtype.rpartition(".")[2])


class FakeGpu:
    """One process's view of the GPU whose memory is the files of `folder`, as those of its peers are."""

    def __init__(self, folder: Path, gpu: str = "0000:01:00.0", strangers: Sequence[str] = ()) -> None:
        """`strangers` are GPUs that it has no peer access to."""
        self.folder = folder
        self.gpu = gpu
        self.elsewhere: dict[int, str] = {}
        """GPUs of allocations, by first address, that are on another one."""
        self._strangers = strangers
        self.done: Counter[str] = Counter()
        self.after_copy = lambda: None
        """Called between the copy and the check of a set."""
        self.before_checksums = lambda: None
        """Called in the thread that waits for a publication's checksums."""
        self._maps: dict[int, tuple[mmap.mmap, str, int]] = {}

    def put(self, values: NDArray[Any], dtype: str) -> FakeTensor:
        """A tensor with these patterns in an allocation of its own, not at its start."""
        tensor = FakeTensor(self.allocate(values.nbytes + 256) + 64, values.shape, dtype)
        tensor.values[...] = values.view(_STORED[dtype])
        return tensor

    def replace(self, tensor: FakeTensor) -> None:
        """Free the allocation of a tensor, and have another one at the same address, which is all zeros."""
        base, size = self.allocation_of(tensor.data_ptr())
        memory, old, _ = self._maps[base]
        name = secrets.token_hex(16)
        (self.folder / name).write_bytes(bytes(size))
        (self.folder / old).unlink()
        with (self.folder / name).open("r+b") as stream:
            access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED
            there = _LIBC.mmap(base, size, access, kind, stream.fileno(), 0)
        assert there == base, "it replaces the pages that were there"
        self._maps[base] = memory, name, size

    def empty(self, shape: Sequence[int], dtype: str) -> FakeTensor:
        size = int(np.prod(shape)) * np.dtype(_STORED[dtype]).itemsize
        return FakeTensor(self.allocate(max(size, 1)), shape, dtype)

    # -- DeviceMemory --------------------------------------------------------------------------------------------------
    def gpu_of(self, base: int) -> str:
        return self.elsewhere.get(base, self.gpu)

    def reaches(self, gpu: str) -> bool:
        return gpu not in self._strangers

    def allocation_of(self, address: int) -> tuple[int, int]:
        for base, (memory, _, _) in self._maps.items():
            if base <= address < base + len(memory):
                return base, len(memory)
        raise RuntimeError("CUDA: CUDA_ERROR_INVALID_VALUE")

    def allocation_ids(self, bases: Sequence[int]) -> list[int]:
        self.done["allocation_ids"] += 1
        if not self._maps.keys() >= set(bases):
            raise RuntimeError("CUDA: CUDA_ERROR_INVALID_VALUE")
        return [int(self._maps[base][1], 16) for base in bases]

    def allocate(self, size: int) -> int:
        self.done["allocate"] += 1
        name = secrets.token_hex(16)
        (self.folder / name).write_bytes(bytes(size))
        return self._map(name)

    def free(self, base: int) -> None:
        self.done["free"] += 1
        (self.folder / self._maps.pop(base)[1]).unlink()

    def export_memory(self, base: int) -> bytes:
        self.done["export"] += 1
        return self._maps[base][1].encode().ljust(64, b"\0")

    def open_memory(self, handle: bytes) -> int:
        self.done["open"] += 1
        try:
            return self._map(handle.rstrip(b"\0").decode())
        except (FileNotFoundError, UnicodeDecodeError, IsADirectoryError) as error:
            raise RuntimeError("CUDA: cudaErrorInvalidResourceHandle") from error

    def close_memory(self, base: int) -> None:
        self.done["close"] += 1
        del self._maps[base]

    def settle(self, stream: int | None) -> None:
        self.done["settle"] += 1

    def download(self, host: int, address: int, size: int) -> None:
        ctypes.memmove(host, address, size)

    def synchronize(self) -> None: ...

    def plan(self, tensors: Sequence[tuple[int, int, int, str]], targets: Sequence[int] | None = None) -> CopyPlan:
        self.done["plan"] += 1
        return CopyPlan.of_tensors(tensors, targets)

    def begin_checksums(self, plan: CopyPlan) -> Callable[[], NDArray[np.uint64]]:
        def result() -> NDArray[np.uint64]:
            self.before_checksums()
            return self.place(plan)[0]

        return result

    def place(
        self, plan: CopyPlan, bucket_bytes: int = 0, nearly_done: Callable[[], None] = lambda: None
    ) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
        if plan.copies:
            for placement in plan.placements:
                _target(placement)[...] = converted(_source(placement), placement.dtype, placement.target_dtype)
            nearly_done()
            self.after_copy()
        sums, broken = [], []
        for placement in plan.placements:
            told = _told(placement)
            sums.append(device_checksum(np.ascontiguousarray(told)))
            exponent = _EXPONENT[placement.dtype]
            broken.append(int(((told & exponent) == exponent).any()))
        return np.array(sums, np.uint64), np.array(broken, np.int32)

    def _map(self, name: str) -> int:
        with (self.folder / name).open("r+b") as stream:
            memory = mmap.mmap(stream.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._maps[address] = memory, name, len(memory)
        return address


def elements(address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """The patterns at an address."""
    count = int(np.prod(shape))
    if not count:
        return np.empty(shape, _STORED[dtype])
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * (count * np.dtype(_STORED[dtype]).itemsize)).from_address(address))
    return flat.view(_STORED[dtype]).reshape(shape)


def converted(bits: NDArray[Any], dtype: str, target_dtype: str) -> NDArray[Any]:
    """Patterns of one type as those of another."""
    if dtype == target_dtype:
        return bits
    if dtype == "bfloat16":
        return bits.astype(np.uint32) << 16
    return ((bits.astype(np.uint64) + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _source(placement: Placement) -> NDArray[Any]:
    return elements(placement.source, (placement.rows, placement.columns), placement.dtype)


def _target(placement: Placement) -> NDArray[Any]:
    count = max(0, placement.rows - 1) * placement.stride + placement.columns
    flat = elements(placement.target, (count,), placement.target_dtype)
    shape = (placement.rows, placement.columns)
    return np.lib.stride_tricks.as_strided(flat, shape, (placement.stride * flat.itemsize, flat.itemsize))


def _told(placement: Placement) -> NDArray[Any]:
    """The source's patterns as the target tells them, or where it was rounded the source."""
    if placement.dtype == placement.target_dtype:
        return _target(placement)
    if placement.dtype == "float32":
        return _source(placement)
    return (_target(placement) >> np.uint32(16)).astype(np.uint16)
