"""Routing replay: what a rollout says of its routing is what the trainer's routers choose, and can be held on to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactness_harness import Job, Outcome, differences, generate, run, run_variant
from routing_rig import packed_logprobs, per_rollout, trainer_routing
from tiny_engine import VOCAB_SIZE, gated_engine, in_thread, update_after, write_byte_tokenizer

from zerokl.rollout import routing_store
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_moe_config
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.request import Request
from zerokl.rollout.routing import replay_arrays
from zerokl.rollout.sampling_params import SamplingParams

FAMILIES = ("Qwen3MoeForCausalLM", "Ernie4_5_MoeForCausalLM")


def tensors(folder: Path, seed: int) -> dict[str, Any]:
    return random_tensors(ModelConfig.from_json(folder), seed, gain=2.0)


@pytest.fixture(scope="module", params=FAMILIES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("replay")
    content = tiny_moe_config(request.param, vocab_size=VOCAB_SIZE, hidden_size=64, eos_token_id=256)
    save_pretrained(folder, content, random_tensors(ModelConfig.from_json(content), gain=2.0))
    write_byte_tokenizer(folder)
    random = np.random.default_rng(3)
    common = random.integers(0, VOCAB_SIZE, 20)
    lengths = (1, 16, 33, 9, 14)
    prompts = [random.integers(0, VOCAB_SIZE, length).astype(np.int32) for length in lengths]
    prompts[3:] = [np.concatenate([common, prompt]).astype(np.int32) for prompt in prompts[3:]]
    return Job(folder=folder, prompts=prompts, n=2, max_tokens=10, return_routing="all")


@pytest.fixture(scope="module")
def plain(job: Job) -> Outcome:
    return run(job)


@pytest.fixture
def model(job: Job) -> Any:
    from zerokl.integrations.policy_model import PolicyModel

    return PolicyModel.from_pretrained(job.folder)


def stir_routers(model: Any) -> None:
    """Routers that choose otherwise for many tokens; every other weight stays."""
    random = np.random.default_rng(9)
    for name, parameter in model.named_tensors().items():
        if name.endswith("mlp.gate.weight"):
            noise = 0.1 * random.standard_normal(tuple(parameter.shape))
            parameter.set_value((parameter.numpy() + noise).astype(np.float32))


def assert_is_routing(rollout: Rollout, experts: Any, weights: Any, some: slice = slice(None)) -> None:
    """`experts` and `weights` [positions, M, k] count from the rollout's first recorded position."""
    assert rollout.routing is not None
    np.testing.assert_array_equal(rollout.routing.experts[some], experts[some])
    np.testing.assert_array_equal(rollout.routing.weights[some], weights[some])


def test_the_routing_is_the_trainers_own_to_the_bit(job: Job, plain: Outcome, model: Any) -> None:
    routed = trainer_routing(model, plain.rollouts)
    parts = [per_rollout(array, plain.rollouts) for array in (routed.experts, routed.weights)]
    for rollout, experts, weights in zip(plain.rollouts, *parts, strict=True):
        assert rollout.routing is not None and rollout.routing.start == 0
        assert rollout.routing.experts.dtype == np.int16 and rollout.routing.weights.dtype == np.float32
        assert rollout.routing.experts.shape == experts.shape
        assert_is_routing(rollout, experts, weights)


def test_output_routing_begins_at_the_row_of_the_first_token(job: Job, plain: Outcome, model: Any) -> None:
    rollouts = run(job, return_routing="output").rollouts
    for rollout, whole in zip(rollouts, plain.rollouts, strict=True):
        start = len(rollout.prompt_token_ids) - 1
        assert rollout.routing is not None and whole.routing is not None and rollout.routing.start == start
        assert len(rollout.routing.experts) == len(rollout.token_ids)
        assert_is_routing(rollout, whole.routing.experts[start:], whole.routing.weights[start:])
    experts, _ = replay_arrays(rollouts)
    expected = np.concatenate([rollout.policy_logprobs for rollout in rollouts])
    np.testing.assert_array_equal(packed_logprobs(model, rollouts, routing=experts), expected)


