"""Memory for what a step computes on its way: the same addresses for every step of a kind, and one step's worth of it.

All steps run one after the other on one stream and none reads what another has left here, so all kinds of steps use the
same chunks of memory from the start. Within a step a tensor is used again once nobody refers to it: what an op has
returned is never written by a later op while the model still holds it.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from zerokl.kernels.gpu.elementwise import Tensor

ALIGN = 128
"""Entries between tensors: Triton compiles apart what is not aligned to 16 bytes, and bulk copies want 128."""

CHUNK_ENTRIES = 1 << 24

_Kind: TypeAlias = "dict[tuple[tuple[int, ...], str], list[Tensor]]"


class Scratch:
    """Tensors by kind of step. `empty(shape, dtype)` allocates chunks, which are kept."""

    def __init__(self, empty: Callable[[Sequence[int], str], Tensor], chunk_entries: int = CHUNK_ENTRIES) -> None:
        self._empty = empty
        self._chunk_entries = chunk_entries
        self._chunks: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        """Per type (entries, tensor)."""
        self._kinds: dict[Hashable, tuple[_Kind, dict[str, tuple[int, int]]]] = {}
        """Per kind of step the tensors made so far, and per type the chunk and the entry in it where the next goes."""
        self._tensors: _Kind = {}
        self._ends: dict[str, tuple[int, int]] = {}

    def begin(self, kind: Hashable) -> None:
        """A step of this kind begins; nothing of the last one is referred to any more."""
        if kind not in self._kinds:
            self._kinds[kind] = {}, {}
        self._tensors, self._ends = self._kinds[kind]

    def take(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """An uninitialised tensor, the caller's while it is referred to."""
        made = self._tensors.setdefault((shape, dtype), [])
        for tensor in made:
            if sys.getrefcount(tensor) <= _UNUSED:
                return tensor
        made.append(self._carve(math.prod(shape), dtype).reshape(list(shape)))
        return made[-1]

    def clear(self) -> None:
        """Forget everything, for the memory to be used otherwise."""
        self._chunks.clear()
        self._kinds.clear()
        self._tensors, self._ends = {}, {}

    def _carve(self, size: int, dtype: str) -> Tensor:
        chunks = self._chunks[dtype]
        number, start = self._ends.get(dtype, (0, 0))
        while number < len(chunks) and chunks[number][0] < start + size:
            number, start = number + 1, 0
        if number == len(chunks):
            entries = max(self._chunk_entries, size)
            chunks.append((entries, self._empty([entries], dtype)))
        self._ends[dtype] = number, start + -(-size // ALIGN) * ALIGN
        return chunks[number][1][start : start + size]


def _count_unused() -> int:
    made = [object()]
    for tensor in made:
        return sys.getrefcount(tensor)
    raise AssertionError


_UNUSED = _count_unused()
"""References to an entry of a list, seen from a loop over it, that nobody else refers to."""
