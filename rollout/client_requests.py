"""A caller's arguments made into the messages of generate and score calls; what cannot travel is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.client_calls import GenerateCall, ScoreCall
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.prompts import check_ids, params_list, prompt_list
from zerokl.rollout.protocol.records import DistinctParams, prompts_to_arrays, rollouts_to_wire
from zerokl.rollout.resumption import rollout_list
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.token_ids import as_token_ids
from zerokl.rollout.validation import check_int

Kind = TypeVar("Kind", bound=GenerateCall)


def generate_call(
    kind: type[Kind],
    prompts: Any,
    sampling_params: Any,
    request_ids: Sequence[str] | None,
    resume_from: Any,
    fields: Mapping[str, Any],
) -> Kind:
    """A generate or resume call with further `fields`. Raises ValueError for what is none."""
    if resume_from is not None:
        if prompts is not None or sampling_params is not None:
            raise ValueError("prompts and sampling_params must be None with resume_from: a rollout has its own")
        rollouts = rollout_list(resume_from)
        ids = {} if request_ids is None else {"request_ids": check_ids(request_ids, len(rollouts))}
        body, arrays = rollouts_to_wire(rollouts)
        return kind("resume", {**body, **ids, **fields}, arrays)
    listed = prompt_list(prompts, "prompts")
    params, index = _params(sampling_params, len(listed))
    ids = {} if request_ids is None else {"request_ids": check_ids(request_ids, len(listed))}
    checked = [
        prompt if isinstance(prompt, str) else _tokens(prompt, f"prompts[{number}]")
        for number, prompt in enumerate(listed)
    ]
    return kind("generate", {**params, **ids, **fields}, prompts_to_arrays(_encodable(checked)) | index)


def score_call(
    sequences: Any, sampling_params: Any, definition: Any, policy: Any, prompt_lens: Any, fields: Mapping[str, Any]
) -> ScoreCall:
    """A score call with further `fields`. Raises ValueError for what is none."""
    items = [sequences] if isinstance(sequences, Rollout) else prompt_list(sequences, "token_ids")
    if sampling_params is None and any(isinstance(item, Rollout) for item in items):
        default = SamplingParams()
        sampling_params = [item.sampling_params if isinstance(item, Rollout) else default for item in items]
    params, index = _params(sampling_params, len(items))
    tokens = [_tokens(item, f"token_ids[{number}]") for number, item in enumerate(items)]
    arrays: dict[str, NDArray[Any]] = {
        "token_ids": np.concatenate(tokens),
        "lens": np.array([len(one) for one in tokens], np.int32),
        **index,
    }
    lens = _prompt_lens(items, prompt_lens)
    if lens is not None:
        arrays["prompt_lens"] = lens
    return ScoreCall("score", {**params, "definition": definition, "policy": policy, **fields}, arrays)


def _params(given: Any, count: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(fields, arrays) for the parameters of a call."""
    if given is None:
        return {}, {}
    params = DistinctParams()
    places = [params.place(one) for one in params_list(given, count)]
    index = {} if len(params.distinct) == 1 else {"params_index": np.array(places, np.int32)}
    return {"sampling_params": params.distinct}, index


def _tokens(item: Any, name: str) -> NDArray[np.int32]:
    if isinstance(item, Rollout):
        return np.concatenate([item.prompt_token_ids, item.token_ids])
    if isinstance(item, str):
        raise ValueError(f"{name} must be token ids or a Rollout: scoring takes no text, got {item!r}")
    return as_token_ids(name, item)


def _prompt_lens(items: list[Any], given: Any) -> NDArray[np.int32] | None:
    if given is None:
        if not any(isinstance(item, Rollout) for item in items):
            return None
        given = [len(item.prompt_token_ids) if isinstance(item, Rollout) else 1 for item in items]
    if not isinstance(given, (Sequence, np.ndarray)) or len(given) != len(items):
        raise ValueError(f"prompt_lens must have one integer per sequence ({len(items)}), got {given!r:.200}")
    checked = [check_int(f"prompt_lens[{index}]", value, 1, 2**31 - 1) for index, value in enumerate(given)]
    return np.array(checked, np.int32)


def _encodable(prompts: list[Any]) -> list[Any]:
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"prompts[{index}] must be text that UTF-8 can hold: {error}") from None
    return prompts
