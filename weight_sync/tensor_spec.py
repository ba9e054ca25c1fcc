"""One tensor of a published set: name, element type, shape, place and checksum. Pure data, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from zerokl.weight_sync.errors import ManifestError

ALIGNMENT = 64
"""Bytes; every tensor starts on a cache line, which also suits the widest vector load."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    f"{kind}{bits}": np.dtype(f"{kind}{bits}")
    for kind, widths in {"float": (64, 32, 16), "int": (64, 32, 16, 8), "uint": (64, 32, 16, 8)}.items()
    for bits in widths
} | {"bfloat16": np.dtype("uint16")}
"""Element types that may be published, in the machine's byte order (publisher and receiver share the machine).

bfloat16 is stored as its bit pattern."""

MAX_INT = 2**63 - 1
Spans = tuple[tuple[int, int], ...]

_MAX_NAME = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor: what it is and where in the segment its C-contiguous bytes lie.

    Raises ManifestError when a field is out of bounds.
    """

    name: str
    """Hugging Face name; any text of 1 to 1024 characters."""
    dtype: str
    """A key of DTYPES."""
    shape: tuple[int, ...]
    """Zero-size and zero-dimensional tensors are allowed."""
    offset: int
    """Bytes from the start of the segment, a multiple of 64."""
    checksum: int = 0
    """Of the tensor, as `Manifest.checksum_kind` says."""
    spans: Spans | None = None
    """Ranges [start, stop) of elements in C order that are there, in a delta, ascending and apart; None: all."""
    whole: int = 0
    """Of a tensor with spans: the checksum of the whole tensor in the delta's result, in the result's element type."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.dtype not in DTYPES:
            raise ManifestError(f"tensor {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not isinstance(self.shape, tuple) or not all(is_integer(size, MAX_INT) for size in self.shape):
            raise ManifestError(f"tensor {self.name!r}: shape {self.shape!r} is not a tuple of sizes from 0")
        if not is_integer(self.offset, MAX_INT) or self.offset % ALIGNMENT:
            raise ManifestError(f"tensor {self.name!r}: offset {self.offset!r} is not a multiple of {ALIGNMENT} from 0")
        if not is_integer(self.checksum, 2**64 - 1):
            raise ManifestError(f"tensor {self.name!r}: checksum {self.checksum!r} is not an unsigned 64-bit integer")
        if not is_integer(self.whole, 2**64 - 1):
            raise ManifestError(f"tensor {self.name!r}: whole {self.whole!r} is not an unsigned 64-bit integer")
        if self.spans is not None:
            _check_spans(self.name, self.spans, math.prod(self.shape))

    @property
    def num_elements(self) -> int:
        """Elements that are there."""
        return math.prod(self.shape) if self.spans is None else sum(stop - start for start, stop in self.spans)

    @property
    def nbytes(self) -> int:
        """Size without the padding to the next tensor."""
        return self.num_elements * DTYPES[self.dtype].itemsize

    def with_checksum(self, checksum: int) -> TensorSpec:
        """The same tensor with the checksum that its bytes were found to have."""
        made = object.__new__(TensorSpec)  # all other fields have been checked; `copy` takes ten times as long
        for name in _FIELDS:
            object.__setattr__(made, name, getattr(self, name))
        object.__setattr__(made, "checksum", checksum)
        return made


_FIELDS = tuple(field.name for field in fields(TensorSpec))


def _check_spans(name: str, spans: object, size: int) -> None:
    if not isinstance(spans, tuple) or not spans:
        raise ManifestError(f"tensor {name!r}: spans {spans!r:.200} are not a tuple of ranges")
    end = 0
    for span in spans:
        ends = span if isinstance(span, tuple) and len(span) == 2 else (-1, -1)
        if not all(is_integer(value, size) for value in ends) or ends[0] >= ends[1]:
            raise ManifestError(f"tensor {name!r}: span {span!r:.200} is not a range of its {size} elements")
        if ends[0] < end:
            raise ManifestError(f"tensor {name!r}: span {span!r} begins before the end of the one before, {end}")
        end = ends[1]


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= _MAX_NAME:
        raise ManifestError(f"tensor name {name!r:.200} is not a text of 1 to {_MAX_NAME} characters")
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise ManifestError(f"tensor name {name!r:.200} holds a lone surrogate, which has no UTF-8 form")


def is_integer(value: object, high: int) -> bool:
    """Whether value is an integer (True and False are not) from 0 to high."""
    return type(value) is int and 0 <= value <= high
