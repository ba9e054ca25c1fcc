"""Timing of kernels on a GPU: a CUDA graph of launches, events around its replays, and the machine's ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import paddle
import triton
import triton.language as tl
from cuda.bindings import runtime

from zerokl.kernels.gpu import driver, matmul, sampling
from zerokl.kernels.gpu.tiles import Tile

Launch = Callable[[], None]

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes a second of device memory, by the datasheet."""
PEAK = 989e12
"""Dense bfloat16 operations a second, by the datasheet."""
L2_BYTES = 64 << 20


def check(answer: tuple[Any, ...]) -> Any:
    """The value of a CUDA runtime call; raises RuntimeError if it failed."""
    if int(answer[0]) != 0:
        raise RuntimeError(f"CUDA: {answer[0]}")
    return answer[1] if len(answer) > 1 else None


@triton.jit
def _fill_kernel(ptr, n, seed, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ptr + i, (tl.randn(seed, i.to(tl.uint32)) * scale).to(ptr.dtype.element_ty), mask=i < n)


class Bench:
    """One device, a stream of its own, and random tensors."""

    def __init__(self) -> None:
        driver.activate()
        self.stream = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        """On which all launches go."""
        driver.use_stream(int(self.stream))
        self._events = [check(runtime.cudaEventCreate()) for _ in range(2)]
        self.name = paddle.device.cuda.get_device_name()
        self.bandwidth = next(rate for kind, rate in BANDWIDTH.items() if kind in self.name)
        self._seed = 0

    def normal(self, *shape: int, scale: float = 1.0, dtype: str = "bfloat16") -> Any:
        """A tensor of normal values."""
        out = paddle.empty(list(shape), dtype)
        n = 1
        for size in shape:
            n *= size
        self._seed += 1
        _fill_kernel[(triton.cdiv(n, 1024),)](out, n, self._seed, scale, BLOCK=1024)
        return out

    def empty(self, *shape: int, dtype: str = "bfloat16") -> Any:
        """An uninitialised tensor."""
        return paddle.empty(list(shape), dtype)

    def ints(self, values: Any) -> Any:
        """An int32 NumPy array on the device."""
        out = paddle.to_tensor(values, place=paddle.CUDAPlace(0))
        paddle.device.cuda.synchronize()  # the bench's own stream does not wait for Paddle's
        return out

    def seconds(self, launches: Sequence[Launch], *, repeats: int = 7, least: int = 20) -> float:
        """Median time of one of `launches`, which run one after the other in a graph; give them different operands.

        The list is repeated until a graph holds at least `least` of them.
        """
        rounds = -(-least // len(launches))
        for launch in launches:
            launch()
        check(runtime.cudaStreamSynchronize(self.stream))
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(runtime.cudaStreamBeginCapture(self.stream, mode))
        for _ in range(rounds):
            for launch in launches:
                launch()
        graph = check(runtime.cudaStreamEndCapture(self.stream))
        program = check(runtime.cudaGraphInstantiate(graph, 0))
        times = []
        for _ in range(repeats + 1):
            check(runtime.cudaEventRecord(self._events[0], self.stream))
            check(runtime.cudaGraphLaunch(program, self.stream))
            check(runtime.cudaEventRecord(self._events[1], self.stream))
            check(runtime.cudaEventSynchronize(self._events[1]))
            times.append(check(runtime.cudaEventElapsedTime(*self._events)) / 1e3)
        check(runtime.cudaGraphExecDestroy(program))
        check(runtime.cudaGraphDestroy(graph))
        return statistics.median(times[1:]) / (rounds * len(launches))

    def ceilings(self) -> dict[str, float]:
        """Copy bandwidth, bytes read and written a second, and operations a second of an 8192^3 product."""
        n = 1 << 29
        a, b = self.normal(n, dtype="float32"), self.empty(n, dtype="float32")
        copy = self.seconds([lambda: sampling.copy_kernel[(n // 4096,)](a, b, n, BLOCK=4096, num_warps=8)], least=3)
        size = 8192
        x, w, out = self.normal(size, size), self.normal(size, size), self.empty(size, size)
        tile = Tile(128, 256, 64, 8, 3)
        product = self.seconds([lambda: matmul.linear(x, w, None, out, tile=tile)], least=3)
        return {"copy_bytes_per_s": 8.0 * n / copy, "matmul_flop_per_s": 2.0 * size**3 / product}


def copies_past_cache(num_bytes: int) -> int:
    """Operand sets that make a round of launches read more than twice the L2 cache."""
    return max(1, min(64, -(-2 * L2_BYTES // num_bytes)))
