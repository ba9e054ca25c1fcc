"""Reading one safetensors file, with bfloat16 and float16 widened exactly to float32.

The library's NumPy front end knows no bfloat16 and its `deserialize` wants the whole file in memory, so the (small)
format is read here: 8 bytes of little-endian header length, a JSON header name -> {dtype, shape, data_offsets}, data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, start + nbytes) of `file`."""

    file: Path
    name: str
    dtype: str
    """F32, F16 or BF16."""
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _STORED_DTYPES[self.dtype].itemsize

    def read(self) -> NDArray[np.float32]:
        """A fresh C-contiguous float32 array. Raises ValueError naming the file if it has become shorter."""
        return widen(self.read_stored(), bfloat16=self.dtype == "BF16")

    def read_stored(self) -> NDArray[Any]:
        """The same as it is stored, bfloat16 as uint16 patterns."""
        dtype, size = _STORED_DTYPES[self.dtype], math.prod(self.shape)
        stored: NDArray[Any] = np.fromfile(self.file, dtype, count=size, offset=self.start)
        if stored.size != size:
            raise ValueError(f"{self.file}: ends inside tensor {self.name!r}")
        return stored.reshape(self.shape)


def widen(stored: NDArray[Any], *, bfloat16: bool = False) -> NDArray[np.float32]:
    """float32 values of float32 (as it is), float16 or, with `bfloat16`, uint16 patterns. Exact."""
    if not bfloat16:
        return stored.astype(np.float32, copy=False)
    # bfloat16 is the upper half of a float32
    wide = stored.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, in its order. Raises ValueError naming the file if it is no sound safetensors file."""
    size, length, raw = _read_start(file)
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: the safetensors header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the safetensors header must be an object, got {type(header).__name__}")
    data_start = 8 + length
    tensors = {
        name: _stored_tensor(file, name, entry, data_start, size - data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_cover(file, list(tensors.values()), data_start, size)
    return tensors


def _check_cover(file: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The format allows neither holes between tensors nor a byte that belongs to two."""
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise ValueError(f"{file}: {tensor.name} starts at byte {tensor.start}, the tensor before it ends at {end}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{file}: tensors end at byte {end}, but the file has {size}")


def _read_start(file: Path) -> tuple[int, int, bytes]:
    """Size of the file, length of the header, the header."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(
                    f"{file}: not a safetensors file, or cut short: header of {length} bytes in a file of {size}"
                )
            return size, length, stream.read(length)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int, data_size: int) -> StoredTensor:
    if not (isinstance(entry, dict) and entry.keys() >= {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{file}: header entry {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _STORED_DTYPES:
        raise ValueError(f"{file}: {name} has dtype {dtype}; supported are {', '.join(_STORED_DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{file}: header entry {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    tensor = StoredTensor(file=file, name=name, dtype=dtype, shape=tuple(shape), start=data_start + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes or offsets[1] > data_size:
        raise ValueError(
            f"{file}: {name} {dtype}{list(shape)} needs {tensor.nbytes} bytes within {data_size}, "
            f"has data_offsets {offsets}"
        )
    return tensor


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
