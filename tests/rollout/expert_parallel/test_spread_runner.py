"""Model runners over several ranks: the bits of one, with a part of the experts each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ranks_rig import each
from spread_rig import BLOCK, FAMILIES, alone, assert_same, moe_config, order, prompt, run, runners

from zerokl.kernels.communicator import CommunicatorError
from zerokl.rollout.expert_parallel import rearrange as rearranging
from zerokl.rollout.expert_parallel.rank_place import RankPlace
from zerokl.rollout.held_sets import LIVE
from zerokl.rollout.model_runner import ModelRunner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config
from zerokl.rollout.step_order import BlockMove, StepOrder

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
