"""A caller's prompts and sampling parameters, checked as a whole and turned into requests. Nothing is queued here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.request import Request, as_token_ids, derive_seed
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.text import Tokenizer

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
"""Text, or token ids."""


def is_single_prompt(prompts: Any) -> bool:
    """Whether `prompts` is one text or one sequence of token ids rather than a sequence of those."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1 and prompts.dtype != object
    return (
        isinstance(prompts, Sequence)
        and len(prompts) > 0
        and np.isscalar(prompts[0])
        and not isinstance(prompts[0], str)
    )


def prompt_list(prompts: Any, name: str) -> list[Any]:
    """`prompts` as a list; `name` stands in the error when there is none."""
    if is_single_prompt(prompts):
        return [prompts]
    if not isinstance(prompts, (Sequence, np.ndarray)) or len(prompts) == 0:
        raise ValueError(f"{name} must be one prompt or a non-empty sequence of prompts, got {prompts!r}")
    return list(prompts)


def params_list(sampling_params: Any, num_prompts: int) -> list[SamplingParams]:
    """One SamplingParams per prompt, from None (the defaults), one for all, or a sequence with one each."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    if not isinstance(sampling_params, Sequence) or isinstance(sampling_params, str):
        raise ValueError(f"sampling_params must be SamplingParams or a sequence of them, got {sampling_params!r}")
    if len(sampling_params) != num_prompts:
        raise ValueError(f"sampling_params must have one entry per prompt ({num_prompts}), got {len(sampling_params)}")
    for index, params in enumerate(sampling_params):
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params[{index}] must be SamplingParams, got {params!r}")
    return list(sampling_params)


def token_ids_of(prompt: Any, name: str, tokenizer: Tokenizer | None) -> NDArray[np.int32]:
    """Token ids [P] of one prompt; `name` stands in the error."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"{name} is text, but the engine has no tokenizer: set EngineConfig.tokenizer or pass token ids"
            )
        ids = tokenizer.encode(prompt)
        if not len(ids):
            raise ValueError(f"{name} must have at least one token, got {prompt!r}")
        return ids
    try:
        array = np.asarray(prompt)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be text or a flat sequence of token ids, got {prompt!r}") from None
    return as_token_ids(name, array)


class RequestMaker:
    """Makes the requests of generate calls: knows what the model takes and where seeds come from."""

    def __init__(
        self, limits: AdmissionLimits, tokenizer: Tokenizer | None, eos_token_ids: tuple[int, ...], engine_seed: int
    ) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._engine_seed = engine_seed

    def check(self, prompts: Any, sampling_params: Any) -> list[tuple[NDArray[np.int32], SamplingParams]]:
        """(token ids, parameters) of each prompt. Raises ValueError naming prompt index, field, value and bound."""
        listed = prompt_list(prompts, "prompts")
        params = params_list(sampling_params, len(listed))
        checked = []
        for index, (prompt, one) in enumerate(zip(listed, params, strict=True)):
            name = f"prompts[{index}]"
            if one.stop and self._tokenizer is None:
                raise ValueError(f"{name}: stop={one.stop!r} needs a tokenizer: set EngineConfig.tokenizer")
            checked.append((token_ids_of(prompt, name, self._tokenizer), one))
            self._check_fits(name, *checked[-1])
        return checked

    def make(
        self, checked: list[tuple[NDArray[np.int32], SamplingParams]], ids: Sequence[str], call_number: int
    ) -> dict[str, list[Request]]:
        """Id -> the n requests of each prompt."""
        groups: dict[str, list[Request]] = {}
        for index, ((tokens, params), name) in enumerate(zip(checked, ids, strict=True)):
            seed = derive_seed(self._engine_seed, call_number, index) if params.seed is None else params.seed
            groups[name] = [self._request(name, tokens, params, seed, sample, index) for sample in range(params.n)]
        return groups

    def _check_fits(self, name: str, tokens: NDArray[np.int32], params: SamplingParams) -> None:
        try:
            self._limits.check(self._request(name, tokens, params, 0, 0, 0))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _request(
        self, name: str, tokens: NDArray[np.int32], params: SamplingParams, seed: int, sample: int, index: int
    ) -> Request:
        return Request.generate(
            f"{name}/{sample}",
            tokens,
            params,
            seed=seed,
            sample_index=sample,
            prompt_index=index,
            group_id=name if params.n > 1 else None,
            eos_token_ids=self._eos_token_ids,
        )


def check_ids(given: Sequence[str] | None, default_prefix: str, count: int) -> list[str]:
    """One id per prompt: those given, or `<prefix>-<index>`. Raises ValueError for a wrong number or a repeated id."""
    if given is None:
        return [f"{default_prefix}-{index}" for index in range(count)]
    if isinstance(given, str) or len(given) != count or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"request_ids must be {count} non-empty strings, one per prompt, got {given!r}")
    if len(set(given)) != count:
        raise ValueError(f"request_ids must not repeat, got {given!r}")
    return list(given)
