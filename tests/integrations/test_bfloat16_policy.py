"""A trainer that rounds its weights as the engine got them: the same bits, and gradients that reach its own float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from tiny_engine import tiny_options, tiny_tensors, write_tiny_model

from zerokl.integrations.policy_model import PolicyModel
from zerokl.kernels.dispatch import fill_weights
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.kl import KLReport, mismatch_kl
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync import WeightPublisher
from zerokl.weight_sync.views import narrow, widen

PARAMS = SamplingParams(n=2, max_tokens=12, seed=5, ignore_eos=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(tiny_options(write_tiny_model(tmp_path))) as made:
        yield made


def policy_of(engine_folder: Path, **options: Any) -> PolicyModel:
    return PolicyModel(ModelConfig.from_json(engine_folder), tiny_tensors(3), **options)


def mismatch(policy: PolicyModel, engine: RolloutEngine) -> KLReport:
    rollouts = engine.generate([[1, 2, 3], [9] * 20], PARAMS)
    sequences = [np.concatenate([one.prompt_token_ids, one.token_ids]) for one in rollouts]
    starts = np.concatenate([[0], np.cumsum([len(one) for one in sequences])]).astype(np.int32)
    rows = np.concatenate(
        [
            np.arange(start + len(one.prompt_token_ids) - 1, start + len(sequence) - 1)
            for start, one, sequence in zip(starts, rollouts, sequences, strict=False)
        ]
    ).astype(np.int32)
    with paddle.no_grad():
        logprobs, _ = policy.logprobs(np.concatenate(sequences), starts, rows=rows)
    rolled = np.concatenate([one.policy_logprobs for one in rollouts])
    return mismatch_kl(logprobs.numpy(), rolled, inexact=any(one.inexact for one in rollouts))


@pytest.mark.parametrize("by_kernel", [False, True])
def test_a_policy_that_rounds_alike_gives_the_rollouts_bits(
    engine: RolloutEngine, tmp_path: Path, by_kernel: bool
) -> None:
    policy = policy_of(tmp_path, weight_dtype="bfloat16")
    optimizer = paddle.optimizer.SGD(0.1, parameters=policy.parameters())
    options = {"fill": fill_weights} if by_kernel else {}
    with WeightPublisher(**options) as publisher:
        for version in (1, 2):  # the rounded weights follow the optimizer's steps
            published = publisher.publish(policy.named_arrays(), version, dtype="bfloat16", inexact=False)
            engine.update_weights(published)
            report = mismatch(policy, engine)
            assert report.k3_kl_max == 0.0 and report.differing_logprobs == 0 and not report.inexact
            logprobs, _ = policy.logprobs(np.arange(20, dtype=np.int32), np.array([0, 20], np.int32))
            logprobs.sum().backward()
            optimizer.step()
            optimizer.clear_grad()


def test_one_that_does_not_differs_and_the_report_says_why(engine: RolloutEngine, tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    with WeightPublisher() as publisher:
        engine.update_weights(publisher.publish(policy.named_arrays(), 1, dtype="bfloat16"))
        report = mismatch(policy, engine)
        assert report.k3_kl_max > 0.0 and report.differing_logprobs > 0
        assert report.inexact and report.metrics()["rollout_corr/inexact"] == 1.0
        engine.update_weights(publisher.publish(policy.named_arrays(), 2))
        report = mismatch(policy, engine)
        assert report.k3_kl_max == 0.0 and not report.inexact


def test_tokens_of_an_inexact_version_mark_their_rollout_alone(engine: RolloutEngine) -> None:
    with WeightPublisher() as publisher:
        for version in range(1, 4):
            published = publisher.publish(tiny_tensors(1), version, dtype="bfloat16" if version == 2 else None)
            engine.update_weights(published)
            rollouts = engine.generate([[1, 2, 3]], PARAMS)
            assert [rollout.inexact for rollout in rollouts] == [version == 2] * 2


def test_gradients_are_those_at_the_rounded_values_and_reach_the_parameters(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    rounding = policy_of(tmp_path, weight_dtype="bfloat16")
    rounded = {}
    for name, array in tiny_tensors(3).items():
        patterns = np.empty(array.size, np.uint16)
        narrow(array.reshape(-1), patterns)
        rounded[name] = widen(patterns, "bfloat16").reshape(array.shape)
    plain = PolicyModel(ModelConfig.from_json(tmp_path), rounded)
    ids, starts = np.arange(30, dtype=np.int32), np.array([0, 13, 30], np.int32)
    for model in (rounding, plain):
        logprobs, _ = model.logprobs(ids, starts)
        logprobs.sum().backward()
    for name, parameter in rounding.named_tensors().items():
        np.testing.assert_array_equal(parameter.grad.numpy(), plain.named_tensors()[name].grad.numpy(), err_msg=name)
        np.testing.assert_array_equal(parameter.numpy(), tiny_tensors(3)[name])


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    with pytest.raises(ValueError, match=r"weight_dtype must be one of .*bfloat16.*, got 'float16'"):
        policy_of(tmp_path, weight_dtype="float16")
