"""Model runners over several ranks: the bits of one, with a part of the experts each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks_rig import communicators, each

from zerokl.kernels.communicator import CommunicatorError
from zerokl.kernels.ops import SampleResult
from zerokl.kernels.row_stream import ArrayRows
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.expert_parallel import rearrange as rearranging
from zerokl.rollout.expert_parallel.rank_place import RankPlace
from zerokl.rollout.model_runner import LIVE, ModelRunner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config, tiny_moe_config
from zerokl.rollout.step_order import BlockMove, StepOrder, StepResult
from zerokl.rollout.weight_source import SharedWeights
from zerokl.rollout.worker import LocalWorker
from zerokl.weight_sync import WeightPublisher
from zerokl.weight_sync.errors import ChecksumError, ParentMismatchError

FAMILIES = ("Qwen3MoeForCausalLM", "Ernie4_5_MoeForCausalLM")
BLOCK = 16


def moe_config(family: str = FAMILIES[0]) -> ModelConfig:
    return ModelConfig.from_json(tiny_moe_config(family))


@contextmanager
def runners(
    config: ModelConfig, size: int, experts: int, tensors: Mapping[str, Any] | None, redundant: int = 0
) -> Iterator[list[ModelRunner]]:
    """One per rank, with committed weights."""
    options = EngineConfig(model="unused", num_blocks=8, block_size=BLOCK, num_threads=1)
    options = options.resolve(max_position_embeddings=64, kv_bytes_per_token=1)
    with communicators(size) as ends:
        made = [
            ModelRunner(options, config, RankPlace(rank, size, experts, ends[rank], redundant)) for rank in range(size)
        ]
        if tensors is not None:
            for runner in made:
                runner.stage(tensors)
                runner.commit()
        yield made


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, length).astype(np.int32)


def order(seed: int, length: int, step: int = 0, policy: str = LIVE, block: int = 2) -> StepOrder:
    """A prompt in one block; length 0 is the dummy entry."""
    if not length:
        return StepOrder(inputs=step_inputs([], [], [], BLOCK, step=step, policy=policy))
    return StepOrder(inputs=step_inputs([prompt(seed, length)], [0], [[block]], BLOCK, step=step, policy=policy))


def run(made: list[ModelRunner], orders: list[StepOrder]) -> list[StepResult]:
    return each(len(made), lambda rank: made[rank].execute(orders[rank]))


def alone(config: ModelConfig, tensors: Mapping[str, Any], orders: list[StepOrder]) -> list[StepResult]:
    """Each order on the one rank of a runner of its own."""
    with runners(config, 1, 1, tensors) as (runner,):
        return [runner.execute(one) for one in orders]


def assert_same(left: SampleResult, right: SampleResult) -> None:
    for name in ("tokens", "logprobs", "policy_logprobs", "entropy"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


LENGTHS = ((12,), (12, 5), (12, 0), (3, 0, 16, 0), (1, 16, 2, 7))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("redundant", [0, 4])
def test_ranks_give_the_bits_of_one(family: str, redundant: int) -> None:
    config, tensors = moe_config(family), random_tensors(moe_config(family), 1)
    assert config.moe is not None
    orders = {lengths: [order(seed, n, step=4) for seed, n in enumerate(lengths)] for lengths in LENGTHS}
    for lengths, some in orders.items():
        expected = alone(config, tensors, some)
        for experts in {1, 2, len(lengths)} if len(lengths) > 1 else {1}:
            extra = redundant if experts > 1 else 0
            with runners(config, len(lengths), experts, tensors, extra) as made:
                for got, want, length in zip(run(made, some), expected, lengths, strict=True):
                    assert_same(got.sampled, want.sampled)
                    assert got.expert_tokens is not None and want.expert_tokens is not None
                    np.testing.assert_array_equal(got.expert_tokens, want.expert_tokens)
                    assert got.expert_tokens.shape == (len(config.moe.layers), config.moe.num_experts)
                    assert (got.expert_tokens.sum(axis=1) == length * config.moe.top_k).all()


class OnceReadable(dict[str, ArrayRows]):
    """Tensors as they arrive from a publication: streams that have an end."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: rows.shape for name, rows in self.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_a_rank_holds_twice_is_read_once(family: str) -> None:
    config, tensors = moe_config(family), random_tensors(moe_config(family), 1)
    assert config.moe is not None
    orders = [order(0, 12), order(1, 5)]
    expected = alone(config, tensors, orders)
    count = config.moe.num_experts
    twice = np.sort([*range(count), *range(4)])  # replicas side by side, on one rank
    placement = np.repeat(twice.reshape(1, 2, -1), len(config.moe.layers), axis=0).astype(np.int32)
    with runners(config, 2, 2, random_tensors(config, 2), 4) as made:
        each(2, lambda rank: made[rank].rearrange_experts(placement))

        def restage(rank: int) -> None:
            made[rank].stage(OnceReadable({name: ArrayRows(array, name) for name, array in tensors.items()}))
            made[rank].commit()

        each(2, restage)
        for got, want in zip(run(made, orders), expected, strict=True):
            assert_same(got.sampled, want.sampled)


