"""Requests that rate given tokens, and what to read from them: teacher forcing on the engine's own paged path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.errors import AbortedError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.prompts import params_list, prompt_list, token_ids_of
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams

Definition = Literal["policy_logprobs", "logprobs", "raw"]
"""Which distribution: softmax(logits / temperature), the one that is sampled from with all options, softmax(logits)."""


class ScoreRequests:
    """The score requests of one call; None stands for a sequence without a token to rate."""

    def __init__(self, requests: list[Request | None], definition: Definition) -> None:
        self.requests = requests
        self._definition = definition

    def groups(self, prefix: str) -> dict[str, list[Request]]:
        """Abort id -> its request, for those that need computing."""
        return {f"{prefix}-{index}": [request] for index, request in enumerate(self.requests) if request is not None}

    def logprobs(self) -> list[NDArray[np.float32]]:
        """One array per sequence, once all requests are finished. Raises AbortedError where one was aborted."""
        return [self._read(index, request) for index, request in enumerate(self.requests)]

    def _read(self, index: int, request: Request | None) -> NDArray[np.float32]:
        if request is None:
            return np.zeros(0, np.float32)
        if request.finish_reason == "abort":
            raise AbortedError(f"score: token_ids[{index}] was aborted (request {request.request_id})")
        column = {
            "policy_logprobs": request.policy_logprobs,
            "logprobs": request.logprobs,
            "raw": request.raw_logprobs,
        }[self._definition]
        assert column is not None, "raw logprobs are asked for when the request is made"
        return np.array(column, np.float32)


def make_score_requests(
    sequences: Any,
    sampling_params: Any,
    definition: Definition,
    policy: str,
    prompt_lens: Sequence[int] | None,
    *,
    prefix: str,
    limits: AdmissionLimits,
    eos_token_ids: tuple[int, ...],
) -> ScoreRequests:
    """Check a score call and make its requests. Raises ValueError naming the sequence's index, value and bound."""
    if definition not in get_args(Definition):
        raise ValueError(f"definition must be one of {get_args(Definition)}, got {definition!r}")
    items = [sequences] if isinstance(sequences, Rollout) else prompt_list(sequences, "token_ids")
    lens = _prompt_lens(items, prompt_lens)
    if sampling_params is None:
        params = [item.sampling_params if isinstance(item, Rollout) else SamplingParams() for item in items]
    else:
        params = params_list(sampling_params, len(items))
    requests = []
    for index, (item, start, one) in enumerate(zip(items, lens, params, strict=True)):
        name = f"token_ids[{index}]"
        tokens = _tokens_of(item, name)
        if not 1 <= (start or 1) <= len(tokens):
            raise ValueError(f"prompt_lens[{index}] must be in [1, {len(tokens)}], the length of {name}, got {start}")
        effective = _effective_params(one, definition, name, start is not None)
        requests.append(
            _request(f"{prefix}-{index}/0", name, tokens, start or 1, effective, policy, limits, eos_token_ids)
        )
    return ScoreRequests(requests, definition)


def _prompt_lens(items: list[Any], prompt_lens: Sequence[int] | None) -> list[int | None]:
    if prompt_lens is None:
        return [len(item.prompt_token_ids) if isinstance(item, Rollout) else None for item in items]
    if not isinstance(prompt_lens, (Sequence, np.ndarray)):
        raise ValueError(f"prompt_lens must be a sequence of integers, one per sequence, got {prompt_lens!r}")
    if len(prompt_lens) != len(items):
        raise ValueError(f"prompt_lens must have one entry per sequence ({len(items)}), got {len(prompt_lens)}")
    for index, value in enumerate(prompt_lens):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"prompt_lens[{index}] must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"prompt_lens[{index}] must be at least 1, got {value}")
    return [int(value) for value in prompt_lens]


def _tokens_of(item: Any, name: str) -> NDArray[np.int32]:
    if isinstance(item, Rollout):
        return np.concatenate([item.prompt_token_ids, item.token_ids])
    if isinstance(item, str):
        raise ValueError(f"{name} must be token ids or a Rollout: scoring takes no text, got {item!r}")
    return token_ids_of(item, name, None)


def _effective_params(
    params: SamplingParams, definition: Definition, name: str, has_prompt_len: bool
) -> SamplingParams:
    """Only the options that the definition depends on: what does not matter costs no work."""
    if definition == "policy_logprobs":
        return SamplingParams(temperature=params.temperature)
    if definition == "raw":
        return SamplingParams(raw_logprobs=True)
    if (params.uses_penalties or params.min_tokens) and not has_prompt_len:
        raise ValueError(f"{name}: penalties and min_tokens count from the end of the prompt: pass prompt_lens")
    return replace(params, n=1, stop=(), raw_logprobs=False)


def _request(
    request_id: str,
    name: str,
    tokens: NDArray[np.int32],
    start: int,
    params: SamplingParams,
    policy: str,
    limits: AdmissionLimits,
    eos_token_ids: tuple[int, ...],
) -> Request | None:
    try:
        if start == len(tokens):
            limits.check_prompt(tokens, name)
            return None
        request = Request.score(
            request_id, tokens, score_start=start, sampling_params=params, policy=policy, eos_token_ids=eos_token_ids
        )
        limits.check(request)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return request
