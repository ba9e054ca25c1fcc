"""Tensors that a packer reads piece by piece, so that whatever else a piece needs is done while it is in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class NonFiniteWeightsError(ValueError):
    """A tensor of weights holds a NaN or an infinity."""

    def __init__(self, name: str) -> None:
        super().__init__(f"tensor {name!r} holds a NaN or an infinity")
        self.name = name


@runtime_checkable
class RowStream(Protocol):
    """One tensor, read once from its first row to its last. A tensor of another rank than 2 is one row."""

    @property
    def name(self) -> str | None:
        """For errors; None: the values are known to be finite."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        ...

    def wait(self, stop: int) -> None:
        """Have the rows up to `stop` at hand: to read them changes nothing about other streams."""
        ...

    def read(self, stop: int) -> NDArray[Any]:
        """The rows [n, width] from where the last read ended up to row `stop`: float32, or bfloat16 patterns (uint16).

        C-contiguous, and valid until any stream of its set waits, or reads what it did not wait for. Raises ValueError
        when the tensor is not what it should be.
        """
        ...


class ArrayRows:
    """An array of float32 as a `RowStream`."""

    def __init__(self, array: NDArray[np.float32], name: str | None = None) -> None:
        self.name = name
        self.shape = array.shape
        self._rows = array if array.ndim == 2 else array.reshape(1, -1)
        self._next = 0

    def wait(self, stop: int) -> None:
        """All rows are."""

    def read(self, stop: int) -> NDArray[np.float32]:
        """See `RowStream`."""
        start, self._next = self._next, stop
        return np.ascontiguousarray(self._rows[start:stop])


class NamedRows(Mapping[str, RowStream]):
    """A mapping of arrays or streams as one of streams that know their names."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> RowStream:
        tensor = self._tensors[name]
        return tensor if isinstance(tensor, RowStream) else ArrayRows(tensor, name)

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class WholeTensors(Mapping[str, NDArray[Any]]):
    """The same as one of float32 arrays, for ops that take whole tensors; with `patterns` of bfloat16 patterns too."""

    def __init__(self, tensors: Mapping[str, Any], *, patterns: bool = False) -> None:
        self._streams = NamedRows(tensors)
        self._patterns = patterns

    def __getitem__(self, name: str) -> NDArray[Any]:
        stream = self._streams[name]
        rows = stream.read(stream.shape[0] if len(stream.shape) == 2 else 1)
        if self._patterns and rows.dtype == np.uint16:
            if ((rows & 0x7F80) == 0x7F80).any():
                raise NonFiniteWeightsError(name)
            return rows.reshape(stream.shape)
        wide = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows
        if not np.isfinite(wide).all():
            raise NonFiniteWeightsError(name)
        return wide.reshape(stream.shape)

    def __iter__(self) -> Any:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)
