"""What a caller may ask of sampling: immutable, checked when made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zerokl.rollout.validation import UINT64_LIMIT, build_options, check_bool, check_float, check_int

INT32_MAX = 2**31 - 1
SMALLEST_TEMPERATURE = 1e-6
"""Below it logits / temperature overflows float32; ask for 0 (argmax) instead."""
LARGEST_TEMPERATURE = 1e6
SMALLEST_TOP_P = float(np.finfo(np.float32).tiny)
"""Anything below, 0 in float32, keeps the likeliest token alone as well."""
LARGEST_PENALTY = 1e6
LARGEST_BIAS = 1e9
"""With these bounds no options take a logit of any real model out of float32's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample the continuations of a prompt. A bad value raises ValueError naming field, value and bound.

    Order of processing: logit bias, penalties, temperature, top-k, top-p, min-p; ties go to the lower token id.
    Instances are immutable; make a variant with `dataclasses.replace`.
    """

    n: int = 1
    """Samples per prompt, >= 1. They share the prompt's KV blocks and differ by sample index."""
    temperature: float = 1.0
    """0 takes the argmax; otherwise in [1e-6, 1e6]. Logits are divided by it."""
    top_p: float = 1.0
    """In (0, 1]: keep the smallest set of likeliest tokens with at least this share of the mass. 1 is off."""
    top_k: int = 0
    """>= 0: keep the k likeliest tokens. 0 is off."""
    min_p: float = 0.0
    """In [0, 1]: drop tokens less likely than this times the likeliest. 0 is off."""
    repetition_penalty: float = 1.0
    """In [1e-6, 1e6]: divides positive and multiplies negative logits of tokens in prompt or output (arXiv:1909.05858).
    1 is off."""
    presence_penalty: float = 0.0
    """In [-2, 2]: subtracted from logits of tokens that the output holds."""
    frequency_penalty: float = 0.0
    """In [-2, 2]: subtracted, times their count, from logits of tokens that the output holds."""
    logit_bias: Mapping[int, float] | None = None
    """Token id -> value added to its logit: in [-1e9, 1e9], or -inf to ban the token. Some token must stay allowed."""
    max_tokens: int = 16
    """Tokens to sample at most, >= 1. The engine refuses prompt + max_tokens over its max_model_len."""
    min_tokens: int = 0
    """In [0, max_tokens]: until so many tokens are sampled, stop tokens are banned and stop strings ignored."""
    stop: tuple[str, ...] = ()
    """Non-empty strings that end the output once its text holds one; a single string or a list is accepted."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, beside the model's end-of-sequence ids. The stop token stays in the output."""
    ignore_eos: bool = False
    """Treat the model's end-of-sequence ids as ordinary tokens. `stop_token_ids` still stop."""
    seed: int | None = None
    """In [0, 2^64): key of the random numbers, used as it is for every prompt of the call. None: derived from the
    engine's seed, the number of the call and the prompt's index, and reported in the `Rollout`."""
    raw_logprobs: bool = False
    """Also return logprobs of the unprocessed logits at temperature 1."""

    def __post_init__(self) -> None:
        self._set("n", check_int("n", self.n, 1, INT32_MAX))
        self._set("max_tokens", check_int("max_tokens", self.max_tokens, 1, INT32_MAX))
        self._set("min_tokens", check_int("min_tokens", self.min_tokens, 0))
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be <= max_tokens ({self.max_tokens}), got {self.min_tokens}")
        self._set("top_k", check_int("top_k", self.top_k, 0, INT32_MAX))
        if self.seed is not None:
            self._set("seed", check_int("seed", self.seed, 0, UINT64_LIMIT - 1))
        check_bool("ignore_eos", self.ignore_eos)
        check_bool("raw_logprobs", self.raw_logprobs)
        self._check_floats()
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_tokens(self.stop_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_floats(self) -> None:
        bound = f"0 (argmax) or a finite number in [{SMALLEST_TEMPERATURE:g}, {LARGEST_TEMPERATURE:g}]"
        temperature = check_float("temperature", self.temperature, bound, 0.0, LARGEST_TEMPERATURE)
        if 0.0 < temperature < SMALLEST_TEMPERATURE:
            raise ValueError(f"temperature must be {bound}, got {self.temperature!r}")
        self._set("temperature", temperature)
        top_p = check_float("top_p", self.top_p, "in (0, 1]", 0.0, 1.0, open_low=True)
        self._set("top_p", max(top_p, SMALLEST_TOP_P))
        self._set("min_p", check_float("min_p", self.min_p, "in [0, 1]", 0.0, 1.0))
        low, high = 1.0 / LARGEST_PENALTY, LARGEST_PENALTY
        bound = f"in [{low:g}, {high:g}]"
        self._set("repetition_penalty", check_float("repetition_penalty", self.repetition_penalty, bound, low, high))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, check_float(name, getattr(self, name), "in [-2, 2]", -2.0, 2.0))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SamplingParams:
        """From a mapping of options; an unknown one raises ValueError listing the known ones."""
        return build_options(cls, _FIELD_NAMES, options)

    @property
    def uses_penalties(self) -> bool:
        """Whether a row needs the history of its tokens."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


_FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if not isinstance(stop, Iterable):
        raise ValueError(f"stop must be a string or a sequence of strings, got {stop!r}")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for index, string in enumerate(strings):
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop[{index}] must be a non-empty string, got {string!r}")
    return strings


def _stop_tokens(ids: Iterable[Any]) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ValueError(f"stop_token_ids must be a sequence of token ids, got {ids!r}")
    return tuple(check_int(f"stop_token_ids[{index}]", token, 0, INT32_MAX) for index, token in enumerate(ids))


def _biases(bias: Mapping[Any, Any]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {bias!r}")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        token_id = check_int("logit_bias token id", token, 0, INT32_MAX)
        if isinstance(value, (float, np.floating)) and value == -np.inf:
            checked[token_id] = -math.inf
        else:
            bound = f"in [{-LARGEST_BIAS:g}, {LARGEST_BIAS:g}] or -inf"
            checked[token_id] = check_float(f"logit_bias[{token_id}]", value, bound, -LARGEST_BIAS, LARGEST_BIAS)
    return checked
