"""Weights as other processes of the machine can read them, wherever they came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from zerokl.rollout.weight_source import (
    DeviceWeights,
    FolderWeights,
    SharedWeights,
    TensorWeights,
    WeightSource,
    as_array,
)
from zerokl.weight_sync import PublishedFile, WeightPublisher


class ReachableSources:
    """Owns the shared memory that arrays of this process are copied to; it is kept for the next ones until `free`."""

    def __init__(self) -> None:
        self._publisher: WeightPublisher | None = None

    def reachable(self, source: WeightSource, version: int) -> FolderWeights | SharedWeights | DeviceWeights:
        """The source, which arrays are published to be. Working directories of processes may have parted."""
        if isinstance(source, TensorWeights):
            if self._publisher is None:
                self._publisher = WeightPublisher("staging", buffers=1)
            arrays = ((name, as_array(name, tensor)) for name, tensor in source.tensors.items())
            return SharedWeights(published=self._publisher.publish(arrays, version))
        if isinstance(source, FolderWeights):
            return FolderWeights(path=str(Path(source.path).absolute()))
        if isinstance(source.published, PublishedFile):
            path = str(Path(source.published.path).absolute())
            return dataclasses.replace(source, published=dataclasses.replace(source.published, path=path))
        return source

    def free(self) -> None:
        """Give the memory back, where readers have let go of it."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None
