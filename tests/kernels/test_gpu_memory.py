"""Scratch memory and copies of the GPU's op table, on a device of NumPy arrays that runs behind its host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_rig import HostArray, HostDevice

from zerokl.kernels.gpu.routing_record import RoutingRecord
from zerokl.kernels.gpu.scratch import Scratch
from zerokl.kernels.gpu.transfers import Downloads, Uploads


@pytest.fixture
def scratch() -> Scratch:
    return Scratch(HostDevice().empty, chunk_entries=1000)


def overlap(a: HostArray, b: HostArray) -> bool:
    return np.shares_memory(a.values, b.values)


def test_what_is_referred_to_is_nobody_elses(scratch: Scratch) -> None:
    scratch.begin("step")
    held = [scratch.take((3, 50), "float32") for _ in range(20)]
    held += [scratch.take((7,), "float32") for _ in range(5)]
    assert all(not overlap(a, b) for i, a in enumerate(held) for b in held[:i])
    assert all(tensor.shape == (3, 50) for tensor in held[:20])


def test_what_is_dropped_is_used_again(scratch: Scratch) -> None:
    scratch.begin("step")
    first, kept = scratch.take((3, 50), "float32"), scratch.take((3, 50), "float32")
    address = first.data_ptr()
    del first
    again = scratch.take((3, 50), "float32")
    assert again.data_ptr() == address and not overlap(again, kept)


def test_a_step_of_a_kind_has_the_addresses_of_the_last_one(scratch: Scratch) -> None:
    def step(rows: int) -> list[int]:
        scratch.begin(rows)
        x = scratch.take((rows, 8), "float32")
        addresses = [x.data_ptr()]
        for _ in range(4):
            x = scratch.take((rows, 8), "float32")
            addresses.append(x.data_ptr())
        return addresses

    small, large = step(4), step(100)
    assert step(4) == small and step(100) == large
    assert len(set(small)) == 2, "one is read while the next is written"


def test_all_kinds_share_their_memory(scratch: Scratch) -> None:
    addresses = set()
    for rows in (1, 2, 3):
        scratch.begin(rows)
        addresses.add(scratch.take((rows, 8), "float32").data_ptr())
    assert len(addresses) == 1


def test_more_than_a_chunk_is_allocated_apart(scratch: Scratch) -> None:
    scratch.begin("step")
    large, small = scratch.take((5000,), "float32"), scratch.take((10,), "float32")
    assert large.values.size == 5000 and not overlap(large, small)


class LateDevice(HostDevice):
    """Copies happen when an event after them is waited for."""

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.eager = eager
        self.queue: list[Any] = []
        self.num_pinned = 0

    def pinned(self, size: int) -> Any:
        self.num_pinned += 1
        return super().pinned(size)

    def upload(self, values: Any, tensor: HostArray) -> None:
        self.queue.append(lambda: HostDevice.upload(self, values, tensor))

    def download(self, tensor: HostArray, values: Any) -> None:
        self.queue.append(lambda: HostDevice.download(self, tensor, values))

    def mark(self) -> Any:
        return len(self.queue)

    def wait(self, event: Any) -> None:
        for index in range(event):
            self.queue[index]()
            self.queue[index] = lambda: None


def test_copies_carry_what_was_there_when_they_were_asked_for() -> None:
    device = LateDevice()
    uploads, downloads = Uploads(device, most=2), Downloads(device)
    tensor = device.empty([4], "int32")
    source, fetches = np.zeros(4, np.int32), []
    for number in range(6):
        source[:] = number
        uploads.send(source, tensor)
        source[:] = -1  # the caller's again
        fetches.append(downloads.fetch(tensor, 3))
    assert [fetch.result().tolist() for fetch in fetches] == [[number] * 3 for number in range(6)]
    again = downloads.fetch(tensor, 4).result()
    again[:] = 9  # the caller's to keep
    assert downloads.fetch(tensor, 4).result().tolist() == [5] * 4
    assert device.num_pinned <= 3 + 6


def test_recorded_routing_is_fetched_without_padding_before_the_next_step_writes(scratch: Scratch) -> None:
    device = LateDevice()
    record, downloads = RoutingRecord(2, 3), Downloads(device)

    def take(*shape: int, dtype: str) -> HostArray:
        return scratch.take(shape, dtype)

    def step(number: int) -> Any:
        scratch.begin(4)
        record.begin(4, take)
        for mixture in range(2):
            ids, weights = record.of(mixture)
            assert ids.shape == weights.shape == (4, 3)
            ids.values[:] = 10 * number + mixture
            weights.values[:] = number + mixture / 4
        return record.fetch(downloads, num_tokens=3)

    fetched = step(1)
    device.wait(len(device.queue))  # the stream's order: copied before the next step runs
    later = step(2)
    for number, routing in ((1, fetched), (2, later)):
        ids, weights = routing.result()
        assert ids.shape == weights.shape == (2, 3, 3) and weights.dtype == np.float32
        assert [ids[m].tolist() == [[10 * number + m] * 3] * 3 for m in range(2)] == [True, True]
        assert [weights[m].tolist() == [[number + m / 4] * 3] * 3 for m in range(2)] == [True, True]


def test_routing_is_recorded_at_one_address_whatever_a_step_holds_of_the_last_one(scratch: Scratch) -> None:
    """A recorded step of a kind writes where it was recorded; metadata of the same size may be held over."""
    record = RoutingRecord(2, 3)
    addresses, held = set(), None
    for _ in range(4):
        scratch.begin(4)
        record.begin(4, lambda *shape, dtype: scratch.take(shape, dtype))
        addresses.add((record.of(0)[0].data_ptr(), record.of(0)[1].data_ptr()))
        held = [scratch.take((24,), dtype) for dtype in ("int32", "float32")]
    assert len(addresses) == 1 and held
