"""Stages weights that a trainer has in a GPU's memory: opened, copied into a free slot and checked on the device."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from zerokl.kernels.device_tensors import DeviceTensor, DeviceTensors
from zerokl.rollout.models.layout import EMBED, LM_HEAD, expected_tensors
from zerokl.weight_sync.device_receiver import DeviceMappings, MappedTensors
from zerokl.weight_sync.session import UpdateSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zerokl.kernels.gpu.device_packing import Place
    from zerokl.kernels.gpu.shared_memory import SharedGpuMemory
    from zerokl.rollout.model_runner import ModelRunner
    from zerokl.rollout.models.config import ModelConfig
    from zerokl.rollout.weight_source import DeviceWeights


class DeviceStaging:
    """What a worker keeps open of trainers' memory, and made of it. For the thread that stages.

    What is mapped is the same object while a trainer publishes the same tensors in the same places; so are then the
    tensors that the runner is given, which keeps by them what goes where.
    """

    def __init__(self, model: ModelConfig, memory: SharedGpuMemory) -> None:
        self._expected = expected_tensors(model)
        self._memory = memory
        self._mappings = DeviceMappings(memory)
        self._tensors: WeakKeyDictionary[MappedTensors, DeviceTensors] = WeakKeyDictionary()
        """The model's among those that are mapped, which fit it."""

    def stage(self, runner: ModelRunner, source: DeviceWeights, version: int) -> UpdateSession:
        """Stage a publication in `runner`; returns its session, verified.

        Raises what `DeviceMappings.lease`, `ModelRunner.stage_device` and the session's steps raise, and
        PublisherDiedError where the trainer ended meanwhile; nothing is staged then.
        """
        session = UpdateSession(self._expected, optional={LM_HEAD: self._expected[EMBED]})
        with self._mappings.lease(source.published) as lease:
            tensors = self._tensors_of(lease.mapped, session)
            session.begin_placed(lease.mapped.layout.with_version(source.published.version))
            try:
                placed = runner.stage_device(tensors, self._placing(source), version)
                checksums = lease.checksums  # known once they are copied, as a rule
                lease.check_owner()  # of memory that is gone anything can have come
                session.verify_placed(checksums, placed)
                check_tied(lease.contents(EMBED, LM_HEAD), self._expected)
            except BaseException:
                runner.discard_staged()
                raise
        return session

    def _placing(self, source: DeviceWeights) -> Place:
        return partial(self._memory.place, bucket_bytes=source.bucket_bytes, nearly_done=source.nearly_staged)

    def release(self) -> None:
        """Unmap all."""
        self._mappings.release()

    def _tensors_of(self, mapped: MappedTensors, session: UpdateSession) -> DeviceTensors:
        known = self._tensors.get(mapped)
        if known is None:
            session.check_fit(mapped.layout)
            specs = [spec for spec in mapped.layout.tensors if spec.name in self._expected]
            addresses = mapped.addresses
            made = {spec.name: DeviceTensor(spec.name, spec.shape, spec.dtype, addresses[spec.name]) for spec in specs}
            known = self._tensors[mapped] = DeviceTensors(made)
        return known


def check_tied(contents: Mapping[str, tuple[str, int]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where a tied head is there and is not the embedding; of both dtype and checksum are given."""
    if LM_HEAD not in expected and LM_HEAD in contents and contents[LM_HEAD] != contents[EMBED]:
        raise ValueError(f"tie_word_embeddings is true, but {LM_HEAD} differs from {EMBED}")
