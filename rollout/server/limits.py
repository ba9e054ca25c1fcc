"""What a server takes at most: of one message, one client, and all of them together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from zerokl.rollout.validation import check_float, check_int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds of a server. A bad value raises ValueError naming field, value and bound."""

    max_message_bytes: int = 16 << 20
    """Of one frame; a peer that sends a larger one is disconnected."""
    max_clients: int = 256
    max_calls: int = 4096
    """Calls of one client in flight."""
    max_requests: int = 65_536
    """Sequences of one client in flight, over all its calls."""
    max_queued_bytes: int = 1 << 30
    """Of all clients: calls as received, and results at their longest, from submission until they are acknowledged."""
    window_bytes: int = 4 << 20
    """Sent to one client and not yet acknowledged; beyond it results wait where they are, and tokens in the engine."""
    max_unread_messages: int = 65_536
    """For one client, not yet acknowledged, answers to refused calls included; a client with more is dropped."""
    max_upload_bytes: int = 16 << 30
    """Weights that are sent as arrays, of all clients together."""
    heartbeat_seconds: float = 5.0
    """How often clients are asked to be heard of."""
    session_seconds: float = 30.0
    """A client that was not heard of for so long is gone: its calls are aborted."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_seconds"):
                object.__setattr__(
                    self, field.name, check_float(field.name, value, "in (0, 86400]", 0.0, 86400.0, open_low=True)
                )
            else:
                check_int(field.name, value, 1)
        if self.session_seconds < 2 * self.heartbeat_seconds:
            raise ValueError(
                f"session_seconds must be at least twice heartbeat_seconds ({self.heartbeat_seconds:g}), "
                f"got {self.session_seconds:g}"
            )
