"""Weights from a trainer to an engine: a manifest that says what was published, and what carries the bytes.

Knows neither models nor engines: it moves named arrays. Names load on first use, so importing this room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerokl.weight_sync.device_descriptor import PublishedDeviceWeights
    from zerokl.weight_sync.device_publisher import DevicePublisher
    from zerokl.weight_sync.disk import PublishedFile, publish_file
    from zerokl.weight_sync.errors import (
        BufferLeasedError,
        ChecksumError,
        DeviceHandleError,
        DiskFullError,
        IncompleteUpdateError,
        ManifestError,
        ParentMismatchError,
        ProtocolError,
        PublisherDiedError,
        SegmentBusyError,
        SegmentMissingError,
        SegmentTruncatedError,
        SharedMemoryFullError,
        VersionOrderError,
        WeightSyncError,
    )
    from zerokl.weight_sync.inproc import PublishedArrays
    from zerokl.weight_sync.layouts import TrainerLayout, from_hugging_face, paddleformers_layout, to_hugging_face
    from zerokl.weight_sync.live_weights import LiveWeights
    from zerokl.weight_sync.manifest import Manifest, ManifestDiff, PublishedWeights
    from zerokl.weight_sync.publisher import WeightPublisher
    from zerokl.weight_sync.receiver import open_published
    from zerokl.weight_sync.segments import reap_dead_segments
    from zerokl.weight_sync.session import UpdateSession
    from zerokl.weight_sync.shards import PublishedShards
    from zerokl.weight_sync.tensor_spec import TensorSpec

__all__ = [
    "BufferLeasedError",
    "ChecksumError",
    "DeviceHandleError",
    "DevicePublisher",
    "DiskFullError",
    "IncompleteUpdateError",
    "LiveWeights",
    "Manifest",
    "ManifestDiff",
    "ManifestError",
    "ParentMismatchError",
    "ProtocolError",
    "PublishedArrays",
    "PublishedDeviceWeights",
    "PublishedFile",
    "PublishedShards",
    "PublishedWeights",
    "PublisherDiedError",
    "SegmentBusyError",
    "SegmentMissingError",
    "SegmentTruncatedError",
    "SharedMemoryFullError",
    "TensorSpec",
    "TrainerLayout",
    "UpdateSession",
    "VersionOrderError",
    "WeightPublisher",
    "WeightSyncError",
    "from_hugging_face",
    "open_published",
    "paddleformers_layout",
    "publish_file",
    "reap_dead_segments",
    "to_hugging_face",
]

_MODULES = {
    "DevicePublisher": "device_publisher",
    "PublishedDeviceWeights": "device_descriptor",
    "LiveWeights": "live_weights",
    "PublishedArrays": "inproc",
    "PublishedFile": "disk",
    "PublishedShards": "shards",
    "TrainerLayout": "layouts",
    "UpdateSession": "session",
    "from_hugging_face": "layouts",
    "paddleformers_layout": "layouts",
    "publish_file": "disk",
    "to_hugging_face": "layouts",
    "Manifest": "manifest",
    "ManifestDiff": "manifest",
    "PublishedWeights": "manifest",
    "TensorSpec": "tensor_spec",
    "WeightPublisher": "publisher",
    "open_published": "receiver",
    "reap_dead_segments": "segments",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
