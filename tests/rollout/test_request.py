"""Request, its results and history, admission limits, and the Rollout made of it."""

import math

import numpy as np
import pytest
from scheduling_rig import record

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.request import Request
from zerokl.rollout.results import Origin
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.sampling_state import TokenHistory
from zerokl.rollout.seeds import derive_seed
from zerokl.rollout.token_ids import as_token_ids

LIMITS = AdmissionLimits(max_model_len=32, num_blocks=3, block_size=8, vocab_size=100)


def result(tokens: list[int]) -> SampleResult:
    values = np.arange(len(tokens), dtype=np.float32)
    return SampleResult(
        tokens=np.array(tokens, np.int32),
        logprobs=values,
        policy_logprobs=values + 1,
        entropy=values + 2,
        raw_logprobs=values + 3,
    )


def test_a_generate_request_grows_past_its_first_arrays():
    request = Request.generate("a", [1, 2, 3], SamplingParams(max_tokens=500, raw_logprobs=True), seed=5)
    for token in range(300):
        assert request.next_row == request.num_tokens - 1 == request.compute_target - 1
        record(request, result([7, token, 9]), 1, 1, Origin(token // 100))
    assert request.output_token_ids.tolist() == list(range(300))
    assert request.token_ids.tolist() == [1, 2, 3, *range(300)]
    assert request.logprobs.tolist() == [1.0] * 300 and request.policy_logprobs[0] == 2.0
    assert request.entropy[-1] == 3.0 and request.raw_logprobs is not None and request.raw_logprobs[-1] == 4.0
    assert request.policy_versions.tolist() == [0] * 100 + [1] * 100 + [2] * 100


def test_a_score_request_takes_rows_in_chunks():
    request = Request.score("s", [4, 5, 6, 7, 8], score_start=2)
    assert (request.num_tokens, request.compute_target, request.next_row) == (5, 4, 1)
    record(request, result([6, 7]), 0, 2, Origin(3))
    assert request.next_row == 3 and request.output_token_ids.tolist() == [6, 7]
    record(request, result([9, 8]), 1, 1, Origin(3))
    assert request.logprobs.tolist() == [0.0, 1.0, 1.0] and request.raw_logprobs is None
    assert request.num_tokens == 5


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "non-empty flat sequence"),
        ([1.0, 2.0], "dtype float64"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([[1], [2, 3]], "non-empty flat sequence"),
        ("text", "non-empty flat sequence"),
        ([True], "dtype bool"),
        ([1, -4], "got -4"),
        ([2**31], "got 2147483648"),
        ([2**70], "dtype object"),
    ],
)
def test_token_ids_are_checked(ids, message):
    with pytest.raises(ValueError, match=message) as raised:
        as_token_ids("prompt_token_ids", ids)
    assert "prompt_token_ids" in str(raised.value)


@pytest.mark.parametrize("start", [0, 3, -1])
def test_score_start_is_checked(start):
    with pytest.raises(ValueError, match=rf"score_start must be in \[1, 2\] for 3 token_ids, got {start}"):
        Request.score("s", [1, 2, 3], score_start=start)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (range(33), {}, r"at most max_model_len \(32\) tokens, got 33"),
        ([100], {}, r"below vocab_size \(100\), got 100"),
        ([1], {"stop_token_ids": (100,)}, r"stop_token_ids must hold token ids below vocab_size"),
        ([1], {"logit_bias": {100: 1.0}}, r"logit_bias must hold token ids below vocab_size"),
        ([1], {"logit_bias": dict.fromkeys(range(100), -math.inf)}, r"must leave a token to draw.*all 100"),
        (
            [1],
            {"logit_bias": dict.fromkeys(range(99), -math.inf), "stop_token_ids": (99,), "min_tokens": 1},
            r"must leave a token to draw.*all 100",
        ),
        (
            range(20),
            {"max_tokens": 13},
            r"max_tokens \(13\) after a prompt of 20 tokens makes 33, over max_model_len \(32\)",
        ),
        (range(20), {"max_tokens": 6}, r"26 tokens need 4 KV blocks of 8, over num_blocks \(3\)"),
    ],
)
def test_what_can_never_fit_is_refused(prompt, params, message):
    request = Request.generate("a", list(prompt), SamplingParams.from_dict(params), seed=0)
    with pytest.raises(ValueError, match=message):
        LIMITS.check(request)


def test_what_just_fits_is_admitted():
    LIMITS.check(Request.generate("a", list(range(20)), SamplingParams(max_tokens=5), seed=0))
    LIMITS.check(Request.score("s", list(range(25))))
    with pytest.raises(ValueError, match="token_ids must hold at most"):
        LIMITS.check(Request.score("s", list(range(33))))


def test_token_history_counts_like_a_counter():
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(0, 30, 40).astype(np.int32), rng.integers(0, 90, 400).tolist()
    history = TokenHistory(prompt)
    for token in output[:200]:
        history.append(token)
    twin = history.copy()
    for token in output[200:]:
        twin.append(token)
    for seen, counted in ((history, output[:200]), (twin, output)):
        tokens, counts = seen.arrays()
        assert sorted(tokens.tolist()) == sorted(set(prompt.tolist()) | set(counted))
        assert {t: c for t, c in zip(tokens.tolist(), counts.tolist(), strict=True) if c} == {
            t: counted.count(t) for t in counted
        }


def test_derived_seeds_differ_and_repeat():
    seeds = {derive_seed(seed, call, prompt) for seed in range(4) for call in range(10) for prompt in range(10)}
    assert len(seeds) == 400 and all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(2**64 - 1, 5, 6) == derive_seed(2**64 - 1, 5, 6)


def test_a_rollout_holds_copies_of_exact_length():
    request = Request.generate("a", [1, 2], SamplingParams(max_tokens=9), seed=11, sample_index=2, prompt_index=4)
    record(request, result([5]), 0, 1, Origin(8))
    request.finish("stop", 5)
    rollout = Rollout.from_request(request, text="x")
    assert rollout.token_ids.tolist() == [5] and rollout.token_ids.base is None
    assert rollout.policy_versions.tolist() == [8] and rollout.raw_logprobs is None
    assert (rollout.finish_reason, rollout.stop_reason, rollout.text) == ("stop", 5, "x")
    assert (rollout.seed, rollout.sample_index, rollout.prompt_index) == (11, 2, 4)
    assert rollout.logprobs_definition == "processed_logprobs"
