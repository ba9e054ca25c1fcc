"""Copies of many tensors on the device: every byte comes to its place, and checksums are those of the definition.

Under TRITON_INTERPRET=1 the kernels run on the CPU, over the host's memory: they are of integers alone, bit for bit.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from fake_gpu import converted
from host_calls import HostCalls
from numpy.typing import NDArray

rig.require_device()

from zerokl.kernels.device_tensors import DeviceTensor, DeviceTensors, Placement  # noqa: E402
from zerokl.kernels.dispatch import device_packer, weight_packer  # noqa: E402
from zerokl.kernels.gpu import shared_memory as shared_memory_module  # noqa: E402
from zerokl.kernels.gpu.copy_plan import CopyPlan  # noqa: E402
from zerokl.kernels.gpu.ops import GpuOps  # noqa: E402
from zerokl.kernels.gpu.shared_memory import SharedGpuMemory, shared_gpu_memory  # noqa: E402
from zerokl.rollout.models.config import ModelConfig  # noqa: E402
from zerokl.rollout.models.decoder_params import build_params  # noqa: E402
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config  # noqa: E402
from zerokl.weight_sync.device_checksums import device_checksum  # noqa: E402

pytestmark = pytest.mark.gpu

# rows, columns, type, type there, stride there, bytes before the source
CASES: list[tuple[int, int, str, str, int, int]] = [
    (5, 64, "bfloat16", "bfloat16", 128, 0),
    (70, 1000, "bfloat16", "bfloat16", 1000, 0),
    (70, 896, "bfloat16", "bfloat16", 1792, 0),
    (7, 33, "bfloat16", "bfloat16", 70, 0),
    (1, 128, "bfloat16", "float32", 128, 0),
    (9, 40, "bfloat16", "float32", 41, 2),
    (1, 17, "float32", "float32", 17, 0),
    (3, 8, "float32", "float32", 8, 8),
    (40, 64, "float32", "bfloat16", 128, 0),
    (9, 31, "float32", "bfloat16", 31, 0),
    (60, 256, "float32", "float32", 512, 0),
    (0, 8, "bfloat16", "bfloat16", 8, 0),
]
if not rig.INTERPRETED:
    CASES += [(30_000, 1024, "bfloat16", "bfloat16", 1024, 0), (9000, 2048, "bfloat16", "bfloat16", 4096, 0)]
    CASES += [(3000, 4096, "float32", "bfloat16", 4096, 0), (4000, 1023, "bfloat16", "bfloat16", 1023, 0)]
TYPES: dict[str, Any] = {"bfloat16": np.uint16, "float32": np.uint32}


def shared_memory() -> SharedGpuMemory:
    if rig.INTERPRETED:
        calls: Any = HostCalls()
        return SharedGpuMemory(calls, lambda stream: nullcontext(), list)
    return shared_gpu_memory()


class Bench:
    """Memory, and the CASES' tensors in it."""

    def __init__(self) -> None:
        self.memory = shared_memory()
        self.calls = self.memory._calls
        self.sources, self.placements = [], []
        for seed, (rows, columns, dtype, target_dtype, stride, before) in enumerate(CASES):
            bits = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32).view(np.uint32)
            source = (bits >> 16).astype(np.uint16) if dtype == "bfloat16" else bits
            address = self.calls.allocate(source.nbytes + before + 16) + before
            self.write(address, source)
            size = rows * stride * TYPES[target_dtype](0).itemsize
            target = self.calls.allocate(size + 16)
            self.calls.clear(target, size + 16)
            self.sources.append(source)
            self.placements.append(Placement(address, rows, columns, dtype, target, target_dtype, stride))
        self.plan = CopyPlan(self.placements)

    def place(self, bucket_bytes: int = 64 << 20) -> tuple[list[int], list[int]]:
        checksums, broken = self.memory.place(self.plan, bucket_bytes)
        return checksums.tolist(), broken.tolist()

    def write(self, address: int, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values)
        self.calls.upload(address, values.ctypes.data, values.nbytes)

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        values = np.empty(shape, TYPES[dtype])
        self.calls.download(values.ctypes.data, address, values.nbytes)
        self.calls.synchronize()
        return values


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("bucket_bytes", [1 << 17, 64 << 20])
def test_all_come_to_their_places_at_once(bench: Bench, bucket_bytes: int) -> None:
    checksums, broken = bench.place(bucket_bytes)
    assert checksums == [device_checksum(source) for source in bench.sources]
    assert not any(broken)
    for source, (_, rows, columns, dtype, target, target_dtype, stride) in zip(
        bench.sources, bench.placements, strict=True
    ):
        there = bench.read(target, (rows, stride), target_dtype)
        np.testing.assert_array_equal(there[:, :columns], converted(source, dtype, target_dtype))
        assert not there[:, columns:].any()


