"""Memory that sets of weights take turns in, at the same addresses each time.

Steps that were recorded over a set hold addresses: they serve the next set in the same slot. With one live set and one
that is staged there are two slots, and after the first two updates nothing is allocated or recorded any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerokl.kernels.gpu.packed import Tensor


class SlotUse:
    """A set's hold on its slot, which is free for the next once nobody refers to this."""

    def __init__(self, number: int) -> None:
        self.number = number
        """Of the slot; no other slot of this process has it again."""


class WeightSlot:
    """The tensors of one set in the order in which they are packed."""

    def __init__(self, number: int, empty: Callable[[Sequence[int], str], Tensor]) -> None:
        self._number = number
        self._empty = empty
        self._tensors: list[tuple[tuple[int, ...], str, Tensor]] = []
        self._next = 0
        self._use: weakref.ref[SlotUse] | None = None
        self.filling: Any = None
        """What `DevicePacker` keeps for the next set from the same place; it may refer to the slot's tensors."""

    @property
    def is_free(self) -> bool:
        """Whether no set is here."""
        return self._use is None or self._use() is None

    def begin(self) -> SlotUse:
        """Fill the slot anew, from its first tensor on."""
        assert self.is_free, "a set is here"
        use = SlotUse(self._number)
        self._use, self._next = weakref.ref(use), 0
        return use

    def leave(self) -> None:
        """The set that was to be here will not be."""
        self._use = None

    def take(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """The next tensor, whose values are those of the set before."""
        if self._next == len(self._tensors):
            self._tensors.append((shape, dtype, self._empty(shape, dtype)))
        known_shape, known_dtype, tensor = self._tensors[self._next]
        assert (known_shape, known_dtype) == (shape, dtype), "a slot is for one model"
        self._next += 1
        return tensor


class WeightSlots:
    """Slots for the sets of one model. One thread at a time fills them; sets may be dropped by any."""

    def __init__(self, empty: Callable[[Sequence[int], str], Tensor]) -> None:
        self._empty = empty
        self._slots: dict[int, WeightSlot] = {}
        self._count = 0

    @property
    def numbers(self) -> Set[int]:
        """Of the slots that there are, free or not."""
        return self._slots.keys()

    def free_slot(self) -> WeightSlot:
        """A slot to fill, a new one where none is free."""
        for slot in self._slots.values():
            if slot.is_free:
                return slot
        self._count += 1
        made = self._slots[-self._count] = WeightSlot(-self._count, self._empty)
        return made

    def release_spare(self) -> None:
        """Forget the slots that are free, and their memory."""
        self._slots = {number: slot for number, slot in self._slots.items() if not slot.is_free}
