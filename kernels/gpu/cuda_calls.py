"""The calls of CUDA's driver and runtime by which processes share a GPU's memory: all of them, and nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from cuda.bindings import driver, runtime

from zerokl.kernels.gpu.cuda_runtime import check

_HANDLE_BYTES = 64
_BUS_ID_BYTES = 32


class CudaCalls:
    """One GPU and a stream on it. Addresses, events and streams are integers.

    Every method raises RuntimeError naming the error where the call fails. Any thread may call.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._enter()
        self.gpu = _bus_id(number)
        """Its PCI bus id: the same one in all processes, which may number their GPUs as they like."""
        least, _ = _two(runtime.cudaDeviceGetStreamPriorityRange())
        self.stream = int(check(runtime.cudaStreamCreateWithPriority(runtime.cudaStreamNonBlocking, least)))
        """Gives way to the steps, which have the highest priority."""

    # -- memory --------------------------------------------------------------------------------------------------------
    def allocate(self, size: int) -> int:
        """New memory."""
        self._enter()
        return int(check(runtime.cudaMalloc(size)))

    def free(self, base: int) -> None:
        """Give memory back; waits for the device."""
        self._enter()
        check(runtime.cudaFree(base))

    def allocate_pinned(self, size: int) -> int:
        """New memory of the host, which copies to it are launched to without waiting."""
        self._enter()
        return int(check(runtime.cudaHostAlloc(size, runtime.cudaHostAllocDefault)))

    def free_pinned(self, host: int) -> None:
        """Give it back."""
        self._enter()
        check(runtime.cudaFreeHost(host))

    def allocation_of(self, address: int) -> tuple[int, int]:
        """First address and size of the allocation that holds an address, on this GPU or mapped from a peer."""
        self._enter()
        error, base, size = driver.cuMemGetAddressRange(address)
        if int(error) != 0:  # a peer's: what is asked of the pointer itself does not depend on the current GPU
            kinds = driver.CUpointer_attribute
            base = check(driver.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address))
            size = check(driver.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_RANGE_SIZE, address))
            if int(size) == 0:
                check((error,))
        return int(base), int(size)

    def allocation_ids(self, bases: Sequence[int]) -> list[int]:
        """Of each allocation a number that no other of this process has had."""
        self._enter()
        kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_BUFFER_ID
        return [int(check(driver.cuPointerGetAttribute(kind, base))) for base in bases]

    def gpu_of(self, base: int) -> str:
        """The bus id of the GPU that an allocation of this process is on."""
        self._enter()
        kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        number = int(check(driver.cuPointerGetAttribute(kind, base)))
        return self.gpu if number == self._number else _bus_id(number)

    def reaches(self, gpu: str) -> bool:
        """Whether this GPU may read the memory of the one with that bus id; one that is not seen here may be tried."""
        if gpu == self.gpu:
            return True
        self._enter()
        error, number = runtime.cudaDeviceGetByPCIBusId(gpu.encode())
        return int(error) != 0 or bool(check(runtime.cudaDeviceCanAccessPeer(self._number, number)))

    def export_memory(self, base: int) -> bytes:
        """A handle for other processes."""
        self._enter()
        return _bytes_of(check(runtime.cudaIpcGetMemHandle(base)))

    def open_memory(self, handle: bytes) -> int:
        """Map another process's allocation, of this GPU or of a peer."""
        self._enter()
        made = _with_bytes(runtime.cudaIpcMemHandle_t(), handle)
        return int(check(runtime.cudaIpcOpenMemHandle(made, runtime.cudaIpcMemLazyEnablePeerAccess)))

    def close_memory(self, base: int) -> None:
        """Unmap it."""
        self._enter()
        check(runtime.cudaIpcCloseMemHandle(base))

    # -- events --------------------------------------------------------------------------------------------------------
    def new_event(self) -> int:
        """An event."""
        self._enter()
        return int(check(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming)))

    def record(self, event: int) -> None:
        """Have the event reached after what was launched on our stream so far."""
        self._enter()
        check(runtime.cudaEventRecord(event, self.stream))

    def await_event(self, event: int) -> None:
        """Wait on the host; not at all for one that was never recorded."""
        self._enter()
        check(runtime.cudaEventSynchronize(event))

    # -- our stream ----------------------------------------------------------------------------------------------------
    def upload(self, address: int, host: int, size: int) -> None:
        """Copy from the host's memory, which may change once this returns."""
        self._copy(address, host, size, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, host: int, address: int, size: int) -> None:
        """Copy to the host's memory; there after `synchronize`."""
        self._copy(host, address, size, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def clear(self, address: int, size: int) -> None:
        """Fill with zeros."""
        self._enter()
        check(runtime.cudaMemsetAsync(address, 0, size, self.stream))

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        self.settle(self.stream)

    def settle(self, stream: int) -> None:
        """Wait for all that was launched on any stream of this process; 0: the default stream."""
        self._enter()
        check(runtime.cudaStreamSynchronize(stream))

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._enter()
        check(runtime.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def _enter(self) -> None:
        check(runtime.cudaSetDevice(self._number))


def _two(answer: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    check(answer[:1])
    return answer[1], answer[2]


def _bus_id(number: int) -> str:
    padded: bytes = check(runtime.cudaDeviceGetPCIBusId(_BUS_ID_BYTES, number))
    return padded.split(b"\0")[0].decode()


def _bytes_of(handle: Any) -> bytes:
    return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)


def _with_bytes(handle: Any, content: bytes) -> Any:
    assert len(content) == _HANDLE_BYTES, f"a handle of {len(content)} bytes"
    ctypes.memmove(handle.getPtr(), content, _HANDLE_BYTES)
    return handle
