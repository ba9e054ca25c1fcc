"""Sets of weights in a file, or those of a GPU in host memory, while theirs is wanted for something else."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Take = Callable[[tuple[int, ...], "np.dtype[Any]"], Array]


@dataclasses.dataclass(frozen=True, slots=True)
class _Spilled:
    """Stands for an array whose bytes are in the file."""

    index: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class SpilledSets:
    """Trees of dataclasses, tuples and NumPy arrays, the arrays written to an unlinked file.

    What is in memory is the trees with place holders. An array that stands in several places is written once, and is
    one array again after `restore`. The file vanishes with `close`, or with the process.
    """

    def __init__(self, sets: Mapping[str, Any], folder: str | None, resident: Array) -> None:
        """Write the arrays of `sets`, except `resident`, which stays. ValueError where the folder cannot take them."""
        places: dict[int, _Spilled] = {}
        self._file: BinaryIO | None = None

        def write(leaf: Any) -> Any:
            if not isinstance(leaf, np.ndarray) or leaf is resident:
                return leaf
            if id(leaf) not in places:
                assert self._file is not None
                places[id(leaf)] = _Spilled(len(places), self._file.tell(), leaf.shape, leaf.dtype)
                self._file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
            return places[id(leaf)]

        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open for as long as the object
            self._sets = {name: _mapped(tree, write) for name, tree in sets.items()}
            self._file.flush()
        except OSError as error:
            self.close()
            raise ValueError(
                f"spill_dir must be a folder with room for the weights, got {folder!r}: {error}"
            ) from error

    def restore(self, take: Take) -> dict[str, Any]:
        """The sets as they were, in arrays of `take(shape, dtype)`."""
        arrays: dict[int, Array] = {}

        def read(leaf: Any) -> Any:
            if not isinstance(leaf, _Spilled):
                return leaf
            if leaf.index not in arrays:
                assert self._file is not None, "the file is closed"
                array = arrays[leaf.index] = take(leaf.shape, leaf.dtype)
                self._file.seek(leaf.offset)
                num_read = self._file.readinto(array.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
                assert num_read == array.nbytes, "the file is ours alone"
            return arrays[leaf.index]

        return {name: _mapped(tree, read) for name, tree in self._sets.items()}

    def close(self) -> None:
        """Forget the file; idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


class HostedSets:
    """The same of a GPU: its tensors as arrays in the host's memory."""

    def __init__(self, sets: Mapping[str, Any], get: Callable[[Any], Array], resident: Any) -> None:
        """`get` copies a tensor to the host; `resident` stays where it is."""
        held: dict[int, _Held] = {}

        def hold(leaf: Any) -> Any:
            if not hasattr(leaf, "data_ptr") or leaf is resident:
                return leaf
            if id(leaf) not in held:
                held[id(leaf)] = _Held(len(held), get(leaf))
            return held[id(leaf)]

        self._sets = {name: _mapped(tree, hold) for name, tree in sets.items()}

    def restore(self, put: Callable[[Array], Any]) -> dict[str, Any]:
        """The sets as they were, in tensors of `put(array)`."""
        tensors: dict[int, Any] = {}

        def bring(leaf: Any) -> Any:
            if not isinstance(leaf, _Held):
                return leaf
            if leaf.index not in tensors:
                tensors[leaf.index] = put(leaf.array)
            return tensors[leaf.index]

        return {name: _mapped(tree, bring) for name, tree in self._sets.items()}

    def close(self) -> None:
        """Forget the arrays; idempotent."""
        self._sets = {}


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """Stands for a tensor."""

    index: int
    array: Array


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The tree with its leaves changed."""
    if isinstance(tree, tuple):
        return tuple(_mapped(child, change) for child in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, (type, _Spilled, _Held)):
        changed = {field.name: _mapped(getattr(tree, field.name), change) for field in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **changed)
    return change(tree)
