"""What a caller may give as prompts, sampling parameters and ids: each form checked and made into a plain list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.text import Tokenizer
from zerokl.rollout.token_ids import as_token_ids

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
    scalar = isinstance(prompts, np.ndarray) and prompts.ndim == 0
    if scalar or not isinstance(prompts, (Sequence, np.ndarray)) or len(prompts) == 0:
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
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} must be text that UTF-8 can hold: {error}") from None
        ids = tokenizer.encode(prompt)
        if not len(ids):
            raise ValueError(f"{name} must have at least one token, got {prompt!r}")
        return ids
    try:
        array = np.asarray(prompt)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be text or a flat sequence of token ids, got {prompt!r}") from None
    return as_token_ids(name, array)


def check_ids(given: Sequence[str], count: int) -> list[str]:
    """The ids given for `count` prompts. Raises ValueError for a wrong number, an empty or a repeated one."""
    listed = isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str)
    if not listed or len(given) != count or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"request_ids must be {count} non-empty strings, one per prompt, got {given!r}")
    if len(set(given)) != count:
        raise ValueError(f"request_ids must not repeat, got {given!r}")
    return list(given)
