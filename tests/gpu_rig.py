"""Arrays for kernel tests: Paddle tensors on a GPU, NumPy under Triton's interpreter (TRITON_INTERPRET=1).

The interpreter knows no bfloat16 products: there every array of floats is float32 and only indexing and formulas are
tested. Claims about bits are claims about the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT = "float32" if INTERPRETED else "bfloat16"
"""The type of weights and activations."""


class HostArray:
    """A NumPy array with what Triton's interpreter uses of a tensor; every copy is the same memory."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values
        self.dtype = str(values.dtype)
        self.shape = values.shape

    def data_ptr(self) -> int:
        return int(self.values.ctypes.data)

    def untyped_storage(self) -> HostArray:
        return self

    new_empty = cpu = set_ = lambda self, *args, **kwargs: self

    def copy_(self, other: HostArray) -> None:
        assert other is self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    stride = size

    def __getitem__(self, span: slice) -> HostArray:
        return HostArray(self.values[span])

    def reshape(self, shape: Sequence[int]) -> HostArray:
        return HostArray(self.values.reshape(shape))


class HostGraph:
    """Launches that are made again each time."""

    def __init__(self, launches: Callable[[], None]) -> None:
        self.launch = launches


class HostDevice:
    """A `zerokl.kernels.gpu.device.Device` of NumPy arrays, for kernels under the interpreter."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def enter(self) -> None: ...

    def empty(self, shape: Sequence[int], dtype: str) -> HostArray:
        fill = 2**30 if dtype.startswith("int") else np.nan
        return HostArray(np.full(shape, fill, dtype))

    def put(self, values: NDArray[Any]) -> HostArray:
        return HostArray(values.copy())

    def get(self, tensor: HostArray) -> NDArray[Any]:
        return tensor.values.copy()

    def pinned(self, size: int) -> NDArray[np.int32]:
        return np.zeros(size, np.int32)

    def upload(self, values: NDArray[np.int32], tensor: HostArray) -> None:
        tensor.values.reshape(-1)[: len(values)] = values

    def download(self, tensor: HostArray, values: NDArray[np.int32]) -> None:
        values[:] = tensor.values.reshape(-1).view(np.int32)[: len(values)]

    def mark(self) -> None: ...

    def wait(self, event: None) -> None: ...

    def await_owner(self) -> None: ...

    def record(self, launches: Callable[[], None]) -> HostGraph:
        self.num_recorded += 1
        return HostGraph(launches)

    def synchronize(self) -> None: ...

    def release_unused(self) -> None: ...

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of float32 values rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values as an array of type FLOAT holds them."""
    single = np.ascontiguousarray(values, np.float32)
    return single if INTERPRETED else from_bfloat16(to_bfloat16(single))


def put(values: NDArray[Any], dtype: str | None = None) -> Any:
    """A device array: floats become `dtype` (FLOAT if not given), integers stay as they are."""
    values = np.ascontiguousarray(values)
    if values.dtype.kind == "f":
        dtype = dtype or FLOAT
        values = to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)
    if INTERPRETED:
        return HostArray(values.copy())
    import paddle

    tensor = paddle.to_tensor(values, place=paddle.CUDAPlace(0))
    paddle.device.cuda.synchronize()  # kernels may be launched on another stream than Paddle's
    return tensor


def empty(*shape: int, dtype: str | None = None) -> Any:
    """A device array that holds NaN, or a large number, until it is written."""
    dtype = dtype or FLOAT
    if dtype.startswith("int"):
        return put(np.full(shape, 2**30, dtype))
    return put(np.full(shape, np.nan, np.float32), dtype)


def get(array: Any) -> NDArray[Any]:
    """A host copy; bfloat16 as float32."""
    if isinstance(array, HostArray):
        return array.values.copy()
    import paddle

    paddle.device.cuda.synchronize()
    values: NDArray[Any] = np.asarray(array.numpy())
    return from_bfloat16(values) if values.dtype == np.uint16 else values


def require_device() -> None:
    """Skip the calling module unless kernels can run here."""
    pytest.importorskip("triton", reason="needs Triton")
    if INTERPRETED:
        return
    paddle = pytest.importorskip("paddle", reason="needs Paddle")
    if not paddle.device.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
        pytest.skip("needs a GPU that Paddle can use, or TRITON_INTERPRET=1", allow_module_level=True)
    from zerokl.kernels.gpu import driver

    driver.activate()


def normal(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    """Random values as an array of type FLOAT holds them."""
    return rounded(np.random.default_rng(seed).standard_normal(shape, np.float32) * scale)


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """||got - expected|| / ||expected||; NaN if anything is."""
    difference = got.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@dataclass(slots=True)
class Pool:
    """Keys and values [layers, blocks, KV, block size, D] on the device."""

    keys: Any
    values: Any
    block_size: int
    layers: int = field(default=1)
