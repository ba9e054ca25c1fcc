"""Stages weights that a trainer has in a GPU's memory: opened, copied into a free slot and checked on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zerokl.kernels.device_tensors import DeviceTensor, DeviceTensors
from zerokl.rollout.models.layout import EMBED, LM_HEAD, expected_tensors
from zerokl.weight_sync.device_receiver import DeviceMappings
from zerokl.weight_sync.session import UpdateSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zerokl.kernels.gpu.shared_memory import SharedGpuMemory
    from zerokl.rollout.model_runner import ModelRunner
    from zerokl.rollout.models.config import ModelConfig
    from zerokl.rollout.weight_source import DeviceWeights
    from zerokl.weight_sync.manifest import Manifest


class DeviceStaging:
    """What a worker keeps open of trainers' memory. For the thread that stages."""

    def __init__(self, model: ModelConfig, memory: SharedGpuMemory) -> None:
        self._model = model
        self._memory = memory
        self._mappings = DeviceMappings(memory)

    def stage(self, runner: ModelRunner, source: DeviceWeights, version: int) -> UpdateSession:
        """Stage a publication in `runner`; returns its session, verified.

        Raises what `DeviceMappings.lease`, `ModelRunner.stage_device` and the session's steps raise, and
        PublisherDiedError where the trainer ended meanwhile; nothing is staged then.
        """
        expected = expected_tensors(self._model)
        session = UpdateSession(expected, optional={LM_HEAD: expected[EMBED]})
        with self._mappings.lease(source.published) as lease:
            session.begin(version, lease.manifest)
            check_tied(lease.manifest, expected)
            tensors = DeviceTensors(
                {
                    spec.name: DeviceTensor(spec.name, spec.shape, spec.dtype, lease.addresses[spec.name])
                    for spec in lease.manifest.tensors
                    if spec.name in expected
                }
            )
            try:
                checksums = runner.stage_device(tensors, self._memory, version, source.bucket_bytes)
                lease.check_owner()
                session.verify_placed(checksums)
            except BaseException:
                runner.discard_staged()
                raise
        return session

    def release(self) -> None:
        """Unmap all."""
        self._mappings.release()


def check_tied(manifest: Manifest, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where a tied head is there and is not the embedding."""
    content = {spec.name: (spec.dtype, spec.checksum) for spec in manifest.tensors if spec.name in (EMBED, LM_HEAD)}
    if LM_HEAD not in expected and LM_HEAD in content and content[LM_HEAD] != content[EMBED]:
        raise ValueError(f"tie_word_embeddings is true, but {LM_HEAD} differs from {EMBED}")