def test_replay_gives_the_rollouts_logprobs_with_either_weights(plain: Outcome, model: Any) -> None:
    experts, weights = replay_arrays(plain.rollouts)
    ends = np.cumsum([len(one.prompt_token_ids) + len(one.token_ids) for one in plain.rollouts])
    assert (experts == -1).all(axis=(0, 2)).nonzero()[0].tolist() == (ends - 1).tolist()
    expected = np.concatenate([rollout.policy_logprobs for rollout in plain.rollouts])
    for replay in ({"routing": experts}, {"routing": experts, "routing_weights": weights}):
        np.testing.assert_array_equal(packed_logprobs(model, plain.rollouts, **replay), expected)


def test_replay_holds_the_experts_where_the_trainers_routers_choose_others(plain: Outcome, model: Any) -> None:
    experts, weights = replay_arrays(plain.rollouts)
    given = experts[..., 0] >= 0
    stir_routers(model)
    free = trainer_routing(model, plain.rollouts)
    assert (free.experts != experts)[given].mean() > 0.02, "the stirred routers choose alike"
    held = trainer_routing(model, plain.rollouts, routing=experts)
    np.testing.assert_array_equal(held.experts[given], experts[given])
    assert (held.weights[given] != weights[given]).any(), "the weights are the trainer's routers' own"
    fixed = trainer_routing(model, plain.rollouts, routing=experts, routing_weights=weights)
    np.testing.assert_array_equal(fixed.weights[given], weights[given])
    expected = np.concatenate([rollout.policy_logprobs for rollout in plain.rollouts])
    # Nothing of the routers is left, so not even their weights matter.
    fixed_logprobs = packed_logprobs(model, plain.rollouts, routing=experts, routing_weights=weights)
    np.testing.assert_array_equal(fixed_logprobs, expected)
    assert (packed_logprobs(model, plain.rollouts, routing=experts) != expected).mean() > 0.9
    assert (packed_logprobs(model, plain.rollouts) != expected).mean() > 0.9


def test_rows_that_are_not_given_are_chosen_among_given_ones(plain: Outcome, model: Any) -> None:
    experts, weights = replay_arrays(plain.rollouts)
    dropped = np.random.default_rng(5).random(experts.shape[:2]) < 0.5
    holes = np.where(dropped[..., None], -1, experts)
    expected = np.concatenate([rollout.policy_logprobs for rollout in plain.rollouts])
    for replay in ({"routing": holes}, {"routing": holes, "routing_weights": weights}):
        np.testing.assert_array_equal(packed_logprobs(model, plain.rollouts, **replay), expected)
    kept = holes[..., 0] >= 0
    stir_routers(model)
    mixed = trainer_routing(model, plain.rollouts, routing=holes, routing_weights=weights)
    np.testing.assert_array_equal(mixed.experts[kept], experts[kept])
    np.testing.assert_array_equal(mixed.weights[kept], weights[kept])
    assert (mixed.experts != experts)[~kept].any()
    assert (mixed.experts >= 0).all() and (holes >= -1).all(), "what was given is left as it was"


def test_given_weights_leave_the_routers_without_a_gradient(plain: Outcome, model: Any) -> None:
    from zerokl.integrations.batch import pack_rollouts

    batch = pack_rollouts(plain.rollouts[:4])
    experts, weights = replay_arrays(plain.rollouts[:4])
    named = model.named_tensors()
    routers = [named[name] for name in named if name.endswith("mlp.gate.weight")]
    for replay, reached in ({"routing": experts}, True), ({"routing": experts, "routing_weights": weights}, False):
        model.clear_gradients()
        model.logprobs(batch.token_ids, batch.cu_seqlens, rows=batch.rows, **replay)[0].sum().backward()
        assert all((router.grad.numpy() != 0).any() == reached for router in routers)
        assert any((named[name].grad.numpy() != 0).any() for name in named if ".experts." in name)


# Batches, chunks, blocks, preemption and the worker process: tests/exactness/test_moe_models.py compares routing too.
def test_a_warm_cache_gives_the_whole_prompts_routing_though_its_blocks_are_reused_later(job: Job) -> None:
    cold = run(job, enable_prefix_caching=False).rollouts
    with RolloutEngine(job.options(block_size=8, num_blocks=40)) as engine:
        generate(engine, job, [{}])
        warm = generate(engine, job, [{}])
        assert sum(rollout.num_cached_tokens for rollout in warm) > 64
        for seed in range(4):  # every block is written anew
            engine.generate([np.random.default_rng(seed).integers(0, VOCAB_SIZE, 200)], SamplingParams(max_tokens=4))
    assert differences(warm, cold)["routing"] == 0


