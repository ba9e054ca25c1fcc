"""Weights from a GPU's memory in a worker, over a GPU of ordinary bytes: packed as arrays are, or refused whole."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_publications import await_checksums
from fake_gpu import FakeGpu, FakeTensor, converted
from numpy.typing import NDArray
from tiny_engine import tiny_options

from zerokl.kernels.gpu.packed import PackedExperts, PackedGateUp, PackedLinear
from zerokl.kernels.gpu.weight_slots import WeightSlots
from zerokl.rollout import model_runner
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.device_staging import DeviceStaging
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.model_runner import ModelRunner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder_params import build_params
from zerokl.rollout.models.layout import EMBED, LM_HEAD, expected_tensors
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config
from zerokl.rollout.weight_source import DeviceWeights
from zerokl.weight_sync import (
    ChecksumError,
    DevicePublisher,
    ManifestError,
    PublishedDeviceWeights,
    PublisherDiedError,
    SegmentBusyError,
)
from zerokl.weight_sync.device_receiver import DeviceLease

Patterns = dict[str, NDArray[Any]]

MODELS = {
    "llama": tiny_config("LlamaForCausalLM"),
    "tied": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True),
    "normed": tiny_config("Qwen3ForCausalLM", head_dim=24, num_key_value_heads=1),
    "odd": tiny_config("Ernie4_5ForCausalLM", head_dim=20, intermediate_size=73),
    "mixture": tiny_moe_config(),
    "ernie mixture": tiny_moe_config("Ernie4_5_MoeForCausalLM"),
}


class FakeOps:
    """What staging asks of `GpuOps`."""

    def __init__(self, gpu: FakeGpu, dtype: str) -> None:
        self.dtype, self.slots = dtype, WeightSlots(gpu.empty)

    def tensor(self, values: Any) -> None: ...

    def kv_pool(self, *given: Any) -> None: ...


class HostPacker:
    """What `GpuOps` packs, as patterns: matrices in the table's type, vectors in float32."""

    def __init__(self, patterns: Patterns, dtypes: dict[str, str], dtype: str) -> None:
        self._patterns, self._dtypes, self._dtype = patterns, dtypes, dtype

    def _as(self, name: str, dtype: str) -> NDArray[Any]:
        return converted(self._patterns[name], self._dtypes[name], dtype)

    def tensor(self, name: str) -> NDArray[Any]:
        values = self._patterns[name]
        return self._as(name, self._dtype if values.ndim == 2 and len(values) > 1 else "float32")

    def pack_linear(self, weights: Sequence[Any], biases: Sequence[Any]) -> PackedLinear:
        if not isinstance(weights[0], str):
            return PackedLinear(weights[0], None)
        bias = None if biases[0] is None else np.concatenate([self._as(name, "float32") for name in biases])
        return PackedLinear(np.concatenate([self._as(name, self._dtype) for name in weights]), bias)

    def pack_gate_up(self, gate: str, up: str) -> PackedGateUp:
        rows = np.stack([self._as(gate, self._dtype), self._as(up, self._dtype)], axis=1)
        return PackedGateUp(rows.reshape(-1, rows.shape[-1]))

    def pack_experts(self, count: int, experts: Iterable[tuple[str, str, str]]) -> PackedExperts:
        parts = list(experts)
        gate_ups = [self.pack_gate_up(gate, up).weight for gate, up, _ in parts]
        return PackedExperts(np.stack(gate_ups), np.stack([self._as(down, self._dtype) for _, _, down in parts]))


def leaves(tree: Any) -> list[NDArray[Any]]:
    """All arrays of packed parameters, in order."""
    if isinstance(tree, (np.ndarray, FakeTensor)):
        return [tree if isinstance(tree, np.ndarray) else tree.values]
    if isinstance(tree, tuple):
        return [leaf for child in tree for leaf in leaves(child)]
    fields = getattr(tree, "__dataclass_fields__", {})
    return [leaf for name in fields for leaf in leaves(getattr(tree, name))]