def test_checksums_alone(bench: Bench) -> None:
    stored = [placement[:4] for placement in bench.placements]
    plan = bench.memory.plan(stored)
    for _ in range(2):
        found = bench.memory.begin_checksums(plan)()
        assert found.tolist() == [device_checksum(source) for source in bench.sources]
    assert bench.memory.begin_checksums(bench.memory.plan([]))().tolist() == []


class NotedCalls:
    """Calls, and what was asked of them in turn: launches, the rest by name."""

    def __init__(self, calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.asked = calls, []
        launch = shared_memory_module.launch

        def noted(*given: Any, **more: Any) -> None:
            self.asked.append("launch")
            launch(*given, **more)

        monkeypatch.setattr(shared_memory_module, "launch", noted)

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self.calls, name)


@pytest.fixture
def noted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> NotedCalls:
    bench.place()  # its tables are there, and memory for results
    noted = NotedCalls(bench.calls, monkeypatch)
    monkeypatch.setattr(bench.memory, "_calls", noted)
    return noted


def test_checksums_wait_once_behind_all_that_was_launched(bench: Bench, noted: NotedCalls) -> None:
    """One launch for each way to read; who asks for them goes on before."""
    plan = bench.memory.plan([placement[:4] for placement in bench.placements])
    bench.memory.begin_checksums(plan)()
    noted.asked.clear()
    result = bench.memory.begin_checksums(plan)
    begun = [word for word in noted.asked if word != "stream"]
    assert begun == ["clear", *["launch"] * len(plan.groups), "download"]
    result()
    assert [word for word in noted.asked if word != "stream"] == [*begun, "synchronize"]


def test_checksums_that_are_owed_stay_what_they_are(bench: Bench, noted: NotedCalls) -> None:
    """Whatever is launched before they are taken, another publisher's of the same memory say; or if they never are."""
    plans = [bench.memory.plan([one[:4] for one in some]) for some in (bench.placements, bench.placements[:3])]
    expected = [device_checksum(source) for source in bench.sources]
    bench.memory.begin_checksums(plans[0])  # Ctrl-C: nobody takes them
    first, second = (bench.memory.begin_checksums(plan) for plan in plans)
    assert bench.place()[0] == expected
    assert second().tolist() == expected[:3] and first().tolist() == expected
    noted.asked.clear()
    for _ in range(3):
        assert bench.memory.begin_checksums(plans[0])().tolist() == expected
    assert "allocate" not in noted.asked, "memory for results is used again"


