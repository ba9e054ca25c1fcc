"""Where a set of weights comes from: what a user may give, and how it is told to a worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.validation import check_int
from zerokl.weight_sync.transport import DEFAULT_BUCKET_BYTES

if TYPE_CHECKING:
    from zerokl.weight_sync import PublishedDeviceWeights, PublishedFile, PublishedShards, PublishedWeights

    Published = PublishedWeights | PublishedFile | PublishedShards

INT64_MAX = 2**63 - 1

DEVICE_BUCKET_BYTES = 256 << 20
"""More launches would cost the host, beside the thread that plans steps, more than a smaller one gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorWeights:
    """Weights given as arrays of the calling process, read before `stage_weights` returns.

    `tensors` maps Hugging Face names to float32 arrays; anything `np.from_dlpack` or `np.asarray` takes will do.
    """

    tensors: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderWeights:
    """Weights in a Hugging Face style folder of safetensors files."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeights:
    """Weights that a trainer published: in shared memory, mapped by the worker and not copied, or in a file."""

    published: Published
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    """Of a file: bytes that are in memory at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWeights:
    """Weights that a trainer has in a GPU's memory, for an engine on a GPU of the same machine."""

    published: PublishedDeviceWeights
    bucket_bytes: int = DEVICE_BUCKET_BYTES
    """Bytes that a launch copies. A step's programs go before those of a launch that has begun."""
    nearly_staged: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)
    """Called in the thread that stages, when only the last bytes are awaited; not told to other processes."""


WeightSource = TensorWeights | FolderWeights | SharedWeights | DeviceWeights
"""Where a set of weights comes from."""


def weight_source(source: Any, version: int | None, bucket_bytes: int | None = None) -> tuple[WeightSource, int | None]:
    """What a user gave as weights, and their version: the given one, or else the publication's, or else None.

    Raises ValueError for a source of another kind, and for a version from 0 or bucket_bytes from 1 that are none.
    """
    from zerokl.weight_sync import PublishedDeviceWeights, PublishedFile, PublishedShards, PublishedWeights

    if version is not None:
        version = check_int("version", version, 0, INT64_MAX)
    if isinstance(source, (PublishedWeights, PublishedFile, PublishedShards, PublishedDeviceWeights)):
        size: Any = {} if bucket_bytes is None else {"bucket_bytes": check_int("bucket_bytes", bucket_bytes, 1)}
        version = source.version if version is None else version
        if isinstance(source, PublishedDeviceWeights):
            return DeviceWeights(published=source, **size), version
        return SharedWeights(published=source, **size), version
    if isinstance(source, (str, os.PathLike)):
        return FolderWeights(path=os.fspath(source)), version
    if isinstance(source, Mapping):
        return TensorWeights(tensors=source), version
    kind = f"an object of type {type(source).__name__}"
    if isinstance(source, Iterable):
        try:
            return TensorWeights(tensors=dict(source)), version
        except (TypeError, ValueError):
            kind += " whose items are no pairs of name and tensor"
    raise ValueError(f"source must be tensors by name, a folder or PublishedWeights, got {kind}")


def check_source(source: WeightSource, device: str) -> None:
    """Raise ValueError for weights that an engine on `device` cannot read."""
    if isinstance(source, DeviceWeights) and device != "gpu":
        raise ValueError(f"source is in a GPU's memory, so the engine's device must be 'gpu', got {device!r}")


def as_array(name: str, tensor: Any) -> NDArray[Any]:
    """A NumPy view of a tensor (Paddle's through DLPack, without a copy) or the array itself.

    Raises ValueError naming a tensor that NumPy cannot view.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    try:
        if hasattr(tensor, "__dlpack__"):
            # A Paddle parameter refuses to export itself while it wants gradients.
            return np.from_dlpack(tensor.detach() if hasattr(tensor, "detach") else tensor)
        return np.asarray(tensor)
    except (TypeError, RuntimeError, BufferError) as error:
        raise ValueError(f"{name} must be an array that NumPy can view, got {type(tensor).__name__}: {error}") from None