class Rig:
    """A trainer's tensors, its publisher, and a runner with its staging, in one process."""

    def __init__(
        self, folder: Path, model: str, patch: pytest.MonkeyPatch, dtype: str = "bfloat16", buffers: int = 0
    ) -> None:
        self.gpu, self.dtype = FakeGpu(folder), dtype
        self.config = ModelConfig.from_json(MODELS[model])
        self.ops = FakeOps(self.gpu, dtype)
        patch.setattr(model_runner, "get_ops", lambda *given: self.ops)
        config = EngineConfig(model="unused", num_blocks=8, num_threads=1)
        self.runner = ModelRunner(config, self.config)
        self.staging = DeviceStaging(self.config, self.gpu)  # type: ignore[arg-type]
        self.publisher = DevicePublisher(self.gpu, buffers=buffers)
        self.tensors: dict[str, FakeTensor] = {}
        self.version = 0

    def publish(self, seed: int, dtype: str = "bfloat16") -> PublishedDeviceWeights:
        self.version += 1
        self.publisher.withdraw()
        for name, values in random_tensors(self.config, seed).items():
            bits = converted(values.view(np.uint32), "float32", dtype)
            if name not in self.tensors:
                self.tensors[name] = self.gpu.put(bits, dtype)
            self.tensors[name].values[...] = bits
        return self.publisher.publish(self.tensors, self.version)

    def stage(self, published: PublishedDeviceWeights) -> None:
        source = DeviceWeights(published=published)
        self.staging.stage(self.runner, source, published.version).commit(self.runner.commit)

    def expected(self) -> list[NDArray[Any]]:
        patterns = {name: tensor.values for name, tensor in self.tensors.items()}
        dtypes = {name: tensor.dtype.rpartition(".")[2] for name, tensor in self.tensors.items()}
        packer = HostPacker(patterns, dtypes, self.dtype)
        names: Any = {name: name for name in patterns}
        return leaves(build_params(packer, self.config, names, None, keep=packer.tensor))

    def check(self) -> None:
        """The live set is what the trainer has."""
        self.check_is(self.expected())

    def check_is(self, expected: list[NDArray[Any]]) -> None:
        live = self.live()
        assert len(live) == len(expected)
        for got, wanted in zip(live, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)

    def live(self) -> list[NDArray[Any]]:
        return leaves(self.runner.weight_sets["policy"].params)

    @property
    def place(self) -> int:
        return self.runner.weight_sets["policy"].place


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[Rig] = []

    def make(model: str = "llama", **options: Any) -> Rig:
        made.append(Rig(tmp_path, model, monkeypatch, **options))
        return made[-1]

    yield make
    for one in made:
        one.publisher.close()


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("model", MODELS)
def test_a_set_is_packed_as_arrays_are(rig: Any, model: str, dtypes: tuple[str, str]) -> None:
    published, dtype = dtypes
    one = rig(model, dtype=dtype)
    one.stage(one.publish(1, published))
    one.check()
    assert one.runner.weight_sets["policy"].version == 1


def test_sets_take_turns_in_two_places(rig: Any) -> None:
    one = rig()
    places, pointers, allocated = [], [], []
    for seed in range(5):
        one.stage(one.publish(seed))
        one.check()
        places.append(one.place)
        pointers.append([leaf.ctypes.data for leaf in one.live()])
        allocated.append(one.gpu.done["allocate"])
    assert places[0] == places[2] == places[4] != places[1] == places[3]
    assert pointers[0] == pointers[2] and pointers[1] == pointers[3]
    assert allocated[1] == allocated[4], "two places suffice"
    one.runner.pin("reference")
    pinned = [leaf.copy() for leaf in one.live()]
    for seed in (6, 7, 8):
        one.stage(one.publish(seed))
        one.check()
    for leaf, before in zip(leaves(one.runner.weight_sets["reference"].params), pinned, strict=True):
        np.testing.assert_array_equal(leaf, before)
    assert len(one.ops.slots.numbers) == 3
    one.runner.drop("reference")
    one.ops.slots.release_spare()
    assert one.ops.slots.numbers == {one.place}


