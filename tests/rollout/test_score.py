"""score() rates given tokens under each definition with the bits that sampling reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import END, VOCAB_SIZE, tiny_options

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.sampling_params import SamplingParams

PROMPTS = [list(range(30)), [7], [3, 1, 4, 1, 5]]
EVERY_OPTION = SamplingParams(
    n=2,
    max_tokens=12,
    temperature=0.8,
    top_k=60,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={5: 1.5, 6: -np.inf},
    min_tokens=4,
    raw_logprobs=True,
    seed=5,
)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        yield engine


@pytest.mark.parametrize("params", [SamplingParams(n=2, max_tokens=12, raw_logprobs=True), EVERY_OPTION])
def test_each_definition_equals_what_sampling_reported(engine: RolloutEngine, params: SamplingParams) -> None:
    rollouts = engine.generate(PROMPTS, params)
    for definition in ("policy_logprobs", "logprobs", "raw"):
        field = {"raw": "raw_logprobs"}.get(definition, definition)
        for rollout, score in zip(rollouts, engine.score(rollouts, definition=definition), strict=True):
            np.testing.assert_array_equal(score, getattr(rollout, field), err_msg=definition)


def test_without_prompt_lens_every_token_but_the_first_is_rated(engine: RolloutEngine) -> None:
    tokens = [np.arange(40), np.array([9]), np.array([1, 2])]
    whole = engine.score(tokens)
    assert [len(score) for score in whole] == [39, 0, 1]
    assert all(score.dtype == np.float32 for score in whole)
    tail = engine.score(tokens, prompt_lens=[30, 1, 2])
    assert [len(score) for score in tail] == [10, 0, 0]
    np.testing.assert_array_equal(tail[0], whole[0][29:])


def test_one_sequence_needs_no_list(engine: RolloutEngine) -> None:
    (rollout,) = engine.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))
    np.testing.assert_array_equal(engine.score(rollout)[0], rollout.policy_logprobs)
    np.testing.assert_array_equal(engine.score([1, 2, 3])[0], engine.score([[1, 2, 3]])[0])


@pytest.mark.parametrize("definition", ["policy_logprobs", "logprobs", "raw"])
def test_probabilities_over_the_vocabulary_add_up_to_one(engine: RolloutEngine, definition: Any) -> None:
    sequences = [[3, 1, 4, token] for token in range(VOCAB_SIZE)]
    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3)
    scores = engine.score(sequences, params, definition=definition, prompt_lens=[3] * VOCAB_SIZE)
    probabilities = np.exp(np.concatenate(scores).astype(np.float64))
    assert abs(probabilities.sum() - 1) < 1e-5
    assert (probabilities == 0).any() == (definition == "logprobs"), "only top-p leaves tokens out"


def test_temperature_changes_policy_logprobs_and_not_raw(engine: RolloutEngine) -> None:
    cold, warm = SamplingParams(temperature=0.5), SamplingParams(temperature=1.0)
    assert not np.array_equal(engine.score([PROMPTS[0]], cold)[0], engine.score([PROMPTS[0]], warm)[0])
    raw = [engine.score([PROMPTS[0]], params, definition="raw")[0] for params in (cold, warm)]
    np.testing.assert_array_equal(raw[0], raw[1])
    np.testing.assert_array_equal(raw[1], engine.score([PROMPTS[0]], warm)[0])


def test_temperature_zero_rates_the_argmax_alone(engine: RolloutEngine) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    (rollout,) = engine.generate([PROMPTS[2]], greedy)
    assert rollout.logprobs.tolist() == [0.0] * 6
    np.testing.assert_array_equal(engine.score(rollout, definition="logprobs")[0], rollout.logprobs)
    np.testing.assert_array_equal(engine.score(rollout)[0], engine.score(rollout, SamplingParams())[0])
    other = [*PROMPTS[2], (int(rollout.token_ids[0]) + 1) % VOCAB_SIZE]
    assert engine.score([other], greedy, definition="logprobs", prompt_lens=[5])[0].tolist() == [-np.inf]


def test_min_tokens_bans_stop_tokens_where_sampling_banned_them(engine: RolloutEngine) -> None:
    params = SamplingParams(min_tokens=2, max_tokens=4)
    (score,) = engine.score([[1, END, END, END]], params, definition="logprobs", prompt_lens=[1])
    assert np.isneginf(score).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": []}, "token_ids must be.*non-empty"),
        ({"token_ids": "text"}, r"token_ids\[0\] must be token ids"),
        ({"token_ids": [[1], []]}, r"token_ids\[1\].*non-empty"),
        ({"token_ids": [[1, VOCAB_SIZE]]}, r"token_ids\[0\].*below vocab_size"),
        ({"token_ids": [[1] * 257]}, r"token_ids\[0\].*max_model_len \(256\)"),
        ({"token_ids": [[1, 2]], "definition": "entropy"}, "definition must be one of"),
        ({"token_ids": [[1, 2]], "policy": "reference"}, r"policy must be one of \['policy'\]"),
        ({"token_ids": [[1, 2]], "prompt_lens": [3]}, r"prompt_lens\[0\] must be in \[1, 2\].*got 3"),
        ({"token_ids": [[1, 2]], "prompt_lens": [0]}, r"prompt_lens\[0\] must be at least 1, got 0"),
        ({"token_ids": [[1, 2]], "prompt_lens": [1.0]}, r"prompt_lens\[0\] must be an integer"),
        ({"token_ids": [[1, 2]], "prompt_lens": 1}, r"prompt_lens must be a sequence of integers.*got 1"),
        ({"token_ids": [[1, 2]], "prompt_lens": [1, 1]}, r"one entry per sequence \(1\), got 2"),
        (
            {"token_ids": [[1, 2]], "sampling_params": EVERY_OPTION, "definition": "logprobs"},
            r"token_ids\[0\]: penalties.*prompt_lens",
        ),
    ],
)
def test_bad_input_is_refused(engine: RolloutEngine, arguments: dict[str, Any], message: str) -> None:
    before = engine.metrics()
    with pytest.raises(ValueError, match=message):
        engine.score(**arguments)
    assert engine.metrics() == before
