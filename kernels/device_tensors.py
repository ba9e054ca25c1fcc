"""Tensors that lie in a device's memory, wherever they come from: what a device's packer takes in place of arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class DeviceTensor(NamedTuple):
    """A C-contiguous tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """float32 or bfloat16."""
    address: int


class DeviceTensors(Mapping[str, DeviceTensor]):
    """Tensors by name, whose shapes can be asked for."""

    def __init__(self, tensors: Mapping[str, DeviceTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> DeviceTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}


class Placement(NamedTuple):
    """A tensor's rows and where each of them goes; a tensor of another rank than 2 is one row.

    The target's type is the source's, or the other of float32 and bfloat16: widened, or rounded to nearest, ties to
    even. Rows of the target begin `stride` elements apart.
    """

    source: int
    """Address."""
    rows: int
    columns: int
    dtype: str
    target: int
    """Address."""
    target_dtype: str
    stride: int


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor as `Placement` counts them."""
    if len(shape) == 2:
        return shape[0], shape[1]
    return 1, math.prod(shape)
