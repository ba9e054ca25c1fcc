"""Weights that arrive as arrays, piece by piece, until an update takes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = ("float64", "float32", "float16")
_TENSOR_BYTES = 1024
"""What a tensor counts beside its bytes, so that many empty ones are not free."""
_MAX_LENGTH = 1 << 40


class _Tensor:
    __slots__ = ("array", "received")

    def __init__(self, dtype: str, shape: list[int]) -> None:
        self.array = np.empty(shape, dtype)
        self.received = 0


class Uploads:
    """Uploads by client and number; used by one thread at a time. Their bytes together are bounded."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._uploads: dict[tuple[bytes, int], dict[str, _Tensor]] = {}
        self.nbytes = 0
        """Of all tensors announced so far."""

    def add(self, client: bytes, number: int, pieces: list[Any], data: NDArray[np.uint8]) -> None:
        """Take pieces [tensor's name, dtype, shape, first byte, bytes], each tensor's in order, else ValueError."""
        if not pieces:
            raise ValueError("upload: pieces must not be empty")
        tensors = self._uploads.setdefault((client, number), {})
        try:
            self._fill(tensors, pieces, data)
        finally:
            if not tensors:
                del self._uploads[client, number]

    def _fill(self, tensors: dict[str, _Tensor], pieces: list[Any], data: NDArray[np.uint8]) -> None:
        offset = 0
        for piece in pieces:
            name, dtype, shape, start, size = _checked(piece)
            tensor = tensors.get(name) or self._new(tensors, name, dtype, shape)
            if (tensor.array.dtype.name, list(tensor.array.shape)) != (dtype, shape):
                raise ValueError(f"upload: {name!r:.80} was announced as another tensor")
            if start != tensor.received or start + size > tensor.array.nbytes:
                raise ValueError(
                    f"upload: the next byte of {name!r:.80} is {tensor.received} of {tensor.array.nbytes}, "
                    f"got {size} from {start}"
                )
            if offset + size > len(data):
                raise ValueError(f"upload: the pieces take more than the {len(data)} bytes sent")
            if size:
                flat = tensor.array.reshape(-1).view(np.uint8)
                flat[start : start + size] = data[offset : offset + size]
            tensor.received += size
            offset += size
        if offset != len(data):
            raise ValueError(f"upload: the pieces take {offset} of the {len(data)} bytes sent")

    def take(self, client: bytes, number: int) -> dict[str, NDArray[Any]]:
        """The tensors of an upload, which is forgotten. Raises ValueError where it is unknown or incomplete."""
        tensors = self._uploads.get((client, number))
        if not tensors:
            raise ValueError(f"upload must be the number of one that was sent, got {number}")
        for name, tensor in tensors.items():
            if tensor.received != tensor.array.nbytes:
                raise ValueError(
                    f"upload: {name!r:.80} is incomplete: {tensor.received} of {tensor.array.nbytes} bytes"
                )
        self._forget(client, number)
        return {name: tensor.array for name, tensor in tensors.items()}

    def drop_client(self, client: bytes) -> None:
        """The client is gone."""
        for owner, number in list(self._uploads):
            if owner == client:
                self._forget(owner, number)

    def _new(self, tensors: dict[str, _Tensor], name: str, dtype: str, shape: list[int]) -> _Tensor:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize + _TENSOR_BYTES
        if self.nbytes + nbytes > self._max_bytes:
            raise ValueError(f"upload: {name!r:.80} of {nbytes} bytes is over max_upload_bytes ({self._max_bytes})")
        tensors[name] = _Tensor(dtype, shape)
        self.nbytes += nbytes
        return tensors[name]

    def _forget(self, client: bytes, number: int) -> None:
        tensors = self._uploads.pop((client, number))
        self.nbytes -= sum(tensor.array.nbytes + _TENSOR_BYTES for tensor in tensors.values())


def _checked(piece: Any) -> tuple[str, str, list[int], int, int]:
    if not isinstance(piece, list) or [type(part) for part in piece] != [str, str, list, int, int]:
        raise ValueError(f"upload: a piece is [name, dtype, shape, first byte, bytes], got {piece!r:.200}")
    name, dtype, shape, start, size = piece
    if dtype not in _DTYPES:
        raise ValueError(f"upload: the dtype of {name!r:.80} must be one of {_DTYPES}, got {dtype!r:.40}")
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < _MAX_LENGTH for n in shape) or min(start, size) < 0:
        raise ValueError(f"upload: {piece!r:.200} is no part of an array")
    return name, dtype, shape, start, size
