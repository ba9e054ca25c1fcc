"""The border between Paddle tensors and the NumPy arrays that the kernels read and write: aliases, never copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Tensor = Any  # paddle.Tensor
_ALIGN = 64  # bytes; a vector load that straddles two cache lines costs twice


class _Memory:
    """A tensor's memory under NumPy's array interface. Keeps the tensor alive as long as an array looks at it.

    Writable under every NumPy version, where `numpy.from_dlpack` gives read-only arrays before 2.1.
    """

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, tensor: Tensor) -> None:
        self.owner = tensor
        self.__array_interface__: dict[str, Any] = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "version": 3,
        }


def array_of(tensor: Tensor) -> Floats:
    """The memory of a contiguous float32 CPU tensor as an array; writing to the array writes to the tensor.

    Raises ValueError for another dtype, device or a strided tensor.
    """
    if tensor.dtype != paddle.float32:
        raise ValueError(f"tensor: dtype is {tensor.dtype}, must be float32")
    if not tensor.place.is_cpu_place():
        raise ValueError(f"tensor: lives on {tensor.place}, must be on the CPU (paddle.set_device('cpu'))")
    if not tensor.is_contiguous():
        raise ValueError(f"tensor: strides are {tensor.strides} for shape {tensor.shape}, must be contiguous")
    # The detached alias has no graph: an array kept by a PyLayer must not keep the graph that made the tensor.
    return np.asarray(_Memory(tensor.detach()))


def read(tensor: Tensor) -> Floats:
    """`array_of`, for arrays that are only read: a strided tensor (some gradients are) is made contiguous first."""
    return array_of(tensor if tensor.is_contiguous() else tensor.contiguous())


def empty(*shape: int) -> tuple[Tensor, Floats]:
    """An uninitialised tensor and its memory as an array.

    NumPy allocates: it hands freed pages back to the next caller and asks for huge pages, where Paddle's CPU allocator
    takes fresh pages for every tensor, at 4 to 8 times the cost of the first touch.
    """
    size = int(np.prod(shape, dtype=np.int64))
    pad = _ALIGN // 4
    memory = np.empty(size + pad, np.float32)
    offset = (-memory.__array_interface__["data"][0] // 4) % pad
    array = memory[offset : offset + size].reshape(shape)
    return paddle.utils.dlpack.from_dlpack(array), array


def zeros(*shape: int) -> tuple[Tensor, Floats]:
    """As `empty`, filled with zeros."""
    tensor, array = empty(*shape)
    array.fill(0.0)
    return tensor, array
