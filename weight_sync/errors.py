"""What can go wrong between a publisher and a receiver. Every error is raised before a reader has seen a wrong value.

Errors about what a receiver was given are also `ValueError`s: the receiver refuses the publication and stays as it was.
"""

from __future__ import annotations


class WeightSyncError(Exception):
    """Base of all errors of this room."""


class ManifestError(WeightSyncError, ValueError):
    """A manifest is malformed, or does not name the tensors that the model expects."""


class SegmentMissingError(WeightSyncError, ValueError):
    """The named segment does not exist: its publisher closed, died, or replaced it."""


class SegmentTruncatedError(WeightSyncError, ValueError):
    """The segment is smaller than its manifest says."""


class SegmentBusyError(WeightSyncError, ValueError):
    """The publisher is writing a later version into the segment: the publication asked for is gone."""


class ChecksumError(WeightSyncError, ValueError):
    """A tensor's bytes differ from its manifest: damaged, or overwritten by a later publication."""


class BufferLeasedError(WeightSyncError):
    """Every buffer that may be written is still held by a reader; publishing now would change weights under it."""


class SharedMemoryFullError(WeightSyncError):
    """The system's shared memory cannot hold the segment; nothing was written."""


class ProtocolError(WeightSyncError):
    """A step of an update came out of order: a fault of the program that drives it."""


class VersionOrderError(WeightSyncError, ValueError):
    """The version is not the one after the live one, and a rewind was not asked for."""


class ParentMismatchError(WeightSyncError, ValueError):
    """A delta applies to another version than the live one, or gives another result than its publisher has."""


class IncompleteUpdateError(WeightSyncError, ValueError):
    """The source ended before all bytes of the manifest were there."""


class UpdateInProgressError(WeightSyncError, ValueError):
    """Another update holds the only place where weights are staged."""


class DiskFullError(WeightSyncError):
    """The file system cannot hold the publication; the one before is as it was."""


class DeviceHandleError(WeightSyncError, ValueError):
    """Memory of another process cannot be exported or opened or is not as described, or its GPU has failed."""


class PublisherDiedError(WeightSyncError, ValueError):
    """The publisher's process ended before its memory was read to the end."""
