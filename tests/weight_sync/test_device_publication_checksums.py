"""Checksums that are computed while receivers copy: waited for, never guessed, and told where they do not come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from device_publications import Trainer, assert_equal, copies_of, seen, tensors_on, trainers_on
from fake_gpu import FakeGpu

from zerokl.weight_sync import (
    BufferLeasedError,
    DeviceHandleError,
    DevicePublisher,
    PublishedDeviceWeights,
    PublisherDiedError,
    SegmentBusyError,
)
from zerokl.weight_sync.device_checksums import device_checksum
from zerokl.weight_sync.device_host import copied_to_host
from zerokl.weight_sync.device_receiver import DeviceMappings


class SlowGpu(FakeGpu):
    """Its checksums wait until they are let go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.go_on = threading.Event()
        self.before_checksums = self._wait

    def _wait(self) -> None:
        assert self.go_on.wait(20), "nobody lets them go"


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowGpu]:
    gpu = SlowGpu(tmp_path)
    yield gpu
    gpu.go_on.set()


@pytest.fixture
def start_trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    yield from trainers_on(tmp_path)


def later(act: Callable[[], object]) -> threading.Thread:
    """A thread that does it, and has been seen not to be done after a while."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    return thread


def test_what_is_published_is_read_while_checksums_are_computed(slow: SlowGpu) -> None:
    tensors, mappings, found = tensors_on(slow), DeviceMappings(slow), {}
    expected = copies_of(tensors)
    with DevicePublisher(slow) as publisher:
        published = publisher.publish(tensors, 1)
        with mappings.lease(published) as lease:
            assert_equal(seen(lease), expected)
            reader = later(lambda: found.update(lease.checksums))
            slow.go_on.set()
            reader.join()
    assert found == {name: device_checksum(values) for name, values in expected.items()}


def test_a_trainer_writes_when_its_checksums_have_been_computed(slow: SlowGpu) -> None:
    tensors = tensors_on(slow)
    expected = copies_of(tensors)
    with DevicePublisher(slow) as publisher:
        published = publisher.publish(tensors, 1)
        with pytest.raises(BufferLeasedError, match="are being computed"):
            publisher.withdraw(wait=False)
        with DeviceMappings(slow).lease(published) as lease:
            slow.go_on.set()
            assert lease.checksums == {name: device_checksum(values) for name, values in expected.items()}
        slow.go_on.clear()
        publisher.withdraw()
        published = publisher.publish(tensors, 2)
        writer = later(publisher.withdraw)
        slow.go_on.set()
        writer.join()
        with pytest.raises(SegmentBusyError, match="withdrawn"), DeviceMappings(slow).lease(published):
            pass


def test_with_buffers_publishing_waits_for_the_copy(slow: SlowGpu) -> None:
    tensors, published = tensors_on(slow), []
    expected = copies_of(tensors)
    with DevicePublisher(slow, buffers=1) as publisher:
        thread = later(lambda: published.append(publisher.publish(tensors, 1)))
        slow.go_on.set()
        thread.join()
        tensors["norm"].values[...] = 0
        with DeviceMappings(slow).lease(published[0]) as lease:
            assert_equal(seen(lease), expected)
            assert lease.checksums == {name: device_checksum(values) for name, values in expected.items()}


def test_checksums_are_of_the_publication_that_is_leased(tmp_path: Path) -> None:
    """One segment has those of one publication after the other."""
    gpu = FakeGpu(tmp_path)
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    with DevicePublisher(gpu) as publisher:
        names = set()
        for version in range(3):
            publisher.withdraw()
            tensors["norm"].values[...] = version
            published = publisher.publish(tensors, version)
            names.add(published.checksums)
            with mappings.lease(published) as lease:
                assert lease.checksums["norm"] == device_checksum(tensors["norm"].values)
        assert len(names) == 1


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
@pytest.mark.parametrize("buffers", [0, 1])
def test_a_gpu_that_fails_is_told_to_both(tmp_path: Path, buffers: int, kind: type[Exception]) -> None:
    gpu = FakeGpu(tmp_path)
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)

    def fail() -> None:
        raise kind("CUDA: cudaErrorIllegalAddress")

    with DevicePublisher(gpu, buffers=buffers) as publisher:
        gpu.before_checksums = fail
        if buffers:
            with pytest.raises(kind, match="IllegalAddress"):
                publisher.publish(tensors, 1)
        else:
            published = publisher.publish(tensors, 1)
            with mappings.lease(published) as lease:
                for _ in range(2):
                    with pytest.raises(DeviceHandleError, match="failed to compute the checksums"):
                        assert lease.checksums
            with pytest.raises(kind, match="IllegalAddress"):
                publisher.withdraw()
            with pytest.raises(SegmentBusyError, match="withdrawn"), mappings.lease(published):
                pass
        gpu.before_checksums = lambda: None
        with mappings.lease(publisher.publish(tensors, 2)) as lease:
            assert lease.checksums["norm"] == device_checksum(tensors["norm"].values)
        if not buffers:
            gpu.before_checksums = fail
            publisher.publish(tensors, 3)
            with pytest.raises(kind, match="IllegalAddress"):
                publisher.close()
    publisher.close()


@pytest.mark.parametrize("order", ["publish, no checksums", "publish, no checksums, fork"])
def test_a_trainer_killed_before_its_checksums_is_told(
    tmp_path: Path, start_trainer: Callable[..., Trainer], order: str
) -> None:
    """Even where a process that it forked, which has the lock too, lives on."""
    gpu = FakeGpu(tmp_path)
    trainer, mappings, told = start_trainer(), DeviceMappings(gpu), []
    published = trainer.publish(order)

    def read(published: PublishedDeviceWeights) -> None:
        with mappings.lease(published) as lease:
            try:
                told.append(lease.checksums)
            except PublisherDiedError as error:
                told.append(error)

    reader = later(lambda: read(published))
    trainer.kill()
    reader.join(20)
    assert not reader.is_alive()
    assert isinstance(told[0], PublisherDiedError)
    mappings.release()


def test_a_copy_on_the_host_waits_for_them_too(slow: SlowGpu) -> None:
    tensors, copies = tensors_on(slow), []
    with DevicePublisher(slow) as publisher:
        published = publisher.publish(tensors, 1)
        reader = later(lambda: copies.extend(copied_to_host(published, slow)))
        slow.go_on.set()
        reader.join()
    assert {spec.name for spec, _ in copies} == tensors.keys()


@pytest.mark.parametrize("where", ["before the thread has it", "when the thread has it"])
def test_what_an_interrupted_publication_left_holds_no_later_one(
    slow: SlowGpu, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Ctrl-C between two lines of it: the next one begins once the device is done with the first."""
    tensors, mappings = tensors_on(slow), DeviceMappings(slow)
    with DevicePublisher(slow) as publisher:
        pool = publisher._owed._thread
        submit = pool.submit

        def interrupted(*given: Any) -> None:
            if where == "when the thread has it":
                submit(*given)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pool, "submit", interrupted)
            publisher.publish(tensors, 1)
        published: list[PublishedDeviceWeights] = []

        def publish() -> None:
            published.append(publisher.publish(tensors, 2))

        if where == "when the thread has it":
            again = later(publish)
            slow.go_on.set()
            again.join()
        else:
            slow.go_on.set()
            publish()
        with mappings.lease(published[0]) as lease:
            assert lease.checksums["norm"] == device_checksum(tensors["norm"].values)
