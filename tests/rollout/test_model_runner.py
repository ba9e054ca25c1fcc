"""The runner: weight sets by name, staging aside, and what a step returns or refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult, neutral_sampling
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.model_runner import ModelRunner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.loader import open_tensors
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.step_outcome import NonFiniteLogitsError

CONTENT = tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True)
CONFIG = ModelConfig.from_json(CONTENT)
TOKENS = np.arange(1, 20, dtype=np.int32)


def make_runner() -> ModelRunner:
    return ModelRunner(EngineConfig(model="unused", block_size=16, num_blocks=8, num_threads=2), CONFIG)


def score(runner: ModelRunner, policy: str = "policy", logit_rows: NDArray[np.int32] | None = None) -> SampleResult:
    rows = np.arange(19, dtype=np.int32) if logit_rows is None else logit_rows
    sampling = neutral_sampling(len(rows), (rows * 5) % 96)
    inputs = step_inputs([TOKENS], [0], [[5, 3]], 16, policy=policy, logit_rows=rows, sampling=sampling, step=7)
    return runner.execute(StepOrder(inputs=inputs)).sampled


def test_staging_changes_nothing_until_the_commit_and_keeps_no_source() -> None:
    runner = make_runner()
    with pytest.raises(ValueError, match=r"policy must be one of \[\], got 'policy'"):
        score(runner)
    first, second = random_tensors(CONFIG, 1), random_tensors(CONFIG, 2)
    runner.stage(first, 10)
    runner.commit()
    expected_first = score(runner).logprobs
    runner.stage(second, 11)
    np.testing.assert_array_equal(score(runner).logprobs, expected_first)
    for array in (*first.values(), *second.values()):
        array[...] = np.nan
    np.testing.assert_array_equal(score(runner).logprobs, expected_first)
    runner.commit()
    expected_second = score(runner).logprobs
    assert np.isfinite(expected_second).all() and (expected_second != expected_first).all()
    assert [(s.version, s.epoch) for s in runner.weight_sets.values()] == [(11, 2)]
    runner.stage(random_tensors(CONFIG, 1), 12)
    runner.discard_staged()
    np.testing.assert_array_equal(score(runner).logprobs, expected_second)
    runner.stage(random_tensors(CONFIG, 1), 12)
    runner.commit()
    np.testing.assert_array_equal(score(runner).logprobs, expected_first)
    assert runner.weight_sets["policy"].epoch == 4


def test_pinned_sets_live_on_under_their_names() -> None:
    runner = make_runner()
    with pytest.raises(ValueError, match="no live weights yet"):
        runner.pin("reference")
    runner.stage(random_tensors(CONFIG, 1), 1)
    runner.commit()
    runner.pin("reference")
    assert runner.weight_sets["reference"] is runner.weight_sets["policy"]
    expected = score(runner).logprobs
    runner.stage(random_tensors(CONFIG, 2), 2)
    runner.commit()
    np.testing.assert_array_equal(score(runner, "reference").logprobs, expected)
    assert (score(runner).logprobs != expected).all()
    for name in ("policy", "unknown"):
        with pytest.raises(ValueError, match=rf"drop: name must be one of \['reference'\], got '{name}'"):
            runner.drop(name)
    with pytest.raises(ValueError, match="pin: name must be non-empty and not 'policy'"):
        runner.pin("policy")
    runner.drop("reference")
    with pytest.raises(ValueError, match=r"policy must be one of \['policy'\], got 'reference'"):
        score(runner, "reference")


def test_refused_weights_leave_the_live_ones(tmp_path: Path) -> None:
    runner = make_runner()
    folder = save_pretrained(tmp_path, CONTENT, random_tensors(CONFIG, 1))
    runner.stage(open_tensors(folder, CONFIG), 1)
    runner.commit()
    expected = score(runner).logprobs
    bad = random_tensors(CONFIG, 2)
    bad["model.norm.weight"] = bad["model.norm.weight"][:-1]
    with pytest.raises(ValueError, match=r"model.norm.weight \[47\] \(must be \[48\]\)"):
        runner.stage(bad, 2)
    np.testing.assert_array_equal(score(runner).logprobs, expected)


def test_read_only_and_strided_sources_are_taken() -> None:
    plain, odd = make_runner(), make_runner()
    tensors = random_tensors(CONFIG, 1)
    plain.stage(tensors)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in tensors.items()}
    for array in strided.values():
        array.flags.writeable = False
    odd.stage(strided)
    plain.commit()
    odd.commit()
    np.testing.assert_array_equal(score(odd).logprobs, score(plain).logprobs)
    for name, array in tensors.items():
        array.flags.writeable = False
        strided[name] = array
    odd.stage(strided)
    odd.commit()
    np.testing.assert_array_equal(score(odd).logprobs, score(plain).logprobs)


def test_results_are_the_callers_to_keep() -> None:
    runner = make_runner()
    runner.stage(random_tensors(CONFIG, 1))
    runner.commit()
    first = score(runner)
    copy = first.logprobs.copy()
    score(runner, logit_rows=np.array([3], np.int32))
    np.testing.assert_array_equal(first.logprobs, copy)


def test_a_step_without_logit_rows_gives_no_rows() -> None:
    runner = make_runner()
    runner.stage(random_tensors(CONFIG, 1))
    runner.commit()
    result = score(runner, logit_rows=np.zeros(0, np.int32))
    assert len(result.tokens) == len(result.logprobs) == len(result.entropy) == 0


def test_broken_logits_are_an_error_that_names_step_and_rows() -> None:
    runner = make_runner()
    tensors = random_tensors(CONFIG, 1)
    runner.stage(tensors)
    runner.commit()
    runner.weight_sets["policy"].params.lm_head.panels[0] = np.nan
    with pytest.raises(
        NonFiniteLogitsError, match="step 7: logits of weights 'policy' are not finite in logit rows 0, 1"
    ):
        score(runner)
    runner.stage(random_tensors(CONFIG, 1))
    runner.commit()
    assert np.isfinite(score(runner).logprobs).all()
