"""Which steps of a GPU are recorded, launched again and forgotten: over ops that note what is asked of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_rig import HostDevice

from zerokl.kernels.gpu.weight_slots import WeightSlots
from zerokl.kernels.ops import StepInputs, neutral_sampling
from zerokl.rollout import gpu_steps
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.gpu_memory import OTHER_BYTES, kv_cache_bytes, step_bytes, weight_bytes
from zerokl.rollout.gpu_steps import FetchedStep, GpuSteps, make_gpu_steps
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import step_inputs, tiny_config, tiny_moe_config
from zerokl.rollout.step_outcome import PendingGpuStep


class FakeOps:
    """A step's kind is its numbers of sequences and tokens, unless it has very many."""

    def __init__(self) -> None:
        self.device = HostDevice()
        self.slots = WeightSlots(self.device.empty)
        self.done: Counter[str] = Counter()

    def begin_step(self, inputs: StepInputs, pool: Any) -> None:
        self.inputs = inputs

    def step_kind(self) -> tuple[int, int] | None:
        kind = len(self.inputs.context_lens), len(self.inputs.token_ids)
        return kind if kind[1] <= 60 else None

    def record(self, launches: Any) -> Any:
        self.done["recorded"] += 1
        return SimpleNamespace(launch=lambda: self.done.update(["graph"]))

    def draw(self, *args: Any) -> None:
        self.done["drawn"] += 1

    def fetch(self, rows: int, *, want_raw: bool) -> int:
        return rows

    def fetch_routing(self) -> str:
        return f"routing of {len(self.inputs.token_ids)} tokens"

    def record_routing(self, num_mixtures: int, top_k: int) -> None:
        self.done["mixtures"], self.done["top_k"] = num_mixtures, top_k

    def forget_step(self) -> None:
        self.done["forgotten"] += 1


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> FakeOps:
    monkeypatch.setattr(gpu_steps, "forward_begun", lambda ops, params, spec, inputs: None)
    return FakeOps()


def steps_over(ops: Any, **options: Any) -> GpuSteps:
    defaults: Any = {"records": True, "max_num_seqs": 40, "max_num_tokens": 64, "max_blocks": 20}
    return GpuSteps(ops, None, **(defaults | options))  # type: ignore[arg-type]


def step(sequences: int, tokens: int = 1) -> StepInputs:
    return step_inputs([np.ones(tokens, np.int32)] * sequences, [0] * sequences, [[i] for i in range(sequences)], 16)


PARAMS: Any = SimpleNamespace(lm_head=None)


def test_a_kind_is_recorded_when_it_comes_again(ops: FakeOps) -> None:
    steps = steps_over(ops)
    seen = []
    for _ in range(4):
        assert steps.begin(1, PARAMS, step(3), None) == (3, None)  # type: ignore[arg-type]
        seen.append(dict(ops.done))
    assert seen[0] == {"drawn": 1}
    assert seen[1] == {"drawn": 1, "recorded": 1, "graph": 1}
    assert seen[3] == {"drawn": 1, "recorded": 1, "graph": 3}


def test_routing_is_fetched_with_each_step_where_it_is_returned(ops: FakeOps) -> None:
    moe = ModelConfig.from_json(tiny_moe_config()).moe
    config = EngineConfig(model="folder", device="gpu", return_routing="all", max_model_len=64)
    steps = make_gpu_steps(config, ops, None, moe)  # type: ignore[arg-type]
    assert steps is not None and ops.done == {"mixtures": 2, "top_k": 3}
    assert steps.begin(1, PARAMS, step(3), None) == (3, "routing of 3 tokens")  # type: ignore[arg-type, comparison-overlap]
    none = replace(step(2, tokens=5), logit_rows=np.zeros(0, np.int32), sampling=neutral_sampling(0))
    assert steps.begin(1, PARAMS, none, None) == (None, "routing of 10 tokens")  # type: ignore[arg-type, comparison-overlap]


def test_a_steps_routing_comes_with_its_result_and_is_counted() -> None:
    moe = ModelConfig.from_json(tiny_moe_config()).moe
    assert moe is not None
    ids, weights = np.array([[[0, 1, 2], [7, 0, 3]]] * 2, np.int32), np.ones((2, 2, 3), np.float32)
    fetched: Any = FetchedStep(None, SimpleNamespace(result=lambda: (ids, weights)))  # type: ignore[arg-type]
    result = PendingGpuStep(fetched, step(2), moe).result()
    assert len(result.sampled.tokens) == 0 and result.routed is not None and result.expert_tokens is not None
    assert result.routed.experts is ids and result.routed.weights is weights
    assert result.expert_tokens.tolist() == [[2, 1, 1, 1, 0, 0, 0, 1]] * 2


