"""Sockets between the ranks of one machine, made in two phases so that a controller can order them.

    bound = BoundRank.bind(rank, size, folder)     every rank; then, once all have bound,
    links = bound.connect()                        every rank

Messages keep their boundaries (SOCK_SEQPACKET) and may bring one descriptor; the end of a process is the end of its
sockets, which its peers see at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from zerokl.kernels.communicator import CommunicatorError, PeerLostError

_HELLO = struct.Struct("<qq")
_MAX_PATH = 107  # bytes in sockaddr_un
_MAX_MESSAGE = 256


class BoundRank:
    """A rank that the others can reach and that has not reached them yet."""

    def __init__(self, rank: int, size: int, listener: socket.socket, folder: Path) -> None:
        self.rank, self.size = rank, size
        self._listener, self._folder = listener, folder

    @classmethod
    def bind(cls, rank: int, size: int, folder: str | Path) -> BoundRank:
        """Listen at `folder`/rank-N. Nothing is waited for.

        Raises ValueError for a rank outside [0, size) and for a folder whose name is too long for a socket's.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank must be in [0, {size}), got {rank}")
        path = os.fsencode(_address(Path(folder), rank))
        if len(path) > _MAX_PATH:
            raise ValueError(f"folder must make socket paths of at most {_MAX_PATH} bytes, got {len(path)}: {folder}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(path)
            listener.listen(size)
        except OSError:
            listener.close()
            raise
        return cls(rank, size, listener, Path(folder))

    def connect(self, timeout: float = 60.0) -> Links:
        """Reach the lower ranks, which must have bound, and wait for the higher ones.

        Raises CommunicatorError when a lower rank is not there or a higher one has not come after `timeout` seconds.
        """
        peers: dict[int, socket.socket] = {}
        try:
            for lower in range(self.rank):
                peers[lower] = self._reach(lower)
            self._listener.settimeout(timeout)
            while len(peers) < self.size - 1:
                rank, link = self._accept()
                if not self.rank < rank < self.size or rank in peers:
                    link.close()
                    raise CommunicatorError(f"rank {self.rank} was reached by rank {rank} of {self.size} unexpectedly")
                peers[rank] = link
        except BaseException:
            for link in peers.values():
                link.close()
            raise
        finally:
            self.close()
        return Links(peers)

    def close(self) -> None:
        """Stop listening; idempotent."""
        if self._listener.fileno() >= 0:
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                _address(self._folder, self.rank).unlink()

    def _reach(self, rank: int) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            link.connect(os.fsencode(_address(self._folder, rank)))
            link.sendall(_HELLO.pack(self.rank, self.size))
        except OSError as error:
            link.close()
            raise PeerLostError(rank, f"it does not listen ({error})") from error
        return link

    def _accept(self) -> tuple[int, socket.socket]:
        try:
            link, _ = self._listener.accept()
        except TimeoutError as error:
            raise CommunicatorError(
                f"rank {self.rank}: a rank above it did not connect within {self._listener.gettimeout()} s"
            ) from error
        hello = link.recv(_MAX_MESSAGE)
        rank, size = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (-1, -1)
        if size != self.size:
            link.close()
            raise CommunicatorError(f"rank {self.rank} of {self.size} was reached by a rank of {size}")
        link.settimeout(None)
        return rank, link


class Links:
    """Connected sockets by the rank at the other end."""

    def __init__(self, peers: Mapping[int, socket.socket]) -> None:
        self._peers = dict(peers)

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return all(link.fileno() >= 0 for link in self._peers.values())

    def send(self, rank: int, message: bytes, fd: int | None) -> None:
        """Send at most 256 bytes and perhaps a descriptor. Raises PeerLostError."""
        try:
            if fd is None:
                self._peers[rank].send(message, socket.MSG_NOSIGNAL)
            else:
                socket.send_fds(self._peers[rank], [message], [fd], socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerLostError(rank, str(error)) from error

    def receive(self, ranks: Iterable[int]) -> Iterable[tuple[int, bytes, int | None]]:
        """One message of each of these ranks, as they come: (rank, message, descriptor or None).

        Sleeps meanwhile. Raises PeerLostError as soon as any of those still awaited is gone.
        """
        awaited = {self._peers[rank].fileno(): rank for rank in ranks}
        poller = select.poll()
        for descriptor in awaited:
            poller.register(descriptor, select.POLLIN)
        while awaited:
            for descriptor, _ in poller.poll():
                rank = awaited.pop(descriptor)
                poller.unregister(descriptor)
                yield rank, *self._take(rank)

    def close(self) -> None:
        """Close all; idempotent."""
        for link in self._peers.values():
            link.close()

    def _take(self, rank: int) -> tuple[bytes, int | None]:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._peers[rank], _MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError as error:
            raise PeerLostError(rank, str(error)) from error
        if not message:
            raise PeerLostError(rank, "its socket is closed")
        return message, descriptors[0] if descriptors else None


def call_off(folder: Path, size: int) -> None:
    """Have the ranks that still wait for others in `connect` raise CommunicatorError: some will not come."""
    for rank in range(size):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link, contextlib.suppress(OSError):
            link.setblocking(False)
            link.connect(os.fsencode(_address(folder, rank)))


def _address(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"
