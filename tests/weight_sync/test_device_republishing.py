"""The same tensors published again and again: what was made of them is used again while nothing but values changed.

Each test of a change has as its control the publications before it, which are taken from what was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeGpu, FakeTensor, elements

from zerokl.weight_sync import DeviceHandleError, DevicePublisher, ManifestError, PublishedDeviceWeights
from zerokl.weight_sync import device_receiver as receiver
from zerokl.weight_sync.device_checksums import device_checksum
from zerokl.weight_sync.device_receiver import DeviceMappings

Tensors = dict[str, FakeTensor]
Change = Callable[[FakeGpu, Tensors], Tensors]


@pytest.fixture
def gpu(tmp_path: Path) -> FakeGpu:
    return FakeGpu(tmp_path)


@pytest.fixture(params=["own memory", "mapped"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whether a receiver has the publisher in its own process, or maps its memory as that of another."""
    if request.param == "mapped":
        monkeypatch.setattr(receiver, "current_owner", lambda: None)
    return request.param


def tensors_on(gpu: FakeGpu) -> Tensors:
    shapes = {"embed": ((6, 16), "bfloat16"), "norm": ((8,), "float32"), "bias": ((8,), "float32")}
    types = {"bfloat16": np.uint16, "float32": np.uint32}
    return {name: gpu.put(np.zeros(shape, types[dtype]), dtype) for name, (shape, dtype) in shapes.items()}


def check(mappings: DeviceMappings, published: PublishedDeviceWeights, tensors: Tensors) -> receiver.MappedTensors:
    """What is leased is what the tensors are now, by name, shape, type and value."""
    with mappings.lease(published) as lease:
        specs = lease.mapped.layout.tensors
        assert [spec.name for spec in specs] == list(lease.checksums) == list(tensors)
        for spec, tensor in zip(specs, tensors.values(), strict=True):
            assert (spec.shape, f"paddle.{spec.dtype}") == (tuple(tensor.shape), tensor.dtype)
            values = elements(lease.mapped.addresses[spec.name], spec.shape, spec.dtype)
            np.testing.assert_array_equal(values, tensor.values)
            assert lease.checksums[spec.name] == device_checksum(values)
        return lease.mapped


class Writer:
    """Publishes other values each time."""

    def __init__(self, publisher: DevicePublisher) -> None:
        self._publisher = publisher
        self._version = 0

    def publish(self, tensors: Tensors) -> PublishedDeviceWeights:
        self._version += 1
        self._publisher.withdraw()
        for number, tensor in enumerate(tensors.values()):
            values = tensor.values
            values[...] = np.arange(values.size).reshape(values.shape) + 100 * self._version + number
        return PublishedDeviceWeights.from_bytes(self._publisher.publish(tensors, self._version).to_bytes())


def moved(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    return tensors | {"embed": gpu.put(tensors["embed"].values, "bfloat16")}


def given_other_memory(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    tensors["norm"]._address = gpu.put(tensors["norm"].values, "float32").data_ptr()
    return tensors


def replaced(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    gpu.replace(tensors["embed"])
    return tensors


def reshaped(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    tensors["embed"].shape[:] = [16, 6]
    return tensors


def of_another_type(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    tensors["embed"].shape, tensors["embed"].dtype = [6, 8], "paddle.float32"
    return tensors


def of_another_type_alone(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    tensors["norm"].dtype = "paddle.bfloat16"
    return tensors


def renamed(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    return {"other" if name == "norm" else name: tensor for name, tensor in tensors.items()}


def reordered(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    return dict(reversed(tensors.items()))


def exchanged(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    return tensors | {"norm": tensors["bias"], "bias": tensors["norm"]}


def fewer(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "bias"}


def more(gpu: FakeGpu, tensors: Tensors) -> Tensors:
    return tensors | {"more": gpu.put(np.zeros((40, 40), np.uint16), "bfloat16")}


CHANGES: list[Change] = [
    moved, given_other_memory, replaced, reshaped, of_another_type, of_another_type_alone, renamed, reordered,
    exchanged, fewer, more,
]  # fmt: skip
"""A change that is not seen leaves a name, a shape, a type or values of before."""


@pytest.mark.parametrize("buffers", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_seen(gpu: FakeGpu, where: str, change: Change, buffers: int) -> None:
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    with DevicePublisher(gpu, buffers=buffers) as publisher:
        writer = Writer(publisher)
        before = [check(mappings, writer.publish(tensors), tensors) for _ in range(4)]
        assert before[0] is before[2] and before[1] is before[3] and len(set(before)) == max(1, buffers)
        tensors = change(gpu, tensors)
        after = [check(mappings, writer.publish(tensors), tensors) for _ in range(4)]
        assert after[0] is after[2] and after[1] is after[3]
    mappings.release()


@pytest.mark.parametrize("buffers", [0, 2])
def test_only_values_are_new_of_the_same_set(gpu: FakeGpu, where: str, buffers: int) -> None:
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    with DevicePublisher(gpu, buffers=buffers) as publisher:
        writer, done = Writer(publisher), []
        for _ in range(6):
            published = writer.publish(tensors)
            check(mappings, published, tensors)
            done.append({what: gpu.done[what] for what in ("export", "plan", "open", "allocate")})
        assert done[1 if buffers else 0] == done[-1]
        assert len({published.layout, writer.publish(tensors).layout}) == 1
    mappings.release()


def test_a_tensor_that_is_contiguous_no_more_is_refused(gpu: FakeGpu) -> None:
    class Strided(FakeTensor):
        contiguous = True

        def is_contiguous(self) -> bool:
            return self.contiguous

    plain = gpu.put(np.zeros((4, 4), np.uint16), "bfloat16")
    tensors: Tensors = {"a": Strided(plain.data_ptr(), (4, 4), "bfloat16")}
    with DevicePublisher(gpu) as publisher:
        for version in range(3):
            publisher.publish(tensors, version)
        Strided.contiguous = False
        with pytest.raises(ManifestError, match="'a' is not contiguous"):
            publisher.publish(tensors, 3)


def test_memory_that_is_gone_is_refused_by_name(gpu: FakeGpu, where: str) -> None:
    """By the publisher, and by a receiver in its process before that."""
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    with DevicePublisher(gpu) as publisher:
        writer = Writer(publisher)
        for _ in range(2):
            published = writer.publish(tensors)
            check(mappings, published, tensors)
        gpu.free(gpu.allocation_of(tensors["norm"].data_ptr())[0])
        if where == "own memory":
            with pytest.raises(DeviceHandleError, match="memory is not there"), mappings.lease(published):
                pass
        with pytest.raises(DeviceHandleError, match="'norm' is not in a GPU's memory"):
            publisher.publish(tensors, 9)
    mappings.release()


def test_what_was_unmapped_is_mapped_again(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publication that cannot be opened takes mappings away that the one after it needs."""
    monkeypatch.setattr(receiver, "current_owner", lambda: None)
    tensors, mappings = tensors_on(gpu), DeviceMappings(gpu)
    with DevicePublisher(gpu) as publisher:
        writer = Writer(publisher)
        check(mappings, writer.publish(tensors), tensors)
        other = writer.publish(moved(gpu, tensors))
        with monkeypatch.context() as patch, pytest.raises(DeviceHandleError, match="cannot be opened"):
            patch.setattr(gpu, "open_memory", lambda handle: gpu.allocation_of(0))
            with mappings.lease(other):
                pass
        published = writer.publish(tensors)
        with mappings.lease(published) as lease:
            for address in lease.mapped.addresses.values():
                gpu.allocation_of(address)  # or its pages are gone
        check(mappings, published, tensors)
    mappings.release()
