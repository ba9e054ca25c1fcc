"""Arrays on the wire: their bytes one after the other in one frame, their shapes in the header.

Pure, as all of the wire's form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 8
"""Bytes; the largest element size of the tables."""

ArrayTable = Mapping[str, tuple["np.dtype[Any]", int]]
"""Field of a dataclass -> dtype and number of dimensions."""


class WireError(ValueError):
    """Frames that are no message of this protocol version."""


class Payload:
    """Reads arrays off the second frame, one after the other."""

    def __init__(self, frame: bytes) -> None:
        self._bytes = bytearray(frame)  # writable: the kernels' bindings take no read-only arrays
        self._offset = 0

    def take(self, table: ArrayTable, shapes: Any) -> dict[str, NDArray[Any] | None]:
        """The table's arrays; None where the shape is None."""
        if not isinstance(shapes, list) or len(shapes) != len(table):
            raise WireError(f"expected {len(table)} shapes, got {shapes!r:.200}")
        return {
            name: None if shape is None else self._array(name, dtype, ndim, shape)
            for (name, (dtype, ndim)), shape in zip(table.items(), shapes, strict=True)
        }

    def finish(self) -> None:
        """Raise WireError unless the frame is used up."""
        if self._offset != len(self._bytes):
            raise WireError(f"the arrays take {self._offset} bytes, the frame has {len(self._bytes)}")

    def _array(self, name: str, dtype: np.dtype[Any], ndim: int, shape: Any) -> NDArray[Any]:
        if not isinstance(shape, list) or len(shape) != ndim or not all(type(n) is int and n >= 0 for n in shape):
            raise WireError(f"{name}: {shape!r:.80} is not a shape of {ndim} dimensions")
        nbytes = math.prod(shape) * dtype.itemsize
        if self._offset + nbytes > len(self._bytes):
            raise WireError(f"{name}: shape {shape} needs {nbytes} bytes, {len(self._bytes) - self._offset} are left")
        if not nbytes:
            return np.empty(shape, dtype)
        array = np.frombuffer(self._bytes, dtype, nbytes // dtype.itemsize, self._offset)
        self._offset += nbytes + -nbytes % _ALIGNMENT
        return array if ndim == 1 else array.reshape(shape)


def pack_arrays(table: ArrayTable, owner: object, chunks: list[Any]) -> list[tuple[int, ...] | None]:
    """Append the owner's arrays to `chunks`; returns their shapes."""
    shapes: list[tuple[int, ...] | None] = []
    for name, (dtype, ndim) in table.items():
        array = getattr(owner, name)
        if array is None:
            shapes.append(None)
            continue
        assert array.dtype == dtype and array.ndim == ndim, f"{name}: {array.dtype} {array.shape}"
        shapes.append(array.shape)
        chunks.append(np.ascontiguousarray(array))
        chunks.append(bytes(-array.nbytes % _ALIGNMENT))
    return shapes


def check_types(what: str, values: list[Any], types: tuple[type[Any], ...]) -> None:
    """Raise WireError unless the values are of exactly these types; `what` says of what."""
    if [type(value) for value in values] != list(types):
        names = ", ".join(kind.__name__ for kind in types)
        raise WireError(f"{what}: expected fields of types [{names}], got {values!r:.200}")


def check_present(*arrays: dict[str, Any]) -> None:
    """Raise WireError naming an array that is None."""
    for name in (name for group in arrays for name, array in group.items() if array is None):
        raise WireError(f"{name}: the array is missing")
