"""Errors on the wire: a class by name, from a fixed list, and its text."""

from __future__ import annotations

from collections.abc import Mapping

from zerokl.rollout.errors import (
    AbortedError,
    EngineAsleepError,
    EngineClosedError,
    EngineFailedError,
    HookError,
    PauseLiftedError,
    StaleRequestError,
)
from zerokl.rollout.named_errors import COMMON_ERRORS, NamedErrors
from zerokl.rollout.protocol.fields import ProtocolError


class BusyError(RuntimeError):
    """The server holds as much as it may; the client waits for `room` and asks again by itself."""


class ServerClosingError(RuntimeError):
    """The server ends soon and takes no further calls."""


class CallCancelledError(RuntimeError):
    """The call was given up by its client."""


class DeadlineError(TimeoutError):
    """The call's deadline passed before it was done; it had no effect, or none beyond what it had begun."""


ERRORS = NamedErrors(
    (
        *COMMON_ERRORS,
        AbortedError,
        BusyError,
        CallCancelledError,
        DeadlineError,
        EngineAsleepError,
        EngineClosedError,
        EngineFailedError,
        HookError,
        PauseLiftedError,
        ProtocolError,
        ServerClosingError,
        StaleRequestError,
    )
)
"""Errors that keep their class on the way."""

_MAX_CHARACTERS = 4096


def failure_of(error: BaseException) -> dict[str, str]:
    """Body of an `error` message."""
    name, text = ERRORS.describe(error)
    return {"error": name, "text": text[:_MAX_CHARACTERS]}


def exception_of(body: Mapping[str, str]) -> Exception:
    """Inverse; a class that is not in the list becomes RuntimeError."""
    return ERRORS.make(body["error"], body["text"])