def test_a_copy_says_when_only_its_last_bytes_are_awaited(
    bench: Bench, noted: NotedCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its last launch, and before the wait for them all; the more of it that counts as the last, the earlier.
    Where all of it does, at once.
    """

    def asked_with(last_bytes: int) -> list[str]:
        monkeypatch.setattr(shared_memory_module, "_LAST_BYTES", last_bytes)
        noted.asked.clear()
        checksums, _ = bench.memory.place(bench.plan, 1 << 16, lambda: noted.asked.append("nearly done"))
        assert checksums.tolist() == [device_checksum(source) for source in bench.sources]
        assert noted.asked.count("synchronize") == noted.asked.count("nearly done") == 1
        return [word for word in noted.asked if word not in ("stream", "new_event")]

    places = []
    for last_bytes in (0, 1 << 17, bench.plan.num_bytes - 1):
        asked = asked_with(last_bytes)
        assert asked[-4:] == ["download", "await_event", "nearly done", "synchronize"]
        assert asked.count("await_event") == 1
        places.append(asked.index("record") if "record" in asked else len(asked))
    assert places[2] < places[1] < places[0], places
    asked = asked_with(bench.plan.num_bytes)
    assert asked[0] == "nearly done" and asked[-2:] == ["download", "synchronize"] and "await_event" not in asked


def test_who_hears_of_it_may_fail_and_the_copy_is_awaited(bench: Bench, noted: NotedCalls) -> None:
    class OffError(Exception): ...

    def fail() -> None:
        raise OffError

    noted.asked.clear()
    with pytest.raises(OffError):
        bench.memory.place(bench.plan, 64 << 20, fail)
    assert noted.asked[-1] == "synchronize"


def test_tables_of_a_plan_stay_until_others_need_their_memory() -> None:
    memory = shared_memory()
    calls, sources, plans = memory._calls, [], []
    for number in range(11):
        source = np.random.default_rng(number).integers(0, 1 << 16, (1 + number % 3, 24)).astype(np.uint16)
        address = calls.allocate(source.nbytes)
        calls.upload(address, source.ctypes.data, source.nbytes)
        sources.append(source)
        stored = [(address, *source.shape, "bfloat16")] * (1 + number % 4)
        plans.append(memory.plan(stored))
    loaded = []
    upload = calls.upload

    def counted(*given: Any) -> None:
        loaded.append(given[0])
        upload(*given)

    calls.upload = counted
    for number in (0, 1, 0, 1, *range(11), *range(11), 10, 9, 3):
        found = memory.begin_checksums(plans[number])().tolist()
        assert found == [device_checksum(sources[number])] * len(plans[number].placements)
    assert len(loaded) == 2 + 9 + 11, "those of the last eight are there"
    assert len(set(loaded)) <= 2 * 8


@pytest.mark.parametrize("failing", ["allocate", "allocate_pinned"])
def test_memory_for_results_that_cannot_be_had_leaves_none_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    memory, live = shared_memory(), list[int]()
    calls = memory._calls
    for taking, giving in (("allocate", "free"), ("allocate_pinned", "free_pinned")):
        take, give = getattr(calls, taking), getattr(calls, giving)

        def noted(size: int, take: Any = take) -> int:
            live.append(take(size))
            return live[-1]

        def gone(address: int, give: Any = give) -> None:
            live.remove(address)
            give(address)

        monkeypatch.setattr(calls, taking, noted)
        monkeypatch.setattr(calls, giving, gone)
    memory._spare.append(memory._results_of(100))
    with monkeypatch.context() as full, pytest.raises(RuntimeError, match="out of memory"):
        full.setattr(calls, failing, raise_out_of_memory)
        memory._results_of(10_000)
    assert live == []
    results = memory._results_of(50)
    assert sorted(live) == sorted([results.address, results.host])


def raise_out_of_memory(size: int) -> int:
    raise RuntimeError(f"out of memory: {size}")


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_not_finite_is_found_and_a_flipped_bit_changes_one_checksum(bench: Bench, case: int) -> None:
    source, placement = bench.sources[case], bench.placements[case]
    if not source.size:
        return
    expected, _ = bench.place()
    last, infinity = source.reshape(-1)[-1], {"bfloat16": 0x7F80, "float32": 0x7F800000}[placement.dtype]
    for value, is_broken in ((last ^ 1, False), (infinity, True), (infinity | 1, True), (infinity - 1, False)):
        source.reshape(-1)[-1] = value
        bench.write(placement.source, source)
        checksums, broken = bench.place()
        assert [bool(count) for count in broken] == [is_broken and number == case for number in range(len(CASES))]
        assert checksums[case] == device_checksum(source) != expected[case]
        assert [c for n, c in enumerate(checksums) if n != case] == [c for n, c in enumerate(expected) if n != case]
    source.reshape(-1)[-1] = last
    bench.write(placement.source, source)


MODELS = {
    "tied": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True, vocab_size=200),
    "mixture": tiny_moe_config(vocab_size=200),
}


def leaves(tree: Any) -> list[Any]:
    """All tensors of packed parameters, in order."""
    if hasattr(tree, "data_ptr"):
        return [tree]
    if isinstance(tree, tuple):
        return [leaf for child in tree for leaf in leaves(child)]
    return [leaf for name in getattr(tree, "__dataclass_fields__", {}) for leaf in leaves(getattr(tree, name))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_a_set_is_packed_as_from_arrays(model: str, dtype: str) -> None:
    config, memory = ModelConfig.from_json(MODELS[model]), shared_memory()
    ops: Any = GpuOps(rig.HostDevice() if rig.INTERPRETED else None, rig.FLOAT)  # type: ignore[arg-type]
    arrays, sources = random_tensors(config, 1), {}
    for name, values in arrays.items():
        stored = rig.to_bfloat16(values) if dtype == "bfloat16" else values
        arrays[name] = rig.from_bfloat16(stored) if dtype == "bfloat16" else values
        address = memory.allocate(stored.nbytes)
        memory._calls.upload(address, stored.ctypes.data, stored.nbytes)
        sources[name] = DeviceTensor(name, values.shape, dtype, address)
    packer: Any
    packer, operands = weight_packer(ops, arrays)
    expected = build_params(packer, config, operands, None, keep=packer.tensor)
    packer = device_packer(ops, partial(memory.place, bucket_bytes=1 << 20))
    tensors = DeviceTensors(sources)
    made, _ = packer.fill(tensors, lambda: build_params(packer, config, tensors, None, keep=packer.tensor))
    assert len(leaves(made)) == len(leaves(expected)) > 10
    for one, other in zip(leaves(made), leaves(expected), strict=True):
        assert list(one.shape) == list(other.shape)
        np.testing.assert_array_equal(ops.device.get(one), ops.device.get(other))
