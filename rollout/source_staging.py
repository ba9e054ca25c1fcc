"""Reads, checks and packs weights from wherever they come: what a worker keeps of updates, around its runner."""

from __future__ import annotations

from contextlib import AbstractContextManager

from zerokl.kernels.dispatch import device_memory
from zerokl.rollout.device_staging import DeviceStaging, check_tied
from zerokl.rollout.expert_parallel.own_tensors import OwnTensors
from zerokl.rollout.held_sets import LIVE
from zerokl.rollout.model_runner import ModelRunner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import EMBED, LM_HEAD, expected_tensors
from zerokl.rollout.models.loader import open_tensors
from zerokl.rollout.weight_source import (
    DeviceWeights,
    FolderWeights,
    SharedWeights,
    TensorWeights,
    WeightSource,
    as_array,
)
from zerokl.weight_sync import PublishedFile, PublishedShards, PublishedWeights
from zerokl.weight_sync.live_weights import LiveWeights
from zerokl.weight_sync.receiver import SegmentMappings
from zerokl.weight_sync.session import UpdateSession, receive
from zerokl.weight_sync.transport import Lease


class SourceStaging:
    """Owns the session of what is staged, the checksums of the live set, and what is mapped of trainers' memory.

    One thread at a time calls.
    """

    def __init__(self, model: ModelConfig, device: str, gpu: int | None) -> None:
        """`device` and `gpu` are the worker's."""
        self._model = model
        self._device, self._gpu = device, gpu
        self._session: UpdateSession | None = None
        self._checksums: dict[str, int] = {}
        self._checksum_dtype = "float32"
        self._segments = SegmentMappings()
        self._on_device: DeviceStaging | None = None
        """Made with the first weights that come from a GPU's memory."""

    def stage(self, runner: ModelRunner, source: WeightSource, version: int) -> None:
        """As `Worker.stage_weights`."""
        self._session = None
        if isinstance(source, TensorWeights):
            runner.stage({name: as_array(name, tensor) for name, tensor in source.tensors.items()}, version)
        elif isinstance(source, FolderWeights):
            # Read tensor by tensor while packing: the folder's tensors are never in memory all at once.
            folder = open_tensors(source.path, self._model, patterns=runner.takes_patterns)
            runner.stage(folder, version)
        elif isinstance(source, DeviceWeights):
            self._session = self._staging_on_device().stage(runner, source, version)
        else:
            self._stage_published(runner, source, version)

    def commit(self, runner: ModelRunner) -> None:
        """As `Worker.commit_weights`."""
        session = self._session
        if session is None:
            runner.commit()
            self._checksums = {}
        else:
            session.commit(runner.commit)
            self._checksums, self._checksum_dtype = session.checksums, session.dtype
            session.publish()
        self._session = None

    def discard(self, runner: ModelRunner) -> None:
        """As `Worker.discard_staged`."""
        self._session = None
        runner.discard_staged()

    def release(self) -> None:
        """Unmap trainers' memory."""
        self._segments.release()
        if self._on_device is not None:
            self._on_device.release()

    # -- inside --------------------------------------------------------------------------------------------------------
    def _staging_on_device(self) -> DeviceStaging:
        if self._on_device is None:
            self._on_device = DeviceStaging(self._model, device_memory(self._device, self._gpu))
        return self._on_device

    def _stage_published(self, runner: ModelRunner, source: SharedWeights, version: int) -> None:
        published = source.published
        if isinstance(published, PublishedShards):
            with published.verified() as tensors:
                runner.stage(tensors, version)
            return
        with self._lease(published) as lease:
            if lease.manifest.parent is None:
                self._session = self._stage_arriving(runner, lease, version, source.bucket_bytes)
            else:
                self._session = self._stage_delta(runner, lease, version)

    def _lease(self, published: PublishedWeights | PublishedFile) -> AbstractContextManager[Lease]:
        return self._segments.lease(published) if isinstance(published, PublishedWeights) else published.open()

    def _stage_arriving(self, runner: ModelRunner, lease: Lease, version: int, bucket_bytes: int) -> UpdateSession:
        """Pack a complete set while it is read and checked."""
        expected = expected_tensors(self._model)
        read = {*runner.held_tensors(), LM_HEAD}
        session = UpdateSession(expected, optional={LM_HEAD: expected[EMBED]}, read=read)
        session.begin(version, lease.manifest)
        ends = [spec for spec in lease.manifest.tensors if spec.name in (EMBED, LM_HEAD)]
        check_tied({spec.name: (spec.dtype, spec.checksum) for spec in ends}, expected)
        try:
            runner.stage(session.arriving(lease.buckets(bucket_bytes)), version)
            session.verify_read()
        except BaseException:
            runner.discard_staged()
            raise
        finally:
            session.release()
        return session

    def _stage_delta(self, runner: ModelRunner, lease: Lease, version: int) -> UpdateSession:
        expected = expected_tensors(self._model)
        read = {*runner.held_tensors(), LM_HEAD}
        session = UpdateSession(expected, self._live_weights(runner), {LM_HEAD: expected[EMBED]}, read=read)
        try:
            runner.stage(receive(session, version, lease), version, delta=True)
        finally:
            session.release()
        return session

    def _live_weights(self, runner: ModelRunner) -> LiveWeights | None:
        live = runner.weight_sets.get(LIVE)
        if live is None:
            return None
        tensors = OwnTensors(runner.live_tensors(), self._model)
        return LiveWeights(version=live.version, tensors=tensors, checksums=self._checksums, dtype=self._checksum_dtype)