def test_what_stays_is_made_once_and_nothing_else_is_kept(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the first half: with tensors that move each time all is made each time."""
    one, made, build = rig(), [], model_runner.build_params
    monkeypatch.setattr(model_runner, "build_params", lambda *given, **more: made.append(1) or build(*given, **more))
    for seed in range(6):
        one.stage(one.publish(seed))
        one.check()
    assert len(made) == 2, "once for each place"
    assert one.gpu.done["plan"] == 1 and one.gpu.done["export"] == len(one.tensors)
    for seed in range(6, 9):
        one.tensors = {name: one.gpu.put(tensor.values, "bfloat16") for name, tensor in one.tensors.items()}
        one.stage(one.publish(seed))
        one.check()
    assert len(made) == 5 and one.gpu.done["plan"] == 4


@pytest.mark.parametrize("buffers", [0, 2])
def test_one_tensor_that_moves_is_read_where_it_is(rig: Any, buffers: int) -> None:
    one = rig("tied", buffers=buffers)
    for seed, name in enumerate([None, None, None, EMBED, None, "model.norm.weight", EMBED, None]):
        if name is not None:
            old = one.tensors[name]
            one.tensors[name] = one.gpu.put(old.values, "bfloat16")
        one.stage(one.publish(seed))
        one.check()
        if name is not None:
            old.values[...] = 0  # of no use to anybody
            one.check()
    assert len(one.ops.slots.numbers) == 2


def test_another_type_at_the_same_place(rig: Any) -> None:
    """A float32 trainer, one tensor of which is then bfloat16, and the way back."""
    one, name, seen = rig(), "model.layers.0.self_attn.k_proj.weight", set()
    one.publish(0, "float32")
    for seed, dtype in enumerate(["float32", "float32", "float32", "bfloat16", "bfloat16", "float32"]):
        one.publisher.withdraw()
        one.tensors[name].dtype = f"paddle.{dtype}"
        bits = random_tensors(one.config, seed)[name].view(np.uint32)
        one.tensors[name].values[...] = converted(bits, "float32", dtype)
        one.stage(one.publisher.publish(one.tensors, seed))
        one.check()
        seen.add(b"".join(leaf.tobytes() for leaf in one.live()))
    assert len(seen) == 6


def flip(rig: Rig, name: str, bit: int = 3) -> None:
    flat = rig.tensors[name].values.reshape(-1)
    flat[len(flat) // 2] ^= 1 << bit


@pytest.mark.parametrize("where", ["trainer's memory", "own memory"])
def test_a_flipped_bit_is_found_and_the_old_set_stays(rig: Any, where: str) -> None:
    """Nothing but the checksum tells: the control is the same publication without the flip, which is taken."""
    one = rig("mixture")
    one.stage(one.publish(1))
    expected, place = [leaf.copy() for leaf in one.live()], one.place
    published = one.publish(2)
    await_checksums(one.gpu, published)
    name = next(name for name in one.tensors if name.endswith("up_proj.weight"))
    if where == "trainer's memory":
        flip(one, name)
    else:
        placed: list[Any] = []
        place_all = one.gpu.place

        def keep(plan: Any, **more: Any) -> Any:
            placed[:] = plan.placements
            return place_all(plan, **more)

        def damage() -> None:
            target = FakeTensor(placed[-1].target, (placed[-1].columns,), "bfloat16")
            target.values[-1] ^= 1

        one.gpu.place, one.gpu.after_copy = keep, damage
    with pytest.raises(ChecksumError, match=name if where == "trainer's memory" else "tensor"):
        one.stage(published)
    one.check_is(expected)
    assert one.place == place and len(one.ops.slots.numbers) == 2
    one.gpu.after_copy = lambda: None
    if where == "trainer's memory":
        flip(one, name)
    one.stage(published)
    one.check()
    assert len(one.ops.slots.numbers) == 2


def test_that_it_is_nearly_staged_is_told_once_in_each_update(rig: Any) -> None:
    """Beside the copy: nothing of it has been checked then."""
    one, told = rig(), []
    for seed in range(3):
        published = one.publish(seed)
        source = DeviceWeights(published=published, nearly_staged=lambda: told.append("nearly"))
        one.gpu.after_copy = lambda: told.append("copied")
        session = one.staging.stage(one.runner, source, published.version)
        assert told == ["nearly", "copied"] * (seed + 1)
        session.commit(one.runner.commit)
        one.check()


def test_what_is_not_finite_is_refused(rig: Any) -> None:
    one = rig()
    one.stage(one.publish(1))
    expected = [leaf.copy() for leaf in one.live()]
    for name, bits in (("model.norm.weight", 0x7F80), ("model.layers.0.self_attn.k_proj.weight", 0x7FC1)):
        one.publish(2)
        one.publisher.withdraw()
        one.tensors[name].values.reshape(-1)[-1] = bits
        published = one.publisher.publish(one.tensors, one.version)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{name}.*holds a NaN or an infinity") as caught:
                one.stage(published)
            assert caught.value.__traceback__ is not None
            one.check_is(expected)
    assert len(one.ops.slots.numbers) == 2, "errors that are kept hold no place"


def test_a_trainer_that_ends_meanwhile_leaves_the_old_set(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig()
    one.stage(one.publish(1))
    expected = [leaf.copy() for leaf in one.live()]
    published = one.publish(2)

    def gone(lease: DeviceLease) -> None:
        raise PublisherDiedError("gone")

    with monkeypatch.context() as patch:
        one.gpu.after_copy = lambda: patch.setattr(DeviceLease, "check_owner", gone)
        with pytest.raises(PublisherDiedError):
            one.stage(published)
    one.gpu.after_copy = lambda: None
    one.check_is(expected)
    one.publisher.withdraw()
    with pytest.raises(SegmentBusyError):
        one.stage(published)
    one.check_is(expected)
    one.stage(one.publish(3))
    one.check()


def test_what_came_of_a_trainer_that_has_ended_is_not_judged(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory may be gone while its checksums are there: that it ended is what is told, not that bits differ."""
    one = rig()
    published = one.publish(1)
    await_checksums(one.gpu, published)

    def gone(lease: DeviceLease) -> None:
        raise PublisherDiedError("gone")

    flip(one, "model.norm.weight")
    monkeypatch.setattr(DeviceLease, "check_owner", gone)
    with pytest.raises(PublisherDiedError):
        one.stage(published)


def test_tensors_are_copied_while_their_checksums_are_computed(rig: Any) -> None:
    one, copied, go_on = rig(), threading.Event(), threading.Event()
    one.gpu.before_checksums = lambda: go_on.wait(20)
    published = one.publish(1)
    one.gpu.after_copy = copied.set
    staging = threading.Thread(target=one.stage, args=(published,))
    staging.start()
    assert copied.wait(10), "it waits for checksums before it copies"
    assert staging.is_alive()
    go_on.set()
    staging.join()
    one.check()


def test_names_shapes_and_a_tied_head_are_checked(rig: Any) -> None:
    one = rig("tied")
    one.publish(1)
    given = dict(one.tensors)

    def refused(tensors: dict[str, FakeTensor], text: str, error: type[Exception] = ManifestError) -> None:
        one.publisher.withdraw()
        with pytest.raises(error, match=text):
            one.stage(one.publisher.publish(tensors, 1))
        assert not one.runner.weight_sets

    refused({name: tensor for name, tensor in given.items() if name != EMBED}, f"missing: .*{EMBED}")
    refused(given | {"more": given[EMBED]}, "extra: 'more'")
    refused(given | {"model.norm.weight": given[EMBED]}, "misshapen")
    other = one.gpu.put(given[EMBED].values ^ 1, "bfloat16")
    refused(given | {LM_HEAD: other}, "differs from", ValueError)
    one.publisher.withdraw()
    one.stage(one.publisher.publish(given | {LM_HEAD: given[EMBED]}, 1))
    one.check()
    assert set(one.tensors) == set(expected_tensors(one.config))


def test_an_engine_on_the_cpu_refuses_them(tiny_model: Path, tmp_path: Path) -> None:
    gpu = FakeGpu(tmp_path)
    with DevicePublisher(gpu) as publisher, RolloutEngine(tiny_options(tiny_model)) as engine:
        published = publisher.publish({"a": gpu.put(np.zeros((2, 2), np.uint16), "bfloat16")}, 1)
        with pytest.raises(ValueError, match="the engine's device must be 'gpu', got 'cpu'"):
            engine.update_weights(published)
        assert engine.get_weight_version() == 0
