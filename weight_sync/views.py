"""Sets of arrays by name that are computed on access, so that a set is never in memory twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.errors import ManifestError

Floats = NDArray[np.float32]

WIDENED = ("float32", "float16", "bfloat16")
"""Stored types whose values are float32 values."""

_ELEMENTS = 1 << 18


def widen(stored: NDArray[Any], dtype: str) -> Floats:
    """The float32 values of an array of one of the types of WIDENED; float32 itself as it is. Exact."""
    if dtype == "float32":
        return stored
    wide = np.empty(stored.shape, np.float32)
    source, target = np.ascontiguousarray(stored).reshape(-1), wide.reshape(-1)
    for start in range(0, target.size, _ELEMENTS):  # pieces that stay in the cache
        part = slice(start, start + _ELEMENTS)
        if dtype == "bfloat16":
            bits = target[part].view(np.uint32)
            bits[:] = source[part]
            np.left_shift(bits, 16, out=bits)
        else:
            target[part] = source[part]
    return wide


def narrow(values: NDArray[Any], out: NDArray[np.uint16]) -> bool:
    """Write float32 values, flat like `out`, as bfloat16 patterns, rounded to nearest, ties to even.

    Returns whether one of them changed. A NaN stays one.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = bits[nan] | np.uint32(0x00400000)
    np.right_shift(rounded, np.uint32(16), out=out, casting="unsafe")
    return bool(np.any(bits & np.uint32(0xFFFF)))


class WideTensors(Mapping[str, Floats]):
    """float32 arrays by name over stored ones; a wider type is made on access.

    Raises ManifestError for a type that has no exact float32 form.
    """

    def __init__(self, stored: Mapping[str, NDArray[Any]], dtypes: Mapping[str, str]) -> None:
        for name in stored:
            if dtypes[name] not in WIDENED:
                raise ManifestError(f"tensor {name!r} has dtype {dtypes[name]}; must be float32, float16 or bfloat16")
        self._stored = stored
        self._dtypes = dtypes

    def __getitem__(self, name: str) -> Floats:
        return widen(self._stored[name], self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without making an array."""
        return {name: array.shape for name, array in self._stored.items()}


class Overlay(Mapping[str, Any]):
    """The tensors of `over`, and those of `under` that it lacks."""

    def __init__(self, over: Mapping[str, Any], under: Mapping[str, Any]) -> None:
        self._over, self._under = over, under

    def __getitem__(self, name: str) -> Any:
        return self._over[name] if name in self._over else self._under[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._over
        yield from (name for name in self._under if name not in self._over)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ShardedTensors(Mapping[str, NDArray[Any]]):
    """Whole tensors over the parts that ranks hold, joined on access.

    `axes` says along which axis a tensor is cut; one that it does not name is whole on every rank, and rank 0's counts.
    Raises ManifestError when ranks do not hold the same names, or parts that do not fit each other.
    """

    def __init__(self, ranks: Sequence[Mapping[str, NDArray[Any]]], axes: Mapping[str, int]) -> None:
        if not ranks:
            raise ManifestError("ranks: there must be at least one shard, got 0")
        for rank, shard in enumerate(ranks[1:], 1):
            if unlike := sorted(shard.keys() ^ ranks[0].keys()):
                raise ManifestError(f"rank {rank} and rank 0 do not hold the same tensors: {unlike[:8]}")
        for name, axis in axes.items():
            _check_parts(name, axis, [shard[name].shape for shard in ranks if name in shard])
        self._ranks, self._axes = ranks, axes

    def __getitem__(self, name: str) -> NDArray[Any]:
        first = self._ranks[0][name]
        if name not in self._axes:
            return first
        return np.concatenate([shard[name] for shard in self._ranks], axis=self._axes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks[0])

    def __len__(self) -> int:
        return len(self._ranks[0])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the whole tensor, without joining any."""
        return {name: self._shape(name) for name in self}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = list(self._ranks[0][name].shape)
        if name in self._axes:
            shape[self._axes[name]] = sum(shard[name].shape[self._axes[name]] for shard in self._ranks)
        return tuple(shape)


def _check_parts(name: str, axis: int, shapes: Sequence[tuple[int, ...]]) -> None:
    if not shapes:
        raise ManifestError(f"axes: {name!r} is no tensor of the shards")
    if not 0 <= axis < len(shapes[0]):
        raise ManifestError(f"axes: axis {axis} of {name!r} is not one of its {len(shapes[0])}")
    rest = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(rest) > 1:
        raise ManifestError(f"tensor {name!r}: parts of shapes {list(shapes)} do not fit along axis {axis}")
