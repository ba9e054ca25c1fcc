"""Errors of a running engine. A user's bad argument is a ValueError or TypeError instead and changes nothing."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """The worker cannot go on (its process died, its link broke); `__cause__` holds what is known."""


class StepAbandonedError(RuntimeError):
    """A rank was lost in the step, which was applied nowhere, and has been replaced; `__cause__` has its end."""


class EngineFailedError(RuntimeError):
    """A step failed; requests in flight got this error and the engine serves no more. `__cause__` is the reason."""


class EngineClosedError(RuntimeError):
    """The engine was closed before or while the call ran."""


class EngineAsleepError(RuntimeError):
    """The call needs weights or a KV pool that `sleep` has put away; `wake_up` brings them back."""


class AbortedError(RuntimeError):
    """The call's requests were aborted, and a part of its result is of no use: a `score` that did not reach its end."""


class StaleRequestError(RuntimeError):
    """The call was ended by a weight update: it held tokens older than `max_staleness` allows."""


class HookError(RuntimeError):
    """A hook registered for `before_update` raised, which calls the update off; `__cause__` is what it raised."""


class PauseLiftedError(RuntimeError):
    """`resume_generation` was called before the pause that this call asked for held."""


class SessionClosedError(RuntimeError):
    """The session was closed; what it holds can still be read."""


class SessionBusyError(RuntimeError):
    """A turn of the session is running: nothing else can be done to it before its end."""


_MAX_REASON = 300


def reason_of(error: BaseException) -> str:
    """Why something was refused, for the log: without the value that was, which may be a prompt."""
    return f"{type(error).__name__}: {error}".partition(", got ")[0][:_MAX_REASON]
