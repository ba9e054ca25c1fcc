"""Versions follow each other."""

from __future__ import annotations

from zerokl.weight_sync.errors import VersionOrderError


def check_version(live: int, version: int, *, allow_rewind: bool = False) -> None:
    """Raise VersionOrderError unless `version` follows the live one; with `allow_rewind` any will do."""
    if version != live + 1 and not allow_rewind:
        kind = "a gap" if version > live else "a repetition" if version == live else "a step back"
        raise VersionOrderError(
            f"version must be {live + 1}, the one after the live version, unless allow_rewind=True, "
            f"got {version} ({kind})"
        )
