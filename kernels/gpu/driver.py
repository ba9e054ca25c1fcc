"""Makes Triton launch on a stream of ours, or Paddle's. Triton's own driver asks torch for device and stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import paddle
import triton
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils


class PaddleDriver(CudaDriver):  # type: ignore[misc]
    """Triton driver for one device of Paddle."""

    def __init__(self, device: int) -> None:
        # Not the base class's: it imports torch.
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher
        self.stream: int | None = None
        """Handle of the stream to launch on; None: Paddle's."""
        self.here = threading.local()
        """Its `stream`, if it is there, is what the thread at hand launches on."""
        self._device = device
        self._capability: tuple[int, int] = tuple(paddle.device.cuda.get_device_capability(device))

    def get_current_device(self) -> int:
        """The one device of this driver."""
        return self._device

    def set_current_device(self, device: int) -> None:
        """Accept that device and no other."""
        assert device == self._device, f"this process computes on GPU {self._device}, not {device}"

    def get_device_capability(self, device: int) -> tuple[int, int]:
        """Compute capability, major and minor."""
        return self._capability

    def get_current_stream(self, device: int) -> int:
        """Handle of the stream to launch on."""
        stream: int | None = getattr(self.here, "stream", self.stream)
        return framework_stream() if stream is None else stream


def activate(device: int = 0) -> Any:
    """Make `device` Paddle's and Triton's for this process; returns its Paddle place.

    Raises RuntimeError if Paddle was built without CUDA or sees no such GPU, and where the process computes on another
    one already: what Paddle's current device is, and Triton's, holds for all threads.
    """
    if not paddle.device.is_compiled_with_cuda():
        raise RuntimeError("device 'gpu' needs Paddle's GPU build")
    count = paddle.device.cuda.device_count()
    if device >= count:
        raise RuntimeError(f"there is no GPU {device}: Paddle sees {count}, numbered from 0")
    _claim(device)
    paddle.set_device(f"gpu:{device}")
    triton.runtime.driver.set_active(_driver(device))
    return paddle.CUDAPlace(device)


@cache
def _driver(device: int) -> PaddleDriver:
    return PaddleDriver(device)


def current_gpu() -> int:
    """The number of Paddle's current device, if it is a GPU, else 0."""
    kind, _, number = paddle.get_device().partition(":")
    return int(number) if kind == "gpu" else 0


@cache
def _claimed() -> set[int]:
    """The GPU that this process computes on, once it does."""
    return set()


def _claim(device: int) -> None:
    """Raise RuntimeError where the process computes on another GPU than this one."""
    claimed = _claimed()
    if claimed - {device}:
        raise RuntimeError(
            f"this process computes on GPU {min(claimed)}: what is to run on GPU {device} needs a process of its own "
            "(for an engine: worker 'process')"
        )
    claimed.add(device)


def framework_stream() -> int:
    """Handle of Paddle's current stream on this process's GPU, whatever the thread's current one is."""
    device: int = triton.runtime.driver.active.get_current_device()
    return int(paddle.device.cuda.current_stream(device).cuda_stream)


def framework_streams() -> tuple[int, int]:
    """Streams that Paddle writes tensors on: its current one, and CUDA's default stream."""
    return framework_stream(), 0


@contextmanager
def launching_on(stream: int) -> Iterator[None]:
    """Have the calling thread launch on the stream with this handle inside; `activate` was called before."""
    here = triton.runtime.driver.active.here
    here.stream = stream
    try:
        yield
    finally:
        del here.stream


def use_stream(stream: int) -> None:
    """Launch on the stream with this handle from now on; `activate` was called before."""
    triton.runtime.driver.active.stream = stream
