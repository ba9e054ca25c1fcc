"""Errors on the wire: a class by name, from a fixed list, and its text."""

from __future__ import annotations

from collections.abc import Mapping

from zerokl.rollout.errors import (
    EngineAsleepError,
    EngineClosedError,
    EngineFailedError,
    HookError,
    PauseLiftedError,
    StaleRequestError,
)
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.weight_sync.errors import (
    ChecksumError,
    IncompleteUpdateError,
    ManifestError,
    ParentMismatchError,
    SegmentBusyError,
    SegmentMissingError,
    SegmentTruncatedError,
    UpdateInProgressError,
    VersionOrderError,
)


class BusyError(RuntimeError):
    """The server holds as much as it may; the client waits for `room` and asks again by itself."""


class ServerClosingError(RuntimeError):
    """The server ends soon and takes no further calls."""


class CallCancelledError(RuntimeError):
    """The call was given up by its client."""


class DeadlineError(TimeoutError):
    """The call's deadline passed before it was done; it had no effect, or none beyond what it had begun."""


_CLASSES: tuple[type[Exception], ...] = (
    BusyError,
    CallCancelledError,
    ChecksumError,
    DeadlineError,
    EngineAsleepError,
    EngineClosedError,
    EngineFailedError,
    HookError,
    IncompleteUpdateError,
    ManifestError,
    MemoryError,
    NotImplementedError,
    OSError,
    ParentMismatchError,
    PauseLiftedError,
    ProtocolError,
    RuntimeError,
    SegmentBusyError,
    SegmentMissingError,
    SegmentTruncatedError,
    ServerClosingError,
    StaleRequestError,
    TypeError,
    UpdateInProgressError,
    ValueError,
    VersionOrderError,
)
ERRORS: Mapping[str, type[Exception]] = {kind.__name__: kind for kind in _CLASSES}
"""Errors that keep their class on the way; another one arrives as its nearest base in this table."""

_MAX_CHARACTERS = 4096


def failure_of(error: BaseException) -> dict[str, str]:
    """Body of an `error` message."""
    known = next((kind.__name__ for kind in type(error).__mro__ if ERRORS.get(kind.__name__) is kind), None)
    text = str(error) or type(error).__name__
    if known is None:
        return {"error": "RuntimeError", "text": f"{type(error).__name__}: {text}"[:_MAX_CHARACTERS]}
    return {"error": known, "text": text[:_MAX_CHARACTERS]}


def exception_of(body: Mapping[str, str]) -> Exception:
    """Inverse; a class that is not in the table becomes RuntimeError."""
    return ERRORS.get(body["error"], RuntimeError)(body["text"])
