"""One GPU: memory by Paddle, and a stream of our own with copies, events and recorded graphs by the CUDA runtime.

What Paddle and the CUDA bindings are asked for stands here and in `driver` alone. All kernels of an op table run on the
device's stream, in the order of their launches; nothing else runs there.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import paddle
from cuda.bindings import runtime
from numpy.typing import NDArray

from zerokl.kernels.gpu import driver
from zerokl.kernels.gpu.cuda_runtime import check, memory
from zerokl.kernels.gpu.device import Graph
from zerokl.kernels.gpu.elementwise import Tensor


class CudaGraph:
    """A graph of the CUDA runtime on one stream."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._program = check(runtime.cudaGraphInstantiate(graph, 0))
        self._stream = stream
        check(runtime.cudaGraphDestroy(graph))

    def launch(self) -> None:
        """See Graph."""
        check(runtime.cudaGraphLaunch(self._program, self._stream))

    def __del__(self) -> None:
        runtime.cudaGraphExecDestroy(self._program)


class PaddleDevice:
    """A `Device` by Paddle and the CUDA runtime."""

    def __init__(self, number: int = 0) -> None:
        """Raises RuntimeError where there is no such GPU, or the process computes on another one."""
        self._place = driver.activate(number)
        self._number = number
        self._threads = threading.local()
        self.enter()
        self.stream = _stream(number)
        driver.use_stream(int(self.stream))
        self._spare_events: list[Any] = []

    def enter(self) -> None:
        """See Device."""
        if not getattr(self._threads, "entered", False):
            paddle.set_device(f"gpu:{self._number}")
            check(runtime.cudaSetDevice(self._number))
            self._threads.entered = True

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        """See Device."""
        self.enter()
        return paddle.empty(list(shape), dtype)

    def put(self, values: NDArray[Any]) -> Tensor:
        """See Device."""
        self.enter()
        tensor = paddle.to_tensor(np.ascontiguousarray(values), place=self._place)
        self.await_owner()
        return tensor

    def get(self, tensor: Tensor) -> NDArray[Any]:
        """See Device."""
        self.enter()
        self.synchronize()
        return np.asarray(tensor.numpy())

    def pinned(self, size: int) -> NDArray[np.int32]:
        """See Device."""
        self.enter()
        address = check(runtime.cudaHostAlloc(max(1, size) * 4, runtime.cudaHostAllocDefault))
        array: NDArray[np.int32] = np.ctypeslib.as_array((ctypes.c_int32 * size).from_address(int(address)))
        return array

    def upload(self, values: NDArray[np.int32], tensor: Tensor) -> None:
        """See Device."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(runtime.cudaMemcpyAsync(tensor.data_ptr(), values.ctypes.data, values.nbytes, kind, self.stream))

    def download(self, tensor: Tensor, values: NDArray[np.int32]) -> None:
        """See Device."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(runtime.cudaMemcpyAsync(values.ctypes.data, tensor.data_ptr(), values.nbytes, kind, self.stream))

    def mark(self) -> Any:
        """See Device."""
        event = (
            self._spare_events.pop()
            if self._spare_events
            else check(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming))
        )
        check(runtime.cudaEventRecord(event, self.stream))
        return event

    def wait(self, event: Any) -> None:
        """See Device. An event is waited for once: it serves again."""
        self.enter()
        check(runtime.cudaEventSynchronize(event))
        self._spare_events.append(event)

    def record(self, launches: Callable[[], None]) -> Graph:
        """See Device."""
        # Relaxed: other threads may allocate, and this one may load a kernel that it has not launched yet.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        check(runtime.cudaStreamBeginCapture(self.stream, mode))
        try:
            launches()
        finally:
            graph = check(runtime.cudaStreamEndCapture(self.stream))
        return CudaGraph(graph, self.stream)

    def await_owner(self) -> None:
        """See Device."""
        self.enter()
        # Paddle computes and copies on streams of its own, which ours does not wait for.
        paddle.device.cuda.current_stream(self._number).synchronize()
        check(runtime.cudaStreamSynchronize(0))

    def synchronize(self) -> None:
        """See Device."""
        self.enter()
        check(runtime.cudaStreamSynchronize(self.stream))

    def release_unused(self) -> None:
        """See Device."""
        self.enter()
        self.synchronize()
        paddle.device.cuda.empty_cache()

    def memory(self) -> tuple[int, int]:
        """See Device."""
        return memory(self._number)


@cache
def _stream(number: int) -> Any:
    """The process's stream of steps on a GPU, of the highest priority: what runs beside them is to give way."""
    check(runtime.cudaSetDevice(number))
    error, _, greatest = runtime.cudaDeviceGetStreamPriorityRange()
    check((error,))
    return check(runtime.cudaStreamCreateWithPriority(runtime.cudaStreamNonBlocking, greatest))


__all__ = ["CudaGraph", "PaddleDevice", "check", "memory"]
