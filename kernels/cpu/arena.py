"""Memory of the CPU ops: reused buffers for what a step computes, huge pages for the weights it reads."""

from __future__ import annotations

import math
import mmap
import sys

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu

Floats = NDArray[np.float32]

_ALIGN = 64  # bytes: a cache line, and the widest vector


_SLAB_FLOATS = 8 << 20  # 32 MiB: sixteen huge pages


def zeroed_pages(*shape: int) -> Floats:
    """A zeroed array on pages of its own, taken when first written and given back to the system with the array.

    The heap would keep a freed block of any size if it had found room for it between others.
    """
    pages = mmap.mmap(-1, math.prod(shape) * 4)
    return np.frombuffer(pages, np.float32).reshape(shape)


class Slabs:
    """Memory of packed weights, cut from large pieces that lie on huge pages.

    Streaming half a gigabyte of weights per decode step misses the TLB on small pages. A single matrix is often smaller
    than a huge page or a fraction over a few of them, hence the common pieces. Once the last array cut from a piece is
    gone, which is told by reference counts, it is cut again: fresh pages are many times slower to fill than known ones.
    One thread takes at a time; arrays may be dropped by any.
    """

    def __init__(self) -> None:
        self._pieces: list[Floats] = []
        self._free: Floats | None = None
        probe = [np.empty(1, np.float32)]
        self._idle = sys.getrefcount(probe[0])

    def take(self, *shape: int) -> Floats:
        """An uninitialised array that starts on a cache line."""
        size = math.prod(shape)
        lines = -(-size * 4 // _ALIGN) * _ALIGN // 4
        if self._free is None or lines > len(self._free):
            self._free = None
            self._free = self._piece(lines)[:]
        taken, self._free = self._free[:size], self._free[lines:]
        return taken.reshape(shape)

    def finish(self) -> None:
        """Cut the next array from another piece: sets of weights that share none come back as a whole."""
        self._free = None

    def release_spare(self) -> int:
        """Give the pieces that nothing was cut from back to the system; returns their bytes."""
        self.finish()
        before, spare = self.nbytes(), set(self._spare())
        self._pieces = [piece for index, piece in enumerate(self._pieces) if index not in spare]
        return before - self.nbytes()

    def nbytes(self) -> int:
        """Bytes of all pieces, in use or not."""
        return sum(piece.nbytes for piece in self._pieces)

    def _piece(self, lines: int) -> Floats:
        fitting = [index for index in self._spare() if len(self._pieces[index]) >= lines]
        if fitting:
            return self._pieces[min(fitting, key=lambda index: len(self._pieces[index]))]
        piece = _cpu.aligned_empty(max(lines, _SLAB_FLOATS))
        self._pieces.append(piece)
        return piece

    def _spare(self) -> list[int]:
        return [index for index in range(len(self._pieces)) if sys.getrefcount(self._pieces[index]) == self._idle]


class _Slot:
    """One buffer of `capacity` rows, and the view of it that was lent last."""

    __slots__ = ("_start", "capacity", "rows", "storage", "view", "width")

    def __init__(self, rows: int, width: int) -> None:
        # A quarter more, so that a slowly growing batch does not allocate in every step.
        self.capacity = rows + rows // 4
        self.width = width
        self.storage: Floats = np.empty(self.capacity * width + _ALIGN // 4, np.float32)
        self._start = -self.storage.ctypes.data % _ALIGN // 4
        self.reshape(rows)

    def reshape(self, rows: int) -> None:
        """Make the view one of `rows` rows. Its base is the storage, as that of every view of it."""
        self.rows = rows
        self.view: Floats = self.storage[self._start : self._start + rows * self.width].reshape(rows, self.width)


class Arena:
    """Hands out [rows, width] arrays. Not for use by several threads.

    An array belongs to its taker until the taker has dropped it and every view of it, which is told by reference
    counts: so a step needs as many buffers as it has live arrays, they stay warm in the caches from layer to layer, and
    neither a later op of the step nor the next step overwrites what somebody still holds. The same sequence of calls in
    the same shapes gets the same addresses. Buffers grow to the largest step seen and are kept.
    """

    def __init__(self) -> None:
        self._slots: dict[int, list[_Slot]] = {}
        probe = _Slot(1, 1)
        # The counts while nobody but the slot (and, for the storage, its view) looks: measured, because interpreters
        # differ in what the call adds.
        self._view_idle = sys.getrefcount(probe.view)
        self._storage_idle = sys.getrefcount(probe.storage)

    def take(self, rows: int, width: int) -> Floats:
        """An uninitialised array [rows, width], C-contiguous and aligned to cache lines."""
        slots = self._slots.get(width)
        if slots is None:
            slots = self._slots[width] = []
        for index, slot in enumerate(slots):
            if sys.getrefcount(slot.view) == self._view_idle and sys.getrefcount(slot.storage) == self._storage_idle:
                if slot.rows == rows:
                    return slot.view
                if rows > slot.capacity:
                    slot = slots[index] = _Slot(rows, width)
                else:
                    slot.reshape(rows)
                return slot.view
        slots.append(_Slot(rows, width))
        return slots[-1].view

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(slot.storage.nbytes for slots in self._slots.values() for slot in slots)
