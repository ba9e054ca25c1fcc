"""The communicator of ranks on one machine: rows in shared memory, their descriptions over Unix sockets.

A view (all ranks, or a group) has two outboxes, used in turn by the count of its exchanges. Who begins exchange n of a
view has finished n - 1, for which every member has sent its part, which it did after it was done with n - 2: so the
outbox of n - 2 is free, without a barrier. Memory carries rows alone, never a flag: a message is the leave to read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.communicator import CommunicatorError
from zerokl.rollout.expert_parallel.links import BoundRank, Links
from zerokl.rollout.expert_parallel.outbox import Inbox, Outbox

Array = NDArray[Any]

# step, exchange, kind, number of the view's ranks and their checksum | box bytes, offset, rows, width, dtype
_MESSAGE = struct.Struct("<qqqqq qqqq8s")
_KINDS = ("all_to_all", "all_gather")


class SharedMemoryCommunicator:
    """`zerokl.kernels.communicator.Communicator[NDArray]` between processes (or threads, one end each) of a machine."""

    def __init__(self, links: Links, rank: int, size: int) -> None:
        self._step = 0
        self._links = links
        self._views: dict[tuple[int, ...], _View] = {}
        self._all = self._view(tuple(range(size)), rank)
        self.rank, self.size = rank, size

    @classmethod
    def bind(cls, rank: int, size: int, folder: str | Path) -> BoundRank:
        """The first phase, of every rank: see `BoundRank.bind`."""
        return BoundRank.bind(rank, size, folder)

    @classmethod
    def connect(cls, bound: BoundRank, timeout: float = 60.0) -> SharedMemoryCommunicator:
        """The second phase, once every rank has bound: see `BoundRank.connect`."""
        return cls(bound.connect(timeout), bound.rank, bound.size)

    def begin_step(self, step: int) -> None:
        """As `Communicator.begin_step`."""
        for view in self._views.values():
            view.begin_step(step)
        self._step = step

    def all_to_all(self, parts: Sequence[Array]) -> list[Array]:
        """As `Communicator.all_to_all`."""
        return self._all.all_to_all(parts)

    def all_gather(self, part: Array) -> list[Array]:
        """As `Communicator.all_gather`."""
        return self._all.all_gather(part)

    def group(self, ranks: Sequence[int]) -> _View:
        """As `Communicator.group`."""
        members = tuple(ranks)
        if list(members) != sorted(set(members) & set(range(self.size))) or self.rank not in members:
            raise ValueError(
                f"ranks must be ascending, in [0, {self.size}) and hold {self.rank}, the own rank; got {list(members)}"
            )
        return self._view(members, members.index(self.rank))

    def close(self) -> None:
        """As `Communicator.close`."""
        self._links.close()
        for view in self._views.values():
            view.free()

    def _view(self, members: tuple[int, ...], rank: int) -> _View:
        if members not in self._views:
            view = self._views[members] = _View(self, self._links, members, rank)
            view.begin_step(self._step)
        return self._views[members]


class _View:
    """Some of the ranks, numbered anew: the `Communicator` that `group` gives."""

    def __init__(self, owner: SharedMemoryCommunicator, links: Links, members: tuple[int, ...], rank: int) -> None:
        self.rank, self.size = rank, len(members)
        self._owner, self._links, self._members = owner, links, members
        self._peers = {member: place for place, member in enumerate(members) if place != rank}
        self._checksum = sum((member + 1) * 1_000_003**place for place, member in enumerate(members)) % (1 << 62)
        self._outboxes = (Outbox(), Outbox())
        self._inboxes: dict[tuple[int, int], Inbox] = {}
        self._step = self._exchange = self._count = 0

    def begin_step(self, step: int) -> None:
        """As `Communicator.begin_step`, for this view alone."""
        self._step, self._exchange = step, 0

    def all_to_all(self, parts: Sequence[Array]) -> list[Array]:
        """As `Communicator.all_to_all`."""
        if len(parts) != self.size:
            raise ValueError(f"parts must be one per rank, {self.size}, got {len(parts)}")
        return self._trade(0, list(parts))

    def all_gather(self, part: Array) -> list[Array]:
        """As `Communicator.all_gather`."""
        return self._trade(1, [part])

    def group(self, ranks: Sequence[int]) -> _View:
        """As `Communicator.group`, in this view's numbers."""
        if not all(0 <= rank < self.size for rank in ranks):
            raise ValueError(f"ranks must be in [0, {self.size}), got {list(ranks)}")
        return self._owner.group([self._members[rank] for rank in ranks])

    def close(self) -> None:
        """Nothing: the view lives as long as the communicator that it is of."""

    def free(self) -> None:
        """Let go of the shared memory; idempotent."""
        for outbox in self._outboxes:
            outbox.close()
        for inbox in self._inboxes.values():
            inbox.close()

    def _trade(self, kind: int, parts: list[Array]) -> list[Array]:
        """One exchange. `parts` are by rank, or one for all."""
        _check_parts(parts)
        own = parts[self.rank % len(parts)]
        if not self._links.is_open:
            raise CommunicatorError("the communicator is closed")
        try:
            self._send(kind, parts)
            received = {self.rank: own} | self._receive(kind, own)
        except BaseException:
            self._owner.close()  # so that nobody waits for this rank
            raise
        self._exchange, self._count = self._exchange + 1, self._count + 1
        return [received[place] for place in range(self.size)]

    def _agreed(self, kind: int) -> tuple[int, ...]:
        """What the messages of one exchange have in common."""
        return self._step, self._exchange, kind, self.size, self._checksum

    def _send(self, kind: int, parts: list[Array]) -> None:
        box = self._outboxes[self._count % 2]
        if len(parts) == 1:
            by_place = dict.fromkeys(self._peers.values(), 0)
        else:
            by_place = {place: index for index, place in enumerate(self._peers.values())}
            parts = [parts[place] for place in by_place]
        if not parts:
            return
        offsets = box.put(parts)
        for member, place in self._peers.items():
            part, offset = parts[by_place[place]], offsets[by_place[place]]
            facts = (box.size, offset, *part.shape, part.dtype.str.encode())
            new = member not in box.given
            self._links.send(member, _MESSAGE.pack(*self._agreed(kind), *facts), box.fd if new else None)
            box.given.add(member)

    def _receive(self, kind: int, own: Array) -> dict[int, Array]:
        received = {}
        for member, message, descriptor in self._links.receive(self._peers):
            *agreed, size, offset, rows, width, name = _MESSAGE.unpack(message)
            box = (member, self._count % 2)
            if descriptor is not None:
                # A rank that is out of step gives its descriptors in another order, so this comes before the check.
                self._inboxes.setdefault(box, Inbox(descriptor))
            self._check_agreed(member, tuple(agreed), self._agreed(kind))
            dtype = np.dtype(name.rstrip(b"\0").decode())
            if (width, dtype) != (own.shape[1], own.dtype):
                raise CommunicatorError(
                    f"exchange {self._exchange} of step {self._step}: rank {member} has rows of {width} {dtype}, "
                    f"this one of {own.shape[1]} {own.dtype}"
                )
            received[self._peers[member]] = self._inboxes[box].read(size, offset, (rows, width), dtype)
        return received

    def _check_agreed(self, member: int, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
        if theirs == ours:
            return
        raise CommunicatorError(f"rank {member} is in {_told(theirs)}, this one in {_told(ours)}")


def _told(agreed: tuple[int, ...]) -> str:
    step, exchange, kind, size, checksum = agreed
    return f"exchange {exchange} of step {step} ({_KINDS[kind]} of {size} ranks, view {checksum:x})"


def _check_parts(parts: list[Array]) -> None:
    first = parts[0]
    for part in parts:
        if part.ndim != 2 or part.shape[1] != first.shape[1] or part.dtype != first.dtype or part.dtype.hasobject:
            raise ValueError(
                f"parts must be [n, width] arrays of one width and dtype, got {part.shape} {part.dtype} "
                f"beside {first.shape} {first.dtype}"
            )
