"""Exceptions that cross a process boundary by name: only classes of a fixed list are made on the other side."""

from __future__ import annotations

from collections.abc import Iterable

from zerokl.weight_sync.errors import (
    ChecksumError,
    DeviceHandleError,
    IncompleteUpdateError,
    ManifestError,
    ParentMismatchError,
    PublisherDiedError,
    SegmentBusyError,
    SegmentMissingError,
    SegmentTruncatedError,
    UpdateInProgressError,
    VersionOrderError,
)

COMMON_ERRORS: tuple[type[Exception], ...] = (
    ChecksumError,
    DeviceHandleError,
    IncompleteUpdateError,
    ManifestError,
    MemoryError,
    NotImplementedError,
    OSError,
    ParentMismatchError,
    PublisherDiedError,
    RuntimeError,
    SegmentBusyError,
    SegmentMissingError,
    SegmentTruncatedError,
    TypeError,
    UpdateInProgressError,
    ValueError,
    VersionOrderError,
)
"""What a worker may raise and an engine may pass on."""


class NamedErrors:
    """A list of classes, each made from its text alone; any other error goes as its nearest base in the list."""

    def __init__(self, classes: Iterable[type[Exception]]) -> None:
        self.classes = {kind.__name__: kind for kind in classes}

    def describe(self, error: BaseException) -> tuple[str, str]:
        """(name of a class in the list, text). An error without a base there is a RuntimeError that names it."""
        text = str(error) or type(error).__name__
        for kind in type(error).__mro__:
            if self.classes.get(kind.__name__) is kind:
                return kind.__name__, text
        return RuntimeError.__name__, f"{type(error).__name__}: {text}"

    def make(self, name: str, text: str) -> Exception:
        """The way back; a name that is not in the list makes a RuntimeError."""
        return self.classes.get(name, RuntimeError)(text)
