"""Weights in a GPU's memory, over a GPU of ordinary bytes: what is leased was published, or an error says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu, FakeTensor, elements
from leftovers import segments_of, wait_for_end
from numpy.typing import NDArray

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
from zerokl.weight_sync.device_checksums import CHECKSUM_KIND, device_checksum
from zerokl.weight_sync.device_descriptor import Descriptor, encode_layout
from zerokl.weight_sync.device_host import copied_to_host
from zerokl.weight_sync.device_receiver import DeviceLease, DeviceMappings
from zerokl.weight_sync.manifest import Manifest

SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "embed": ((50, 24), "bfloat16"),
    "norm": ((7,), "float32"),
    "scalar": ((), "float32"),
    "empty": ((0, 4), "bfloat16"),
    "deep": ((2, 3, 5), "bfloat16"),
}
Copies = dict[str, NDArray[Any]]


@pytest.fixture
def gpu(tmp_path: Path) -> FakeGpu:
    return FakeGpu(tmp_path)


def tensors_on(gpu: FakeGpu, seed: int = 0) -> dict[str, FakeTensor]:
    random = np.random.default_rng(seed)
    made = {}
    for name, (shape, dtype) in SHAPES.items():
        bits = random.standard_normal(shape).astype(np.float32).view(np.uint32)
        made[name] = gpu.put((bits >> 16).astype(np.uint16) if dtype == "bfloat16" else bits, dtype)
    return made


def copies_of(tensors: dict[str, FakeTensor]) -> Copies:
    return {name: tensor.values.copy() for name, tensor in tensors.items()}


def seen(lease: DeviceLease) -> Copies:
    return {
        spec.name: elements(lease.addresses[spec.name], spec.shape, spec.dtype).copy()
        for spec in lease.manifest.tensors
    }


def assert_equal(actual: Copies, expected: Copies) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


class Trainer:
    """The process of `device_trainer.py`."""

    def __init__(self, folder: Path, buffers: int = 0) -> None:
        script = str(Path(__file__).with_name("device_trainer.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", script, str(folder), str(buffers),
             json.dumps(SHAPES)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.published = self._published()

    def _published(self) -> PublishedDeviceWeights:
        assert self.process.stdout is not None
        return PublishedDeviceWeights.from_bytes(bytes.fromhex(json.loads(self.process.stdout.readline())["published"]))

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline()) is None

    def publish(self) -> PublishedDeviceWeights:
        self.tell("publish")
        return self._published()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        assert wait_for_end(self.process.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


PEER, STRANGER = "0000:02:00.0", "0000:03:00.0"


@pytest.fixture
def start_trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    trainers: list[Trainer] = []

    def start(buffers: int = 0) -> Trainer:
        trainers.append(Trainer(tmp_path, buffers))
        return trainers[-1]

    yield start
    for trainer in trainers:
        trainer.end()


# -- one process -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("buffers", [0, 1, 2])
def test_what_is_leased_is_what_was_published(gpu: FakeGpu, buffers: int) -> None:
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    expected = copies_of(tensors)
    with DevicePublisher(gpu, buffers=buffers) as publisher:
        published = PublishedDeviceWeights.from_bytes(publisher.publish(tensors, 3).to_bytes())
        assert published.version == 3 and published.manifest.checksum_kind == CHECKSUM_KIND
        with mappings.lease(published) as lease:
            assert_equal(seen(lease), expected)
            if buffers:
                tensors["embed"].values[...] = 0
                assert_equal(seen(lease), expected)
        for spec in published.manifest.tensors:
            assert spec.checksum == device_checksum(expected[spec.name])
    assert gpu.done["open"] == 0, "a process does not open its own handles"
    assert gpu.done["follow"] == gpu.done["wait"] == 1


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
        for false in (b"", b"\x93\x06\xa1a", good.to_bytes()[:-1], good.manifest.to_bytes(), good.layout):
            with pytest.raises(ManifestError):
                PublishedDeviceWeights.from_bytes(false)
        short = encode_layout(good.manifest.tensors[:-1], good.manifest.total_bytes)
        for false, text in (
            (replace(good, layout=b""), "not msgpack"),
            (replace(good, layout=good.layout[:-1]), "not msgpack"),
            (replace(good, layout=Manifest(version=0, tensors=(), total_bytes=0).to_bytes()), "checksums of kind"),
            (replace(good, checksums=good.checksums[:-8]), "32 bytes of checksums for 5 tensors"),
            (replace(good, checksums=good.checksums[:-1]), "39 bytes of checksums for 5 tensors"),
            (replace(good, layout=short), "5 places for 4 tensors"),
        ):
            with pytest.raises(ManifestError, match=text), mappings.lease(false):
                pass
        for field, value in {"version": -1, "key": True, "segment": b"a", "layout": "a", "checksums": None}.items():
            with pytest.raises(ManifestError):
                replace(good, **{field: value})
        with pytest.raises(SegmentMissingError), mappings.lease(replace(good, segment="/etc/passwd")):
            pass
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
            lease.check_owner()
        assert all(device_checksum(copies[spec.name]) == spec.checksum for spec in published.manifest.tensors)
        if version < 3:
            published = trainer.publish()
    opened = 2 if buffers else sum(1 for shape, _ in SHAPES.values() if np.prod(shape))
    assert gpu.done["open"] == opened and gpu.done["close"] == 0
    assert gpu.done["wait"] == 3
    trainer.tell("close")
    trainer.wait()
    with pytest.raises(SegmentMissingError), mappings.lease(published):
        pass
    assert gpu.done["close"] == opened and gpu.done["open_event"] == gpu.done["close_event"]
    mappings.release()


def test_a_trainer_of_another_process_waits_too(gpu: FakeGpu, start_trainer: Callable[..., Trainer]) -> None:
    trainer, mappings = start_trainer(), DeviceMappings(gpu)
    with mappings.lease(trainer.published) as lease:
        trainer.tell("write")
        copies = seen(lease)
        assert all(device_checksum(copies[s.name]) == s.checksum for s in trainer.published.manifest.tensors)
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
        patch.setattr(Descriptor, "from_bytes", lambda *given: replace(found(*given), event=bytes(64)))
        with pytest.raises(DeviceHandleError, match="event cannot be opened"), mappings.lease(trainer.published):
            pass
    with mappings.lease(trainer.published) as lease:
        assert len(seen(lease)) == len(SHAPES)
    mappings.release()


def test_a_peer_reads_and_waits_for_no_event_of_another_gpu(
    tmp_path: Path, start_trainer: Callable[..., Trainer]
) -> None:
    trainer, peer = start_trainer(), FakeGpu(tmp_path, PEER)
    mappings = DeviceMappings(peer)
    with mappings.lease(trainer.published) as lease:
        first = seen(lease)
    with mappings.lease(trainer.publish()) as lease:
        assert (seen(lease)["embed"] != first["embed"]).any()
    assert peer.done["open"] == len(SHAPES) - 1 and peer.done["open_event"] == peer.done["wait"] == 0
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