def nbytes(tree: Any) -> int:
    """Of all arrays in a tree of dataclasses and tuples."""
    if isinstance(tree, tuple):
        return sum(map(nbytes, tree))
    if is_dataclass(tree):
        return sum(nbytes(getattr(tree, field.name)) for field in fields(tree))
    return tree.nbytes if isinstance(tree, np.ndarray) else 0


class ReadNames(dict[str, Any]):
    """Tensors that note which of them are looked at, their shapes aside."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_and_holds_its_own_experts_alone(family: str) -> None:
    config = moe_config(family)
    tensors, moe = random_tensors(config, 1), config.moe
    assert moe is not None
    with runners(config, 1, 1, tensors) as (runner,):
        params = runner.weight_sets[LIVE].params
        whole = nbytes(params)
        experts = sum(nbytes(params.layers[layer].moe.experts) for layer in moe.layers)
    maps = len(moe.layers) * moe.num_experts * 8
    with runners(config, 4, 4, None) as made:
        for rank, runner in enumerate(made):
            source = ReadNames(tensors)
            runner.stage(source)
            runner.commit()
            assert source.read == set(runner.held_tensors())
            own = {n for n in tensors if ".experts." not in n or int(n.split(".")[5]) // 2 == rank}
            assert source.read == own
            assert nbytes(runner.weight_sets[LIVE].params) == whole - experts * 3 // 4 + maps
            live = runner.live_tensors()
            assert set(live) == own
            for name in own:
                np.testing.assert_array_equal(live[name], tensors[name])
        missing = dict(tensors)
        del missing["model.layers.1.mlp.experts.7.up_proj.weight"]
        with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.experts.7.up_proj.weight"):
            made[0].stage(missing)  # not rank 0's, and yet it must be there


def test_a_delta_of_experts_on_every_rank() -> None:
    config = moe_config()
    old, new = random_tensors(config, 1), random_tensors(config, 2)
    delta = {name: new[name] for name in old if ".experts.1." in name or "q_proj" in name}
    orders = [order(0, 12), order(1, 7)]
    with runners(config, 2, 2, old) as made:
        for runner in made:
            runner.stage(delta, 1, delta=True)
            runner.commit()
        for got, want in zip(run(made, orders), alone(config, {**old, **delta}, orders), strict=True):
            assert_same(got.sampled, want.sampled)


def test_published_weights_are_verified_by_the_ranks_that_read_them(tmp_path: Path) -> None:
    """A complete set: each rank its own part. A delta: all that changed, and the checksum of the whole result."""
    content = tiny_moe_config(FAMILIES[0])
    config = ModelConfig.from_json(content)
    tensors, new = random_tensors(config, 1), random_tensors(config, 2)
    save_pretrained(tmp_path, content, tensors)
    options = EngineConfig(model=str(tmp_path), num_blocks=8, max_model_len=64, num_threads=1)
    theirs = "model.layers.1.mlp.experts.7.up_proj.weight"
    with communicators(2) as ends, WeightPublisher() as publisher:
        workers = [LocalWorker(options, RankPlace(rank, 2, 2, ends[rank])) for rank in range(2)]
        whole = publisher.publish(tensors, 1)
        damaged = replace(
            whole,
            manifest=replace(
                whole.manifest,
                tensors=tuple(
                    replace(spec, checksum=spec.checksum ^ 1) if spec.name == theirs else spec
                    for spec in whole.manifest.tensors
                ),
            ),
        )
        workers[0].stage_weights(SharedWeights(published=damaged), 1)
        with pytest.raises(ChecksumError, match=theirs):
            workers[1].stage_weights(SharedWeights(published=damaged), 1)
        for worker in workers:
            worker.stage_weights(SharedWeights(published=whole), 1)
            worker.commit_weights()
        delta = {name: new[name] for name in (theirs, "model.norm.weight")}
        changed = publisher.publish_delta(delta, 2)
        for worker in workers:
            worker.stage_weights(SharedWeights(published=changed), 2)
            worker.commit_weights()
        orders = [order(0, 12), order(1, 9)]
        got = each(2, lambda rank: workers[rank].execute(orders[rank]))
        for one, want in zip(got, alone(config, {**tensors, **delta}, orders), strict=True):
            assert_same(one.sampled, want.sampled)
        part = {theirs: np.array(delta[theirs])}
        part[theirs].reshape(-1)[:3] = 1.0
        spanned = publisher.publish_delta(part, 3, spans={theirs: (0, 3)})
        false = [replace(spec, whole=spec.whole ^ 1) for spec in spanned.manifest.tensors]
        broken = replace(spanned, manifest=replace(spanned.manifest, tensors=tuple(false)))
        with pytest.raises(ParentMismatchError, match="gives a set of checksum"):
            workers[0].stage_weights(SharedWeights(published=broken), 3)
        for worker in workers:
            worker.stage_weights(SharedWeights(published=spanned), 3)
            worker.commit_weights()
        got = each(2, lambda rank: workers[rank].execute(orders[rank]))
        for one, want in zip(got, alone(config, {**tensors, **delta, **part}, orders), strict=True):
            assert_same(one.sampled, want.sampled)


def shuffled(runner: ModelRunner, seed: int) -> np.ndarray:
    """Another placement, every expert somewhere else."""
    placement = runner.placement
    assert placement is not None
    random = np.random.default_rng(seed)
    return np.array([random.permutation(slots.reshape(-1)).reshape(slots.shape) for slots in placement.experts])


@pytest.mark.parametrize("size", [2, 4])
def test_live_experts_move_and_no_bit_changes(size: int) -> None:
    """Policy, a pinned set that shares some mixtures with it on some ranks, and a staged one."""
    config = moe_config(FAMILIES[1])
    first, second, third = (random_tensors(config, seed) for seed in (1, 2, 3))
    # Experts of rank 0 change: the other ranks go on sharing theirs with the pinned set.
    delta = {name: second[name] for name in first if ".experts.0." in name}
    with runners(config, size, size, first, redundant=size) as made:
        for runner in made:
            runner.pin("reference")
            runner.stage(delta, 1, delta=True)
            runner.commit()
            runner.stage(third, 2)
        before = {}
        for policy in (LIVE, "reference"):
            orders = [order(rank, 12, policy=policy) for rank in range(size)]
            tensors = first if policy == "reference" else {**first, **delta}
            before[policy] = alone(config, tensors, [order(rank, 12) for rank in range(size)])
        for seed in range(3):
            target = shuffled(made[0], seed)
            each(size, lambda rank, target=target: made[rank].rearrange_experts(target))
            for policy, expected in before.items():
                orders = [order(rank, 12, step=seed, policy=policy) for rank in range(size)]
                for got, want in zip(run(made, orders), expected, strict=True):
                    assert_same(got.sampled, want.sampled)
            for runner in made:  # each rank holds what the placement says
                live = runner.live_tensors()
                for name in live:
                    np.testing.assert_array_equal(live[name], {**first, **delta}[name])
        for runner in made:
            runner.commit()
        orders = [order(rank, 12) for rank in range(size)]
        for got, want in zip(run(made, orders), alone(config, third, orders), strict=True):
            assert_same(got.sampled, want.sampled)
        for runner in made:  # a later set is packed for the new placement
            runner.stage(second)
            runner.commit()
        for got, want in zip(run(made, orders), alone(config, second, orders), strict=True):
            assert_same(got.sampled, want.sampled)


def test_pinned_weights_stay_common_when_they_move() -> None:
    config = moe_config()
    with runners(config, 2, 2, random_tensors(config, 1)) as made:
        for runner in made:
            runner.pin("reference")
        target = shuffled(made[0], 1)
        each(2, lambda rank: made[rank].rearrange_experts(target))
        for runner in made:
            sets = runner.weight_sets
            for layer in config.moe.layers if config.moe else ():
                experts = [sets[name].params.layers[layer].moe for name in (LIVE, "reference")]
                assert experts[0] is not None and experts[1] is not None
                assert experts[0].experts is experts[1].experts


def test_a_wrong_copy_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one move of the last mixture fetches another expert."""
    config = moe_config()
    tensors, right = random_tensors(config, 1), rearranging.moves
    orders = [order(0, 12), order(1, 12)]

    def wrong(old: Any, new: Any) -> Any:
        found = right(old, new)
        one = found[-1][0]
        found[-1][0] = one._replace(source_slot=(one.source_slot + 1) % old.experts.shape[2])
        return found

    with runners(config, 2, 2, tensors) as made:
        monkeypatch.setattr(rearranging, "moves", wrong)
        target = shuffled(made[0], 0)
        each(2, lambda rank: made[rank].rearrange_experts(target))
        pairs = list(zip(run(made, orders), alone(config, tensors, orders), strict=True))
    assert any((got.sampled.policy_logprobs != want.sampled.policy_logprobs).any() for got, want in pairs)


