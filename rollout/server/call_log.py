"""A line for what becomes of each call of a client."""

from __future__ import annotations

import logging

from zerokl.rollout.errors import reason_of
from zerokl.rollout.protocol.failures import BusyError, CallCancelledError
from zerokl.rollout.server.served_call import Outcome, ServedCall

_MAX_IDS = 16
_logger = logging.getLogger(__name__)


def log_call(level: int, event: str, client: str, call: ServedCall, **fields: object) -> None:
    """A line with the call's client, number, kind and the first ids of its requests."""
    if _logger.isEnabledFor(level):
        ids = {"request_ids": call.request_ids[:_MAX_IDS]} if call.request_ids else {}
        _logger.log(level, event, extra={"client": client, "call": call.number, "kind": call.kind, **ids, **fields})


def log_outcome(client: str, call: ServedCall, outcome: Outcome) -> None:
    """A call is done, or was rejected: why, without any value that it brought.

    What the client asks again for by itself, or gave up, is no more than debugging; so is what went well.
    """
    if not isinstance(outcome, BaseException):
        log_call(logging.DEBUG, "call done", client, call)
    else:
        level = logging.DEBUG if isinstance(outcome, (BusyError, CallCancelledError)) else logging.INFO
        log_call(level, "call rejected", client, call, reason=reason_of(outcome))
