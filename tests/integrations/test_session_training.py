"""Conversations in training: one sequence each, learnt where the policy spoke, with a mismatch of exactly zero."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from zerokl.integrations.batch import pack_rollouts
from zerokl.integrations.grpo_trainer import GRPOConfig, GRPOTrainer
from zerokl.integrations.policy_model import PolicyModel
from zerokl.integrations.ppo_trainer import PPOConfig, PPOTrainer
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.kl import mismatch_kl
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.session import Session
from zerokl.weight_sync.publisher import WeightPublisher

KINDS: dict[str, Any] = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}
PARAMS = SamplingParams(n=4, max_tokens=5, temperature=0.8)
TURN = dataclasses.replace(PARAMS, n=1)


@pytest.fixture(scope="module", params=["dense", "none", "output", "all"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutEngine]:
    """A dense model; a mixture of experts whose routing is returned in no, part or whole."""
    form = tiny_config if request.param == "dense" else tiny_moe_config
    content = form(vocab_size=32, hidden_size=32, head_dim=8, eos_token_id=None)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(folder, content, random_tensors(ModelConfig.from_json(content), 3))
    routing = "none" if request.param == "dense" else request.param
    with RolloutEngine(EngineConfig(model=str(folder), block_size=8, num_blocks=200, return_routing=routing)) as engine:
        yield engine


def conversations(engine: RolloutEngine, prompts: Any, count: int) -> list[Session]:
    """`count` forks of a session per prompt, three turns each, all turns of a round together."""

    async def speak(session: Session) -> Session:
        for turn in range(3):
            rollout = await session.agenerate(TURN)
            if turn < 2:
                session.append(rollout.token_ids[: turn + 1] ^ 1)
        return session

    async def main() -> list[Session]:
        opened = [engine.open_session(prompt) for prompt in prompts]
        return await asyncio.gather(*(speak(session.fork()) for session in opened for _ in range(count)))

    return asyncio.run(main())


def test_the_trainers_forward_of_a_conversation_has_its_bits(engine: RolloutEngine) -> None:
    policy = PolicyModel.from_pretrained(engine.config.model)
    sessions = conversations(engine, [[1, 2, 3], [4, 5]], 2)
    rollouts = [session.to_rollout() for session in sessions]
    batch = pack_rollouts(rollouts)
    assert len(batch.rows) == 4 * 15 and (batch.routing is None) == (engine.config.return_routing == "none")
    logprobs, _ = policy.logprobs(
        batch.token_ids, batch.cu_seqlens, PARAMS.temperature, rows=batch.rows, routing=batch.routing
    )
    np.testing.assert_array_equal(batch.targets, np.concatenate([s.tokens[s.loss_mask] for s in sessions]))
    expected = np.concatenate([session.policy_logprobs[session.loss_mask] for session in sessions])
    assert mismatch_kl(logprobs.numpy(), expected).differing_logprobs == 0
    # the negative controls: another answer of the tool, and rows that ignore the mask
    changed = batch.token_ids.copy()
    changed[3 + 5] ^= 2
    other, _ = policy.logprobs(changed, batch.cu_seqlens, PARAMS.temperature, rows=batch.rows, routing=batch.routing)
    assert mismatch_kl(other.numpy(), expected).differing_logprobs > 0
    with pytest.raises(ValueError, match="finite"):
        unmasked = [dataclasses.replace(rollout, loss_mask=None) for rollout in rollouts]
        wrong = pack_rollouts(unmasked).rollout_logprobs
        mismatch_kl(wrong, wrong)


def test_routing_of_turns_is_joined_as_it_was(engine: RolloutEngine) -> None:
    if engine.config.return_routing == "none":
        pytest.skip("no routing is returned")
    session = engine.open_session([1, 2, 3], seed=1)
    routings = []
    for _ in range(2):
        routings.append(session.generate(TURN).routing)
        session.append([9, 8])
    joined = session.to_rollout().routing
    assert joined is not None and joined.start == routings[0].start
    assert len(joined.experts) == 3 + 5 + 2 + 5 - 1 - joined.start
    for turn, routing in zip(session.turns, routings, strict=True):
        rows = slice(turn.start - 1, turn.end - 1)
        mine, theirs = (slice(rows.start - one.start, rows.stop - one.start) for one in (joined, routing))
        np.testing.assert_array_equal(joined.experts[mine], routing.experts[theirs])
        np.testing.assert_array_equal(joined.weights[mine], routing.weights[theirs])
    between = joined.experts[8 - 1 + 1 - joined.start : 10 - 1 - joined.start]  # the row of the first tool's token
    assert (between == -1).all() == (engine.config.return_routing == "output")


@pytest.mark.parametrize("algo", KINDS)
def test_trainers_learn_from_conversations(engine: RolloutEngine, algo: str) -> None:
    trainer_kind, config_kind = KINDS[algo]

    class Conversing(trainer_kind):  # type: ignore[misc, valid-type]
        def roll_out(self, prompts: Any) -> list[Rollout]:
            return [session.to_rollout() for session in conversations(self.engine, prompts, PARAMS.n)]

    def reward(rollout: Rollout) -> float:
        return float(np.mean(rollout.token_ids[rollout.generated] < 16))

    policy = PolicyModel.from_pretrained(engine.config.model)
    config = config_kind(sampling_params=PARAMS, learning_rate=0.01, micro_batch_tokens=100, kl_coef=0.01)
    with WeightPublisher() as publisher:
        trainer = Conversing(policy, engine, publisher, reward, config)
        reports = [trainer.step([[1, 2, 3], [4, 5]]) for _ in range(2)]
    for report in reports:
        assert report.rollout_tokens == report.mismatch.num_tokens == 2 * PARAMS.n * 15
        assert str(report.mismatch.k3_kl_mean) == "0.0" and report.mismatch.differing_logprobs == 0
    assert reports[0].reference.k3_kl_mean == 0.0 < reports[1].reference.k3_kl_mean
