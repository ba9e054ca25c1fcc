"""SamplingParams: what is accepted, what is refused and how the refusal reads."""

import dataclasses
import math

import numpy as np
import pytest

from zerokl.rollout.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("n", 0, "[1, 2147483647]"),
        ("n", True, "integer"),
        ("n", 1.0, "integer"),
        ("n", np.array([1, 2]), "integer"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("temperature", -0.1, "finite"),
        ("temperature", 1e-9, "[1e-06, 1e+06]"),
        ("temperature", "hot", "finite"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.01, "(0, 1]"),
        ("top_p", math.nan, "(0, 1]"),
        ("top_k", -1, "[0, 2147483647]"),
        ("top_k", 2**31, "2147483647"),
        ("min_p", -0.5, "[0, 1]"),
        ("min_p", 1.5, "[0, 1]"),
        ("temperature", 10**400, "finite"),
        ("temperature", np.array([0.5, 0.7]), "finite"),
        ("repetition_penalty", 0.0, "[1e-06, 1e+06]"),
        ("repetition_penalty", 1e-7, "[1e-06, 1e+06]"),
        ("repetition_penalty", math.inf, "[1e-06, 1e+06]"),
        ("presence_penalty", 2.5, "[-2, 2]"),
        ("frequency_penalty", -2.5, "[-2, 2]"),
        ("max_tokens", 0, "[1, 2147483647]"),
        ("min_tokens", -1, ">= 0"),
        ("min_tokens", 17, "max_tokens (16)"),
        ("stop", ("",), "non-empty"),
        ("stop", (3,), "non-empty"),
        ("stop", 3, "sequence"),
        ("stop_token_ids", (-1,), "[0, 2147483647]"),
        ("stop_token_ids", 5, "sequence"),
        ("logit_bias", {0: math.nan}, "[-1e+09, 1e+09]"),
        ("logit_bias", {0: math.inf}, "[-1e+09, 1e+09]"),
        ("logit_bias", {0: "much"}, "[-1e+09, 1e+09]"),
        ("logit_bias", {-3: 1.0}, "[0, 2147483647]"),
        ("logit_bias", {0: 1e10}, "or -inf"),
        ("logit_bias", [1, 2], "map"),
        ("seed", -1, "18446744073709551615"),
        ("seed", 2**64, "18446744073709551615"),
        ("ignore_eos", 1, "True or False"),
        ("raw_logprobs", None, "True or False"),
    ],
)
def test_a_bad_value_is_refused_by_name_value_and_bound(field, value, bound):
    with pytest.raises(ValueError, match=field) as raised:
        SamplingParams.from_dict({field: value})
    assert bound in str(raised.value)
    shown = value[0] if isinstance(value, tuple) else value
    assert isinstance(value, dict) or repr(shown) in str(raised.value)


def test_bounds_themselves_are_accepted():
    params = SamplingParams(
        temperature=0, top_p=1, min_p=1, repetition_penalty=1e-3, presence_penalty=-2, max_tokens=3, min_tokens=3,
        seed=2**64 - 1, logit_bias={np.int64(4): np.float32(-np.inf), 5: 1}, n=np.int32(2),
    )  # fmt: skip
    assert params.temperature == 0.0 and params.logit_bias == {4: -math.inf, 5: 1.0}
    assert type(params.n) is int and type(params.top_p) is float


def test_stop_is_normalised_and_the_bias_is_a_copy():
    bias = {1: 2.0}
    params = SamplingParams(stop="END", logit_bias=bias)
    bias[1] = 9.0
    assert params.stop == ("END",) and params.logit_bias == {1: 2.0}
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=np.array([3, 4])).stop_token_ids == (3, 4)


def test_params_are_frozen_and_replace_checks_again():
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    assert dataclasses.replace(params, max_tokens=4).max_tokens == 4
    with pytest.raises(ValueError, match="min_tokens"):
        dataclasses.replace(params, min_tokens=99)


def test_an_unknown_option_names_a_near_one():
    with pytest.raises(ValueError, match=r"no option 'temprature' \(did you mean 'temperature'\?\)"):
        SamplingParams.from_dict({"temprature": 1.0})


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_uses_penalties(field):
    assert not SamplingParams().uses_penalties
    assert SamplingParams.from_dict({field: 0.5}).uses_penalties