def test_chunks_are_recorded_too(ops: FakeOps) -> None:
    steps = steps_over(ops)
    for _ in range(3):
        steps.begin(1, PARAMS, step(2, tokens=5), None)  # type: ignore[arg-type]
    assert ops.done == {"drawn": 1, "recorded": 1, "graph": 2}


def test_a_step_that_draws_is_not_one_that_does_not(ops: FakeOps) -> None:
    """A chunk that leaves its prompt unfinished has no rows, and the bucket of a few."""
    steps, drawing = steps_over(ops), step(2, tokens=5)
    silent = replace(drawing, logit_rows=np.zeros(0, np.int32), sampling=neutral_sampling(0))
    for inputs, done in (
        (silent, {}),
        (silent, {"recorded": 1, "graph": 1}),
        (drawing, {"recorded": 1, "graph": 1, "drawn": 1}),
        (drawing, {"recorded": 2, "graph": 2, "drawn": 1}),
        (silent, {"recorded": 2, "graph": 3, "drawn": 1}),
    ):
        steps.begin(1, PARAMS, inputs, None)  # type: ignore[arg-type]
        assert ops.done == done


def test_large_steps_and_engines_without_graphs_launch_every_kernel(ops: FakeOps) -> None:
    for steps, inputs in ((steps_over(ops), step(5, tokens=13)), (steps_over(ops, records=False), step(2))):
        for _ in range(3):
            steps.begin(1, PARAMS, inputs, None)  # type: ignore[arg-type]
    assert ops.done == {"drawn": 6}


def test_graphs_go_with_their_weights(ops: FakeOps) -> None:
    steps = steps_over(ops)
    for epoch in (1, 1, 2, 2):
        steps.begin(epoch, PARAMS, step(3), None)  # type: ignore[arg-type]
    assert ops.done["recorded"] == steps.num_graphs == 2, "the kernels are known by then: no step of its own"
    steps.keep({2})
    assert steps.num_graphs == 1
    steps.begin(2, PARAMS, step(3), None)  # type: ignore[arg-type]
    assert ops.done["recorded"] == 2
    steps.forget()
    assert steps.num_graphs == 0 and ops.done["forgotten"] == 1


def test_warming_up_records_every_bucket_and_writes_no_key(ops: FakeOps) -> None:
    steps, slots, shapes = steps_over(ops), [], set()
    begin = ops.begin_step

    def noted(inputs: StepInputs, pool: Any) -> None:
        slots.extend(inputs.slot_mapping.tolist())
        shapes.add((len(inputs.seq_starts) - 1, inputs.block_tables.shape[1]))
        begin(inputs, pool)

    ops.begin_step = noted  # type: ignore[method-assign]
    steps.warm_up(1, PARAMS, None)  # type: ignore[arg-type]
    assert set(slots) == {-1}
    assert {(size, width) for size in (16, 32, 40) for width in (8, 20)} <= shapes
    assert steps.num_graphs == 3


def test_memory_is_shared_out_between_weights_steps_and_keys() -> None:
    for content in (tiny_config(), tiny_moe_config()):
        model = ModelConfig.from_json(content)
        config = EngineConfig(model="folder", device="gpu", gpu_memory_fraction=0.5, weight_slots=3)
        total = 8 << 30
        room = kv_cache_bytes(config, model, "bfloat16", total - 1000, total)
        used = 3 * weight_bytes(model, "bfloat16") + step_bytes(model, "bfloat16", config)
        assert room + used + OTHER_BYTES + 1000 == total // 2
        assert weight_bytes(model, "bfloat16") < weight_bytes(model, "float32") < 2.01 * weight_bytes(model, "bfloat16")
        routed = step_bytes(model, "bfloat16", replace(config, return_routing="all"))
        assert (routed > step_bytes(model, "bfloat16", config)) == (model.moe is not None)
        with pytest.raises(ValueError, match=r"gpu_memory_fraction 0.5 .* must hold weight_slots = 3"):
            kv_cache_bytes(config, model, "bfloat16", OTHER_BYTES, total)


def test_what_a_gpu_cannot_is_refused() -> None:
    for options, message in (
        ({"expert_parallel_size": 2}, "expert_parallel_size must be 1 on device 'gpu', got 2"),
        ({"data_parallel_size": 2, "rank_roles": ("prefill", "decode")}, "rank_roles must all be 'mixed' on device"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(model="folder", device="gpu", **options)  # type: ignore[arg-type]
    for fraction in (0.0, 1.1):
        with pytest.raises(ValueError, match="gpu_memory_fraction"):
            EngineConfig(model="folder", gpu_memory_fraction=fraction)