def test_ranks_that_want_different_placements_find_out() -> None:
    config = moe_config()
    with runners(config, 2, 2, random_tensors(config, 1)) as made:
        targets = [shuffled(made[0], seed) for seed in range(2)]

        def work(rank: int) -> None:
            with pytest.raises(CommunicatorError, match="disagree"):
                made[rank].rearrange_experts(targets[rank])

        each(2, work)


def test_refusals() -> None:
    config = moe_config()
    dense = ModelConfig.from_json(tiny_config())
    with pytest.raises(ValueError, match="expert_parallel_size must be 1 for a model without experts, got 2"):  # noqa: SIM117
        with runners(dense, 2, 2, None):
            pass
    with runners(config, 2, 1, random_tensors(config, 1)) as made, pytest.raises(ValueError, match="got 1"):
        made[0].rearrange_experts(np.zeros((2, 1, 8), np.int32))
    with runners(config, 2, 2, random_tensors(config, 1)) as made:
        with pytest.raises(ValueError, match=r"placement must be of shape \[2, 2, 4\]"):
            made[0].rearrange_experts(np.zeros((2, 1, 8), np.int32))
        made[0].sleep(["weights"], 1)
        with pytest.raises(ValueError, match="asleep"):
            made[0].rearrange_experts(shuffled(made[0], 0))
    for numbers, message in (((2, 2, 1), "rank"), ((0, 4, 3), "expert_parallel_size"), ((0, 2, 1), "communicator")):
        with pytest.raises(ValueError, match=message):
            RankPlace(*numbers)
    with pytest.raises(ValueError, match="num_redundant_experts must be 0"):
        RankPlace(num_redundant_experts=2)


