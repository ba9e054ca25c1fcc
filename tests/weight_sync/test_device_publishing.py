"""Weights in a GPU's memory, over a GPU of ordinary bytes: what is leased was published, or an error says why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_publications import SHAPES, Trainer, assert_equal, copies_of, seen, tensors_on, trainers_on
from fake_gpu import FakeGpu, FakeTensor
from leftovers import segments_of

from zerokl.weight_sync import (
    BufferLeasedError,
    DeviceHandleError,
    DevicePublisher,
    ManifestError,
    PublishedDeviceWeights,
    PublisherDiedError,
    SegmentBusyError,
    SegmentMissingError,
)
from zerokl.weight_sync.device_checksums import device_checksum
from zerokl.weight_sync.device_descriptor import Descriptor, encode_layout
from zerokl.weight_sync.device_host import copied_to_host
from zerokl.weight_sync.device_receiver import DeviceMappings
from zerokl.weight_sync.manifest import Manifest


@pytest.fixture
def gpu(tmp_path: Path) -> FakeGpu:
    return FakeGpu(tmp_path)


PEER, STRANGER = "0000:02:00.0", "0000:03:00.0"


@pytest.fixture
def start_trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    yield from trainers_on(tmp_path)


# -- one process -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("buffers", [0, 1, 2])
def test_what_is_leased_is_what_was_published(gpu: FakeGpu, buffers: int) -> None:
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    expected = copies_of(tensors)
    with DevicePublisher(gpu, buffers=buffers) as publisher:
        published = PublishedDeviceWeights.from_bytes(publisher.publish(tensors, 3).to_bytes())
        assert published.version == published.manifest.version == 3
        with mappings.lease(published) as lease:
            assert_equal(seen(lease), expected)
            if buffers:
                tensors["embed"].values[...] = 0
                assert_equal(seen(lease), expected)
            assert lease.checksums == {name: device_checksum(values) for name, values in expected.items()}
    assert gpu.done["open"] == 0, "a process does not open its own handles"
    assert gpu.done["settle"] == 1


def test_publishing_again_takes_the_buffers_in_turn(gpu: FakeGpu) -> None:
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    with DevicePublisher(gpu, buffers=2) as publisher:
        before = gpu.done["allocate"]
        published = []
        for version in range(4):
            tensors["norm"].values[...] = version
            published.append((publisher.publish(tensors, version), copies_of(tensors)))
        for weights, expected in published[2:]:
            with mappings.lease(weights) as lease:
                assert_equal(seen(lease), expected)
        for weights, _ in published[:2]:
            with pytest.raises(SegmentBusyError, match="holds a later publication"), mappings.lease(weights):
                pass
        with mappings.lease(published[2][0]), pytest.raises(BufferLeasedError):
            publisher.publish(tensors, 4)
        assert gpu.done["allocate"] == before + 2
        larger = tensors | {"more": gpu.put(np.zeros((300, 300), np.uint16), "bfloat16")}
        with mappings.lease(publisher.publish(larger, 5)) as lease:
            assert_equal(seen(lease), copies_of(larger))


def test_a_trainer_waits_with_its_writes_for_who_reads(gpu: FakeGpu) -> None:
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    expected = copies_of(tensors)
    with DevicePublisher(gpu) as publisher:
        published = publisher.publish(tensors, 1)

        def write() -> None:
            publisher.withdraw()
            tensors["embed"].values[...] = 0

        writer = threading.Thread(target=write)
        with mappings.lease(published) as lease:
            with pytest.raises(BufferLeasedError):
                publisher.withdraw(wait=False)
            writer.start()
            writer.join(0.1)
            assert writer.is_alive()
            assert_equal(seen(lease), expected)
        writer.join()
        with pytest.raises(SegmentBusyError, match="version 1 was withdrawn"), mappings.lease(published):
            pass


def test_what_cannot_be_published_is_named(gpu: FakeGpu) -> None:
    tensors = tensors_on(gpu)
    with pytest.raises(ValueError, match="buffers -1"):
        DevicePublisher(gpu, buffers=-1)
    publisher = DevicePublisher(gpu)
    first = publisher.publish(tensors, 1)
    host, half = FakeTensor(64, (2, 2), "float32"), FakeTensor(64, (2, 2), "float16")
    long = FakeTensor(tensors["norm"].data_ptr(), (1 << 20,), "float32")
    for name, tensor, error, text in (
        ("host", host, DeviceHandleError, "'host' is not in a GPU's memory"),
        ("half", half, ManifestError, "'half' has dtype float16"),
        ("array", np.zeros(3, np.float32), ManifestError, "'array' is a ndarray, not a tensor on a GPU"),
        ("long", long, DeviceHandleError, "'long' does not lie in one allocation"),
    ):
        with pytest.raises(error, match=text):
            DevicePublisher(gpu).publish({name: tensor}, 1)
    base, _ = gpu.allocation_of(tensors["norm"].data_ptr())
    gpu.elsewhere[base] = "0000:02:00.0"
    for buffers in (0, 1):
        with pytest.raises(DeviceHandleError, match=rf"'norm' is on GPU 0000:02:00.0, but .* from GPU {gpu.gpu}"):
            DevicePublisher(gpu, buffers=buffers).publish(tensors, 1)
    gpu.elsewhere.clear()
    with pytest.raises(ManifestError, match="version -1"):
        publisher.publish(tensors, -1)
    with DeviceMappings(gpu).lease(first) as lease:
        assert_equal(seen(lease), copies_of(tensors))
    publisher.close()
    publisher.close()
    with pytest.raises(ValueError, match="is closed"):
        publisher.publish(tensors, 2)


def test_false_publications_are_refused(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    with pytest.raises(ManifestError, match="checksum_kind 'crc' is not one of"):
        Manifest(version=0, tensors=(), total_bytes=0, checksum_kind="crc")
    with DevicePublisher(gpu) as publisher:
        good = publisher.publish(tensors, 1)
        for false in (b"", b"\x93\x07\xa1a", good.to_bytes()[:-1], good.manifest.to_bytes(), good.layout):
            with pytest.raises(ManifestError):
                PublishedDeviceWeights.from_bytes(false)
        short = encode_layout(good.manifest.tensors[:-1], good.manifest.total_bytes)
        for false, text in (
            (replace(good, layout=b""), "not msgpack"),
            (replace(good, layout=good.layout[:-1]), "not msgpack"),
            (replace(good, layout=Manifest(version=0, tensors=(), total_bytes=0).to_bytes()), "checksums of kind"),
            (replace(good, layout=short), "5 places for 4 tensors"),
        ):
            with pytest.raises(ManifestError, match=text), mappings.lease(false):
                pass
        for field, value in {"version": -1, "key": True, "segment": b"a", "layout": "a", "checksums": None}.items():
            with pytest.raises(ManifestError):
                replace(good, **{field: value})
        with pytest.raises(SegmentMissingError), mappings.lease(replace(good, segment="/etc/passwd")):
            pass
        with mappings.lease(replace(good, checksums="/etc/passwd")) as lease, pytest.raises(SegmentMissingError):
            assert lease.checksums
        with mappings.lease(good) as lease:
            assert_equal(seen(lease), copies_of(tensors))
        found = Descriptor.from_bytes
        places = ((0, 1 << 40), (0, 0), (0, 0), (0, 0), (0, 0))
        monkeypatch.setattr(Descriptor, "from_bytes", lambda *given: replace(found(*given), places=places))
        with pytest.raises(DeviceHandleError, match="ends beyond the memory"), DeviceMappings(gpu).lease(good):
            pass


def test_memory_is_exported_once_while_it_stays(gpu: FakeGpu) -> None:
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    with DevicePublisher(gpu) as publisher:
        publisher.publish(tensors, 1)
        once = gpu.done["export"]
        publisher.publish(tensors, 2)
        assert gpu.done["export"] == once == 4
        tensors["embed"] = gpu.put(tensors["embed"].values + np.uint16(1), "bfloat16")
        with mappings.lease(publisher.publish(tensors, 3)) as lease:
            assert_equal(seen(lease), copies_of(tensors))
        assert gpu.done["export"] == once + 1


# -- two processes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("buffers", [0, 2])
def test_another_process_reads_through_handles_that_stay_open(
    gpu: FakeGpu, start_trainer: Callable[..., Trainer], buffers: int
) -> None:
    trainer, mappings = start_trainer(buffers), DeviceMappings(gpu)
    published = trainer.published
    for version in (1, 2, 3):
        assert published.version == version
        with mappings.lease(published) as lease:
            copies = seen(lease)
            assert lease.checksums == {name: device_checksum(values) for name, values in copies.items()}
            lease.check_owner()
        if version < 3:
            published = trainer.publish()
    opened = 2 if buffers else sum(1 for shape, _ in SHAPES.values() if np.prod(shape))
    assert gpu.done["open"] == opened and gpu.done["close"] == 0
    trainer.tell("close")
    trainer.wait()
    with pytest.raises(SegmentMissingError), mappings.lease(published):
        pass
    assert gpu.done["close"] == opened
    mappings.release()


def test_a_trainer_of_another_process_waits_too(gpu: FakeGpu, start_trainer: Callable[..., Trainer]) -> None:
    trainer, mappings = start_trainer(), DeviceMappings(gpu)
    with mappings.lease(trainer.published) as lease:
        trainer.tell("write")
        copies = seen(lease)
        assert lease.checksums == {name: device_checksum(values) for name, values in copies.items()}
    trainer.wait()
    with pytest.raises(SegmentBusyError, match="withdrawn"), mappings.lease(trainer.published):
        pass
    mappings.release()


def test_a_trainer_killed_while_it_is_read_is_told(gpu: FakeGpu, start_trainer: Callable[..., Trainer]) -> None:
    trainer, mappings = start_trainer(), DeviceMappings(gpu)
    with mappings.lease(trainer.published) as lease:
        trainer.kill()
        with pytest.raises(PublisherDiedError, match=f"process {trainer.process.pid}, ended while it was read"):
            lease.check_owner()
    assert segments_of(trainer.process.pid) == []
    assert gpu.done["open"] == gpu.done["close"] > 0
    with pytest.raises(SegmentMissingError, match="its publisher closed or died"), mappings.lease(trainer.published):
        pass


def test_a_trainer_killed_before_it_is_read_is_told(gpu: FakeGpu, start_trainer: Callable[..., Trainer]) -> None:
    trainer, mappings = start_trainer(), DeviceMappings(gpu)
    trainer.kill()
    with pytest.raises(PublisherDiedError), mappings.lease(trainer.published):
        pass
    assert segments_of(trainer.process.pid) == [] and gpu.done["open"] == 0


def test_a_wrong_handle_is_told(
    gpu: FakeGpu, start_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, mappings, found = start_trainer(), DeviceMappings(gpu), Descriptor.from_bytes

    def wrong(*given: Any) -> Descriptor:
        descriptor = found(*given)
        return replace(descriptor, allocations=tuple(replace(a, handle=bytes(64)) for a in descriptor.allocations))

    with monkeypatch.context() as patch:
        patch.setattr(Descriptor, "from_bytes", wrong)
        with pytest.raises(DeviceHandleError, match="InvalidResourceHandle"), mappings.lease(trainer.published):
            pass
    with mappings.lease(trainer.published) as lease:
        assert len(seen(lease)) == len(SHAPES)
    mappings.release()


def test_a_peer_reads_what_is_on_another_gpu(tmp_path: Path, start_trainer: Callable[..., Trainer]) -> None:
    trainer, peer = start_trainer(), FakeGpu(tmp_path, PEER)
    mappings = DeviceMappings(peer)
    with mappings.lease(trainer.published) as lease:
        first = seen(lease)
    with mappings.lease(trainer.publish()) as lease:
        assert (seen(lease)["embed"] != first["embed"]).any()
    assert peer.done["open"] == len(SHAPES) - 1
    mappings.release()
    assert peer.done["close"] == peer.done["open"]


def test_memory_of_a_gpu_without_peer_access_is_refused_by_both_names(
    tmp_path: Path, start_trainer: Callable[..., Trainer], gpu: FakeGpu
) -> None:
    trainer, stranger = start_trainer(), FakeGpu(tmp_path, STRANGER, strangers=[gpu.gpu])
    named = rf"on GPU {gpu.gpu}, which GPU {STRANGER} has no peer access to"
    with pytest.raises(DeviceHandleError, match=named), DeviceMappings(stranger).lease(trainer.published):
        pass
    assert stranger.done["open"] == 0


def test_false_names_of_gpus_are_refused(gpu: FakeGpu) -> None:
    for false in ("x" * 65, b"0000:01:00.0", None):
        gpu.gpu = false  # type: ignore[assignment]
        with DevicePublisher(gpu) as publisher:
            published = publisher.publish(tensors_on(gpu), 1)
            with pytest.raises(ManifestError, match="no name of a GPU"), DeviceMappings(gpu).lease(published):
                pass


def test_a_publication_of_another_process_is_copied_to_the_host(
    gpu: FakeGpu, start_trainer: Callable[..., Trainer]
) -> None:
    trainer, mappings = start_trainer(), DeviceMappings(gpu)
    with mappings.lease(trainer.published) as lease:
        wanted = seen(lease)
    mappings.release()
    opened = gpu.done["open"]
    copies = {spec.name: array for spec, array in copied_to_host(trainer.published, gpu)}
    assert_equal(copies, {name: values.view(copies[name].dtype) for name, values in wanted.items()})
    assert gpu.done["open"] == gpu.done["close"] == 2 * opened, "nothing stays mapped"
    trainer.kill()
    with pytest.raises(PublisherDiedError):
        copied_to_host(trainer.published, gpu)
