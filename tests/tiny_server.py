"""Limits that let tests of the server be quick."""

from zerokl.rollout.server.limits import ServerLimits

LIMITS = ServerLimits(heartbeat_seconds=0.2, session_seconds=5.0)
