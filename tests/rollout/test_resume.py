"""Rollouts that an abort cut off go on as if it had not: the same bits, whatever was asked of sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import gated_engine, in_thread, tiny_options, tiny_tensors, wait_until

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

FIELDS = ("prompt_token_ids", "token_ids", "logprobs", "policy_logprobs", "entropy", "raw_logprobs", "policy_versions")
FIELDS += ("steps", "phases", "cached_lens", "ranks")
FULL = SamplingParams(
    n=2,
    max_tokens=40,
    temperature=1.3,
    top_p=0.95,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    min_tokens=3,
    logit_bias={7: 1.5},
    stop=("zq",),
    raw_logprobs=True,
)


def same(first: Rollout, second: Rollout) -> None:
    for field in dataclasses.fields(Rollout):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if field.name in ("num_cached_tokens", "num_preemptions", "steps", "phases", "cached_lens", "ranks"):
            continue
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=field.name)
        else:
            assert one == other, field.name


def cut(rollout: Rollout, size: int) -> Rollout:
    """The rollout as an abort after `size` tokens would have left it."""
    columns = {
        name: None if getattr(rollout, name) is None else getattr(rollout, name)[:size]
        for name in FIELDS
        if name != "prompt_token_ids"
    }
    return dataclasses.replace(rollout, **columns, finish_reason="abort", stop_reason=None)


def test_an_aborted_call_goes_on_with_the_same_bits(tiny_model: Path) -> None:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        whole = engine.generate(["abc", "hello"], FULL)
    engine, worker = gated_engine(tiny_model)
    with engine:
        call = in_thread(lambda: engine.generate(["abc", "hello"], FULL))
        for _ in range(6):
            worker.began.acquire()
            worker.gate.release()
        worker.began.acquire()  # the abort finds a step at the gate
        aborted = in_thread(engine.abort_all)
        wait_until(lambda: engine._loop._inbox.num_urgent > 0)
        worker.open()
        aborted()
        parts = call()
        assert {rollout.finish_reason for rollout in parts} == {"abort"}
        assert all(0 < len(part.token_ids) < len(one.token_ids) for part, one in zip(parts, whole, strict=True))
        for one, other in zip(engine.generate(resume_from=parts), whole, strict=True):
            same(one, other)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(0, 19),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    stop=st.sampled_from([(), ("a",), ("\x00", "bc")]),
    seed=st.integers(0, 2**64 - 1),
)
def test_it_may_be_cut_anywhere(
    resuming: RolloutEngine, size: int, temperature: float, penalty: float, stop: tuple[str, ...], seed: int
) -> None:
    params = SamplingParams(
        max_tokens=20, temperature=temperature, repetition_penalty=penalty, stop=stop, seed=seed, ignore_eos=True
    )
    (whole,) = resuming.generate("go", params)
    part = cut(whole, min(size, len(whole.token_ids) - 1))
    same(resuming.generate(resume_from=part)[0], whole)


@pytest.fixture(scope="module")
def resuming(tiny_model: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        yield engine


def test_another_seed_would_not_do(engine: RolloutEngine) -> None:
    """The negative control: what is compared above depends on what the rollout carries."""
    (whole,) = engine.generate("go", SamplingParams(max_tokens=20, ignore_eos=True))
    other = dataclasses.replace(cut(whole, 5), seed=whole.seed ^ 1)
    assert engine.generate(resume_from=other)[0].token_ids.tolist() != whole.token_ids.tolist()


def test_new_weights_take_over_from_the_cut(engine: RolloutEngine) -> None:
    (whole,) = engine.generate("go", SamplingParams(max_tokens=20, ignore_eos=True))
    engine.update_weights(tiny_tensors(1))
    (resumed,) = engine.generate(resume_from=[cut(whole, 5)], request_ids=["again"])
    assert resumed.version_spans == [(0, 5, 0), (5, 20, 1)]
    np.testing.assert_array_equal(engine.score(resumed)[0][5:], resumed.policy_logprobs[5:])


def test_what_cannot_be_resumed_is_refused(engine: RolloutEngine) -> None:
    (whole,) = engine.generate("go", SamplingParams(max_tokens=20, ignore_eos=True))
    part = cut(whole, 5)
    wrong = [
        (whole, r"resume_from\[0\] must be a rollout cut by an abort, got finish_reason='length'"),
        ([part, "text"], "resume_from must be a Rollout"),
        ([], "resume_from must be"),
        (dataclasses.replace(whole, finish_reason="abort"), r"fewer tokens than its max_tokens \(20\), got 20"),
        (dataclasses.replace(part, logprobs=part.logprobs[:2]), r"resume_from\[0\].logprobs must have an entry"),
        (dataclasses.replace(part, token_ids=part.token_ids + 1000), "below vocab_size"),
    ]
    for resume_from, message in wrong:
        with pytest.raises(ValueError, match=message):
            engine.generate(resume_from=resume_from)
    with pytest.raises(ValueError, match="must be None with resume_from"):
        engine.generate("go", resume_from=part)
    with pytest.raises(ValueError, match="request_ids must be 1"):
        engine.generate(resume_from=part, request_ids=["a", "b"])
    with pytest.raises(ValueError, match="prompts must be"):
        engine.generate()