class ForgetfulStore(routing_store.RoutingStore):
    """Knows only what the request's own forwards computed, as an engine does that records nothing beside its KV."""

    def keep(self, request: Request) -> None:
        cached = request.block_table[: request.num_cached_tokens // self._block_size]
        self._experts[cached] = 0
        super().keep(request)


class LateStore(routing_store.RoutingStore):
    """Reads a request's blocks a step after it has let go of them."""

    left: tuple[Request, Any, int] | None = None

    def keep(self, request: Request) -> None:
        pending, self.left = self.left, (request, request.block_table.copy(), request.num_computed_tokens)
        super().keep(request)
        if pending is not None and pending[0].routing is not None:
            gone, table, computed = pending
            positions = np.arange(computed)
            rows = self._experts[table[positions // self._block_size], positions % self._block_size]
            gone.routing.experts[: len(rows)] = rows


@pytest.mark.parametrize(("store", "variant"), [(ForgetfulStore, "cache warm"), (LateStore, "preempted")])
def test_a_store_that_misses_shared_or_reused_blocks_is_found_out(
    job: Job, plain: Outcome, monkeypatch: pytest.MonkeyPatch, store: Any, variant: str
) -> None:
    long = replace(job, prompts=[np.tile(prompt, 5)[:70] for prompt in job.prompts], max_tokens=24)
    right = run_variant(long, variant).rollouts
    assert differences(right, run(long).rollouts)["routing"] == 0
    monkeypatch.setattr(routing_store, "RoutingStore", store)
    assert differences(run_variant(long, variant).rollouts, right)["routing"] > 0


def test_a_request_that_begins_anew_has_the_new_versions_routing_alone(job: Job, model: Any) -> None:
    from zerokl.integrations.policy_model import PolicyModel

    newer = PolicyModel(model.config, tensors(job.folder, 1))
    engine, worker = gated_engine(job.folder, return_routing="all", num_blocks=64)
    with engine:
        params = SamplingParams(n=2, max_tokens=6, seed=4, ignore_eos=True)
        call = in_thread(lambda: engine.generate([job.prompts[4]], params))
        update = update_after(engine, worker, 5, dict(newer.named_arrays()), mode="keep", max_staleness=0)
        worker.open()
        update()
        rollouts = call()
    assert all(rollout.num_restarts == 1 for rollout in rollouts)
    routed = trainer_routing(newer, rollouts)
    parts = [per_rollout(array, rollouts) for array in (routed.experts, routed.weights)]
    for rollout, experts, weights in zip(rollouts, *parts, strict=True):
        assert_is_routing(rollout, experts, weights)


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_a_result_keeps_the_routing_of_the_version_that_gave_it(job: Job, model: Any, kv: str) -> None:
    from zerokl.integrations.policy_model import PolicyModel

    newer = PolicyModel(model.config, tensors(job.folder, 1))
    engine, worker = gated_engine(job.folder, return_routing="all", num_blocks=64)
    with engine:
        params = SamplingParams(n=2, max_tokens=12, seed=4, ignore_eos=True)
        call = in_thread(lambda: engine.generate([job.prompts[4]], params))
        update = update_after(engine, worker, 6, dict(newer.named_arrays()), mode="keep", kv=kv)
        worker.open()
        update()
        rollouts = call()
    old, new = (trainer_routing(one, rollouts) for one in (model, newer))
    parts = [per_rollout(array, rollouts) for array in (old.experts, old.weights, new.experts, new.weights)]
    for rollout, old_experts, old_weights, new_experts, new_weights in zip(rollouts, *parts, strict=True):
        (_, cut, _), (_, end, _) = rollout.version_spans
        first = len(rollout.prompt_token_ids) - 1
        assert rollout.routing is not None and len(rollout.routing.experts) == first + end
        assert_is_routing(rollout, old_experts, old_weights, slice(first, first + cut))
        if kv == "recompute":
            assert_is_routing(rollout, new_experts, new_weights, slice(0, first))
            assert_is_routing(rollout, new_experts, new_weights, slice(first + cut, None))
        else:
            assert_is_routing(rollout, old_experts, old_weights, slice(0, first))
            assert (rollout.routing.experts[first + cut :] != old_experts[first + cut :]).any()
        assert (old_experts[first : first + cut] != new_experts[first : first + cut]).any()
