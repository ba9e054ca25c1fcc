"""A part that cannot be run here says so; it never passes in silence."""

from __future__ import annotations


class PartRefusedError(RuntimeError):
    """Something that a part needs is not on this machine; the message names it and where it was looked for."""
