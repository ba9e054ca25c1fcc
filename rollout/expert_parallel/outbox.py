"""Rows that a rank puts down in shared memory for others to read in place."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.communicator import CommunicatorError

_ALIGN = 64  # bytes: a cache line
_FULL = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG})


class Outbox:
    """Shared memory that this rank alone writes. It has no name: the system frees it with its last user, however
    that one ends, and peers get its descriptor over their socket.

    It grows to what is asked for and never shrinks, so that a peer's mapping stays valid.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("zerokl-outbox", os.MFD_CLOEXEC)
        self.size = 0
        """Bytes that are there to be mapped."""
        self.given: set[int] = set()
        """Ranks that have the descriptor."""
        self._memory: mmap.mmap | None = None

    def put(self, parts: list[NDArray[Any]]) -> list[int]:
        """Copy the parts in, each onto a cache line; returns their offsets in bytes.

        Raises CommunicatorError when the memory cannot be had.
        """
        offsets, end = [], 0
        for part in parts:
            offsets.append(end)
            end += -(-part.nbytes // _ALIGN) * _ALIGN
        if end > self.size:
            self._grow(end)
        for part, offset in zip(parts, offsets, strict=True):
            if part.size:
                assert self._memory is not None
                target = np.frombuffer(self._memory, part.dtype, part.size, offset)
                np.copyto(target.reshape(part.shape), part)
        return offsets

    def close(self) -> None:
        """Let go of the memory; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._memory = None

    def _grow(self, size: int) -> None:
        # A quarter more, so that a slowly growing batch does not map anew in every step.
        size = -(-(size + size // 4) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            # Reserved at once: a write to memory that is not there would end the process by SIGBUS.
            os.posix_fallocate(self.fd, 0, size)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            reason = os.strerror(error.errno)
            raise CommunicatorError(
                f"cannot reserve {size} bytes of shared memory for an exchange: {reason}"
            ) from error
        self._memory = mmap.mmap(self.fd, size)
        self.size = size


class Inbox:
    """A peer's outbox, as this rank sees it: read-only."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._memory: mmap.mmap | None = None
        self._size = 0

    def read(self, size: int, offset: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in place, in an outbox that has grown to `size` bytes."""
        if size > self._size:
            self._memory = mmap.mmap(self._fd, size, prot=mmap.PROT_READ)
            self._size = size
        if not shape[0] * shape[1]:
            return np.empty(shape, dtype)
        assert self._memory is not None
        return np.frombuffer(self._memory, dtype, shape[0] * shape[1], offset).reshape(shape)

    def close(self) -> None:
        """Let go of it; arrays read before keep it mapped. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._memory = None
