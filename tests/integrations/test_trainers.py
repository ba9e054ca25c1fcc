"""Whole training loops on a tiny model: they learn, the mismatch is exactly zero, and a seed fixes every bit."""

import numpy as np
import pytest

from zerokl.integrations.batch import micro_batches, pack_rollouts
from zerokl.integrations.grpo_trainer import GRPOConfig, GRPOTrainer
from zerokl.integrations.policy_model import PolicyModel
from zerokl.integrations.ppo_trainer import PPOConfig, PPOTrainer
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.kl import mismatch_kl
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync.publisher import WeightPublisher

VOCABULARY = 16
LIKED = 7
STEPS = 10
MARGIN = 0.2  # mean reward of the last three steps above that of the first three; chance is 1 / 16
PARAMS = SamplingParams(n=8, max_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    content = tiny_config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, head_dim=8, eos_token_id=None)
    target = tmp_path_factory.mktemp("tiny") / "model"
    save_pretrained(target, content, random_tensors(ModelConfig.from_json(content), 3))
    return target


def liked_tokens(rollout):
    return float(np.mean(rollout.token_ids == LIKED))


def make_trainer(algo, policy, engine, publisher):
    if algo == "grpo":
        config = GRPOConfig(sampling_params=PARAMS, learning_rate=0.01, micro_batch_tokens=300, kl_coef=0.001)
        return GRPOTrainer(policy, engine, publisher, liked_tokens, config)
    config = PPOConfig(sampling_params=PARAMS, learning_rate=0.01, micro_batch_tokens=300, epochs=2, kl_coef=0.001)
    return PPOTrainer(policy, engine, publisher, liked_tokens, config)


def train(folder, algo, steps, seed=0, worker="inprocess"):
    """(reports, final weights, rollouts of one more generate)"""
    import paddle

    paddle.seed(seed)
    rng = np.random.default_rng(seed)
    config = EngineConfig(model=str(folder), kv_cache_bytes=1 << 20, seed=seed, worker=worker)
    with RolloutEngine(config) as engine, WeightPublisher() as publisher:
        policy = PolicyModel.from_pretrained(folder)
        trainer = make_trainer(algo, policy, engine, publisher)
        reports = [trainer.step(rng.integers(0, VOCABULARY, (8, 3)).tolist()) for _ in range(steps)]
        trainer.sync_weights()
        rollouts = engine.generate([[1, 2, 3]], PARAMS)
        return reports, {name: array.copy() for name, array in policy.named_arrays()}, rollouts


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def run(request, folder):
    return request.param, *train(folder, request.param, STEPS)


def test_reward_rises(run):
    rewards = [report.reward_mean for report in run[1]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + MARGIN


def test_mismatch_is_exactly_zero_in_every_step(run):
    for report in run[1]:
        assert str(report.mismatch.k3_kl_mean) == "0.0"
        assert report.mismatch.differing_logprobs == 0
        assert report.mismatch.num_tokens == report.rollout_tokens == 8 * PARAMS.n * PARAMS.max_tokens


def test_reference_kl_starts_at_zero_and_grows(run):
    reports = run[1]
    assert reports[0].reference.k3_kl_mean == 0.0
    assert all(report.reference.k3_kl_mean > 0.0 for report in reports[1:])
    assert [report.policy_version for report in reports] == list(range(1, STEPS + 1))


def test_the_same_seed_gives_the_same_bits(run, folder):
    algo, reports, weights, rollouts = run
    again, weights_again, rollouts_again = train(
        folder, algo, STEPS, worker="process" if algo == "grpo" else "inprocess"
    )
    assert [report.reward_mean for report in again] == [report.reward_mean for report in reports]
    for name, array in weights.items():
        np.testing.assert_array_equal(array.view(np.int32), weights_again[name].view(np.int32), err_msg=name)
    for one, other in zip(rollouts, rollouts_again, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs.view(np.int32), other.logprobs.view(np.int32))


def test_another_seed_gives_other_rollouts(run, folder):
    """The negative control of the test above."""
    algo, _, weights, _ = run
    _, other, _ = train(folder, algo, 1, seed=1)
    assert any((array != other[name]).any() for name, array in weights.items())


def test_one_perturbed_weight_makes_the_mismatch_non_zero(folder):
    """The negative control of the mismatch: the trainer differs from the rollout by one weight's last bits."""
    with RolloutEngine(EngineConfig(model=str(folder), kv_cache_bytes=1 << 20)) as engine:
        policy = PolicyModel.from_pretrained(folder)
        batch = pack_rollouts(engine.generate([[1, 2, 3], [4, 5]], PARAMS))

        def mismatch():
            logprobs, _ = policy.logprobs(batch.token_ids, batch.cu_seqlens, rows=batch.rows)
            return mismatch_kl(logprobs.numpy(), batch.rollout_logprobs)

        assert mismatch().k3_kl_max == 0.0
        weight = policy.named_tensors()["model.layers.0.mlp.down_proj.weight"]
        values = weight.numpy()
        values[3, 5] *= 1.001
        weight.set_value(values)
        report = mismatch()
        assert report.k3_kl_mean > 0.0
        assert report.differing_logprobs > 0


class OutOfStepTrainer(GRPOTrainer):
    """Changes one weight after the engine got them: what its forward sees is not what the rollout saw."""

    def sync_weights(self):
        synced = super().sync_weights()
        weight = self.policy.named_tensors()["model.layers.0.mlp.down_proj.weight"]
        values = weight.numpy()
        values[3, 5] *= 1.001
        weight.set_value(values)
        return synced


def test_the_mismatch_of_a_step_is_that_of_the_forward_it_trains_on(folder):
    with (
        RolloutEngine(EngineConfig(model=str(folder), kv_cache_bytes=1 << 20)) as engine,
        WeightPublisher() as publisher,
    ):
        policy = PolicyModel.from_pretrained(folder)
        trainer = OutOfStepTrainer(policy, engine, publisher, liked_tokens, GRPOConfig(sampling_params=PARAMS))
        report = trainer.step([[1, 2, 3], [4, 5]])
        assert report.mismatch.k3_kl_mean > 0.0
        assert report.reference.k3_kl_mean == 0.0, "both were scored by the engine"


def test_micro_batches_hold_every_rollout_once(folder):
    with RolloutEngine(EngineConfig(model=str(folder), kv_cache_bytes=1 << 20)) as engine:
        rollouts = engine.generate([[1, 2, 3], [4], [5, 6]], SamplingParams(n=3, max_tokens=5))
    batches = list(micro_batches(rollouts, 17))
    assert [i for batch in batches for i in batch.indices] == list(range(9))
    assert all(len(batch.token_ids) <= 17 for batch in batches)
    targets = np.concatenate([batch.targets for batch in batches])
    np.testing.assert_array_equal(targets, np.concatenate([rollout.token_ids for rollout in rollouts]))
    assert len(list(micro_batches(rollouts, 1))) == 9  # longer than the bound: each alone
    with pytest.raises(ValueError, match="max_tokens"):
        list(micro_batches(rollouts, 0))


def test_trainer_options_are_checked():
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        GRPOConfig(learning_rate=0.0)
    with pytest.raises(ValueError, match=r"sampling_params\.n must be at least 2"):
        GRPOConfig(sampling_params=SamplingParams())
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        PPOConfig(epochs=0)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got 1.5"):
        PPOConfig(lam=1.5)
    with pytest.raises(ValueError, match=r"value_clip must be in \(0, 1\), got 0"):
        PPOConfig(value_clip=0.0)
