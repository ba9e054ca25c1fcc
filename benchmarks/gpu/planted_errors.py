"""Kernels with an error on purpose, for a tool to find: `memcheck` a write past a tensor, `racecheck` a race.

    compute-sanitizer --tool TOOL python benchmarks/gpu/planted_errors.py TOOL

The write is a Triton kernel's to a Paddle tensor, as our own kernels write. Triton puts barriers where they belong, so
the race is CUDA C++.
"""

# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.

from __future__ import annotations

import sys

import numpy as np
import triton
import triton.language as tl
from cuda.bindings import driver, nvrtc, runtime

from zerokl.kernels.gpu.paddle_device import PaddleDevice

SOURCE = b"""
extern "C" __global__ void race(int* out) {
    __shared__ int shared[64];
    shared[threadIdx.x] = threadIdx.x;
    // No barrier: the other warp may not have written yet.
    out[threadIdx.x] = shared[63 - threadIdx.x];
}
"""


@triton.jit
def past_the_end_kernel(ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(ptr + i, i, mask=i < n)


def write_past_the_end(device: PaddleDevice) -> None:
    """One entry more than a tensor has."""
    tensor = device.empty([1024], "int32")
    past_the_end_kernel[(1,)](tensor, 1025, BLOCK=2048)


def race(device: PaddleDevice) -> None:
    """Two warps that exchange values without a barrier."""
    out = device.empty([64], "int32")
    (program,) = _values(nvrtc.nvrtcCreateProgram(SOURCE, b"race.cu", 0, [], []))
    option = b"--gpu-architecture=sm_90"
    _values(nvrtc.nvrtcCompileProgram(program, 1, [option]))
    (size,) = _values(nvrtc.nvrtcGetCUBINSize(program))
    code = b" " * size
    _values(nvrtc.nvrtcGetCUBIN(program, code))
    (module,) = _values(driver.cuModuleLoadData(np.frombuffer(code, np.uint8).ctypes.data))
    (kernel,) = _values(driver.cuModuleGetFunction(module, b"race"))
    pointer = np.array([out.data_ptr()], np.uint64)
    arguments = np.array([pointer.ctypes.data], np.uint64)
    stream = driver.CUstream(int(device.stream))
    _values(driver.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, stream, arguments.ctypes.data, 0))


def _values(answer: tuple) -> tuple:
    if int(answer[0]) != 0:
        raise RuntimeError(f"CUDA: {answer[0].name}")
    return answer[1:]


def main() -> None:
    device = PaddleDevice()
    {"memcheck": write_past_the_end, "racecheck": race}[sys.argv[1]](device)
    # memcheck may make this fail: the error is what is wanted.
    print(f"planted error has run: {runtime.cudaStreamSynchronize(device.stream)[0].name}", flush=True)


if __name__ == "__main__":
    main()
