"""Weights from a trainer to an engine: a manifest that says what was published, and what carries the bytes.

Knows neither models nor engines: it moves named arrays. Names load on first use, so importing this room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerokl.weight_sync.errors import (
        BufferLeasedError,
        ChecksumError,
        ManifestError,
        SegmentBusyError,
        SegmentMissingError,
        SegmentTruncatedError,
        SharedMemoryFullError,
        WeightSyncError,
    )
    from zerokl.weight_sync.manifest import Manifest, ManifestDiff, PublishedWeights, TensorSpec
    from zerokl.weight_sync.publisher import WeightPublisher
    from zerokl.weight_sync.receiver import open_published
    from zerokl.weight_sync.segments import reap_dead_segments

__all__ = [
    "BufferLeasedError",
    "ChecksumError",
    "Manifest",
    "ManifestDiff",
    "ManifestError",
    "PublishedWeights",
    "SegmentBusyError",
    "SegmentMissingError",
    "SegmentTruncatedError",
    "SharedMemoryFullError",
    "TensorSpec",
    "WeightPublisher",
    "WeightSyncError",
    "open_published",
    "reap_dead_segments",
]

_MODULES = {
    "Manifest": "manifest",
    "ManifestDiff": "manifest",
    "PublishedWeights": "manifest",
    "TensorSpec": "manifest",
    "WeightPublisher": "publisher",
    "open_published": "receiver",
    "reap_dead_segments": "segments",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