def test_blocks_move_to_another_rank_before_the_step() -> None:
    """A prompt's first part is computed on rank 0, its last token on rank 1 over the blocks that came along."""
    config = moe_config()
    tensors, tokens = random_tensors(config, 1), prompt(5, 33)
    start = step_inputs([tokens[:32]], [0], [[3, 6]], BLOCK, step=0)
    (expected,) = alone(config, tensors, [StepOrder(inputs=step_inputs([tokens], [0], [[1, 2, 3]], BLOCK))])
    blocks = [np.array([3, 6], np.int32), np.array([7, 1], np.int32)]
    with runners(config, 3, 1, tensors) as made:
        run(made, [StepOrder(inputs=start), order(1, 0), order(1, 0)])
        last = step_inputs([tokens[32:]], [32], [[7, 1, 4]], BLOCK, step=1)
        orders = [
            StepOrder(inputs=order(0, 0, 1).inputs, sends=(BlockMove(peer=1, blocks=blocks[0]),), has_moves=True),
            StepOrder(inputs=last, receives=(BlockMove(peer=0, blocks=blocks[1]),), has_moves=True),
            StepOrder(inputs=order(0, 0, 1).inputs, has_moves=True),
        ]
        got = run(made, orders)[1].sampled
        np.testing.assert_array_equal(got.policy_logprobs, expected.sampled.policy_logprobs[32:])
        pools: list[Any] = [runner._pool for runner in made]
        for half in ("keys", "values"):
            sent, came = getattr(pools[0], half)[:, blocks[0]], getattr(pools[1], half)[:, blocks[1]]
            assert sent.any()
            np.testing.assert_array_equal(came, sent)
        orders = [replace(one, inputs=replace(one.inputs, step=2), receives=()) for one in orders]

        def work(rank: int) -> None:
            if rank != 1:
                made[rank].execute(orders[rank])
                return
            with pytest.raises(CommunicatorError, match="rank 0 sent 2 KV blocks where 0 were to come"):
                made[rank].execute(orders[rank])

        each(3, work)
