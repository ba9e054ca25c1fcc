"""The contract between the ranks of a step: exchanges of rows, numbered instead of fenced by barriers.

A communicator connects `size` ranks, one of which is its owner's. All ranks call the same exchanges in the same order,
so nobody waits for anything but the rows that it needs. Every message carries the step and the number of the exchange
in the step; ranks that have drifted apart find out by the first message instead of computing with foreign rows.

`Array` is the device's array: NumPy on the CPU, device tensors elsewhere. On NCCL an exchange is a grouped send and
receive on the ops' stream; the sizes, which here stand in the message, go ahead as one small exchange of their own, and
step numbers travel with them. A communicator over a part of the ranks is then a split of the parent's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

Array = TypeVar("Array")


class CommunicatorError(RuntimeError):
    """Ranks that do not agree on what they exchange, or a communicator that is closed. It cannot be used afterwards."""


class PeerLostError(CommunicatorError):
    """A rank at the other end is gone."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} is gone: {reason}")
        self.rank = rank


class Communicator(Protocol[Array]):
    """One rank's end. Not for use by several threads at once.

    After any CommunicatorError this end is closed, so that the others learn of it at once: PeerLostError runs from rank
    to rank and no exchange hangs.
    """

    @property
    def rank(self) -> int:
        """This end's place among `size` ranks, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def begin_step(self, step: int) -> None:
        """Exchanges from here on belong to `step`, counted from 0, in this communicator and all of its groups.

        Local: nothing is sent.
        """
        ...

    def all_to_all(self, parts: Sequence[Array]) -> list[Array]:
        """Give part p, [n_p, width], to rank p; get [m_p, width] from each rank p, in rank order.

        All parts of all ranks have one width and one dtype; n_p may be 0. The own part is passed through. Parts may be
        overwritten once the call returns; what was received is read-only and stands until the next exchange of this
        communicator. Raises ValueError for parts that are no such arrays, PeerLostError, CommunicatorError where the
        ranks disagree on step, exchange, width or dtype.
        """
        ...

    def all_gather(self, part: Array) -> list[Array]:
        """Give `part`, [n, width], to every rank; get each rank's, in rank order. Otherwise as `all_to_all`."""
        ...

    def group(self, ranks: Sequence[int]) -> Communicator[Array]:
        """A view over some of the ranks, given ascending with the own one among them, numbered anew from 0.

        Local: nothing is sent. Its exchanges are its members' alone. The same ranks give the same view. Closing it
        closes nothing. Raises ValueError for other ranks.
        """
        ...

    def close(self) -> None:
        """Free everything; idempotent. Arrays received keep what they hold."""
        ...
