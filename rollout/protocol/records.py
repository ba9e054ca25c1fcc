"""Prompts, parameters and rollouts as bodies and arrays of messages, and back. What comes back is checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.mismatch import ReportedTokens
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.protocol.fields import ProtocolError, check_fields
from zerokl.rollout.protocol.schema import ROLLOUT_ARRAYS, ROLLOUT_FIELDS
from zerokl.rollout.routing import RolloutRouting
from zerokl.rollout.sampling_params import SamplingParams

Arrays = Mapping[str, NDArray[Any]]
_PARAMS_FIELDS = dataclasses.fields(SamplingParams)
_OTHER_ARRAYS = ("prompt_token_ids", "raw_logprobs", "loss_mask", "text", "routing_experts", "routing_weights")
_TOKEN_ARRAYS = tuple(name for name in ROLLOUT_ARRAYS if name not in _OTHER_ARRAYS)
_ABSENT = {name: np.zeros(0, kind.dtype) for name, kind in ROLLOUT_ARRAYS.items() if kind.optional}
_SIZES = ("num_prompt_tokens", "num_tokens", "has_raw", "has_mask", "num_text_bytes")
_COPIED_FIELDS = tuple(name for name in ROLLOUT_FIELDS if name not in (*_SIZES, "sampling_params", "routing"))


# -- sampling parameters ----------------------------------------------------------------------------------------------
def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not the default; `logit_bias` as pairs."""
    fields = {
        field.name: getattr(params, field.name)
        for field in _PARAMS_FIELDS
        if getattr(params, field.name) != field.default
    }
    if fields.get("logit_bias") is not None:
        fields["logit_bias"] = [list(pair) for pair in fields["logit_bias"].items()]
    return fields


def params_from_wire(fields: Mapping[str, Any]) -> SamplingParams:
    """Inverse; raises ValueError naming field, value and bound."""
    options = dict(fields)
    bias = options.get("logit_bias")
    if bias is not None:
        if not isinstance(bias, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in bias):
            raise ValueError(f"logit_bias must be a list of [token id, value], got {bias!r:.200}")
        try:
            options["logit_bias"] = dict(bias)
        except TypeError:
            raise ValueError(f"logit_bias must have integers as token ids, got {bias!r:.200}") from None
    return SamplingParams.from_dict(options)


class DistinctParams:
    """The distinct ones among many parameters, and the place of each among those."""

    def __init__(self) -> None:
        self.distinct: list[dict[str, Any]] = []
        self._places: dict[int, int] = {}
        self._seen: list[SamplingParams] = []

    def place(self, params: SamplingParams) -> int:
        """Index into `distinct`; equal objects that are not the same one may be listed twice."""
        place = self._places.get(id(params))
        if place is None:
            place = self._places[id(params)] = len(self.distinct)
            self.distinct.append(params_to_wire(params))
            self._seen.append(params)  # keeps its id from being given to another
        return place


def params_of_message(body: Mapping[str, Any], arrays: Arrays, count: int) -> list[SamplingParams] | None:
    """Parameters for `count` prompts: one list entry for all, or by `params_index`; None where there are none."""
    if "sampling_params" not in body:
        return None
    distinct = [params_from_wire(fields) for fields in body["sampling_params"]]
    index = arrays.get("params_index")
    if index is None:
        if len(distinct) != 1:
            raise ValueError(f"sampling_params must have one entry without params_index, got {len(distinct)}")
        return distinct * count
    if len(index) != count:
        raise ValueError(f"params_index must have an entry per prompt ({count}), got {len(index)}")
    return [distinct[place] for place in _places("params_index", index.tolist(), len(distinct))]


# -- prompts ----------------------------------------------------------------------------------------------------------
def prompts_to_arrays(prompts: Iterable[str | NDArray[np.int32]]) -> dict[str, NDArray[Any]]:
    """prompt_lens[i] > 0: so many of `prompt_tokens`; < 0: so many bytes of `prompt_text`, which is UTF-8."""
    tokens: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
    texts: list[bytes] = []
    lens = []
    for prompt in prompts:
        if isinstance(prompt, str):
            texts.append(prompt.encode())
            lens.append(-len(texts[-1]))
        else:
            tokens.append(prompt)
            lens.append(len(prompt))
    return {
        "prompt_lens": np.array(lens, np.int32),
        "prompt_tokens": np.concatenate(tokens),
        "prompt_text": np.frombuffer(b"".join(texts), np.uint8),
    }


def prompts_of_arrays(arrays: Arrays) -> list[str | NDArray[np.int32]]:
    """Inverse; raises ValueError where lengths and arrays do not match, or text is not UTF-8."""
    tokens, text = arrays["prompt_tokens"], arrays["prompt_text"].tobytes()
    lens = arrays["prompt_lens"].tolist()
    taken = sum([size for size in lens if size > 0]), -sum([size for size in lens if size < 0])
    if taken != (len(tokens), len(text)):
        raise ValueError(f"prompt_lens take {taken} tokens and bytes of text, got {(len(tokens), len(text))}")
    prompts: list[str | NDArray[np.int32]] = []
    token, byte = 0, 0
    for size in lens:
        if size > 0:
            prompts.append(tokens[token : token + size])
            token += size
        else:
            prompts.append(_text(text[byte : byte - size]))
            byte -= size
    return prompts


def split(name: str, array: NDArray[Any], lens: Sequence[int]) -> list[NDArray[Any]]:
    """Copies of the consecutive parts of an array; raises ValueError unless `lens`, all >= 0, add up to its length."""
    if (lens and min(lens) < 0) or sum(lens) != len(array):
        raise ValueError(f"lens must be >= 0 and add up to the {len(array)} entries of {name}, got {sum(lens)}")
    parts, start = [], 0
    for size in lens:
        parts.append(array[start : start + size].copy())
        start += size
    return parts


# -- what a trainer reports -------------------------------------------------------------------------------------------
def reported_to_arrays(tokens: ReportedTokens) -> dict[str, NDArray[Any]]:
    """Arrays of a `report_trainer_logprobs` message; `ReportedTokens(**arrays)` checks them on the way back."""
    return {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}


# -- rollouts ---------------------------------------------------------------------------------------------------------
def rollouts_to_wire(rollouts: Sequence[Rollout]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(fields of the body, arrays) of some rollouts."""
    params = DistinctParams()
    texts = [None if rollout.text is None else rollout.text.encode("utf-8", "replace") for rollout in rollouts]
    rows = []
    for rollout, text in zip(rollouts, texts, strict=True):
        row: dict[str, Any] = {
            "num_prompt_tokens": len(rollout.prompt_token_ids),
            "num_tokens": len(rollout.token_ids),
            "has_raw": rollout.raw_logprobs is not None,
            "has_mask": rollout.loss_mask is not None,
            "sampling_params": params.place(rollout.sampling_params),
            **{name: getattr(rollout, name) for name in _COPIED_FIELDS},
        }
        if row["stop_reason"] is None:
            del row["stop_reason"]
        if text is not None:
            row["num_text_bytes"] = len(text)
        if rollout.routing is not None:
            experts = rollout.routing.experts
            row["routing"] = [*experts.shape, rollout.routing.start, 8 * experts.itemsize]
        rows.append(row)
    parts: dict[str, list[NDArray[Any]]] = {
        name: [array for rollout in rollouts if (array := getattr(rollout, name)) is not None]
        for name in (*_TOKEN_ARRAYS, "prompt_token_ids", "raw_logprobs", "loss_mask")
    }
    for name in ("experts", "weights"):
        given = [getattr(rollout.routing, name).reshape(-1) for rollout in rollouts if rollout.routing is not None]
        parts[f"routing_{name}"] = given
    parts["text"] = [np.frombuffer(text, np.uint8) for text in texts if text]
    arrays = {name: _join(parts[name], kind.dtype) for name, kind in ROLLOUT_ARRAYS.items() if parts[name]}
    return {"rollouts": rows, "sampling_params": params.distinct}, arrays


def rollouts_from_wire(body: Mapping[str, Any], arrays: Arrays) -> list[Rollout]:
    """Inverse; the arrays of a rollout are its own. Raises ValueError for anything else than what `rollouts_to_wire`
    gives.
    """
    rows, arrays = body["rollouts"], {**_ABSENT, **arrays}
    for index, row in enumerate(rows):
        check_fields(f"rollouts[{index}]", ROLLOUT_FIELDS, row)
    params = [params_from_wire(fields) for fields in body["sampling_params"]]
    _places("sampling_params", [row["sampling_params"] for row in rows], len(params))
    sizes = [row["num_tokens"] for row in rows]
    columns: dict[str, Any] = {name: split(name, arrays[name], sizes) for name in _TOKEN_ARRAYS}
    prompts = split("prompt_token_ids", arrays["prompt_token_ids"], [row["num_prompt_tokens"] for row in rows])
    raw = split("raw_logprobs", arrays["raw_logprobs"], [row["num_tokens"] * row["has_raw"] for row in rows])
    masks = split("loss_mask", arrays["loss_mask"], [row["num_tokens"] * row["has_mask"] for row in rows])
    texts = split("text", arrays["text"], [row.get("num_text_bytes", 0) for row in rows])
    routings = _routings(rows, arrays)
    return [
        Rollout(
            prompt_token_ids=prompts[index],
            raw_logprobs=raw[index] if row["has_raw"] else None,
            loss_mask=masks[index].astype(bool) if row["has_mask"] else None,
            text=_text(texts[index].tobytes()) if "num_text_bytes" in row else None,
            sampling_params=params[row["sampling_params"]],
            routing=routings[index],
            **{name: columns[name][index] for name in _TOKEN_ARRAYS},
            **{name: row.get(name) for name in _COPIED_FIELDS},
        )
        for index, row in enumerate(rows)
    ]


def _routings(rows: Sequence[Mapping[str, Any]], arrays: Arrays) -> list[RolloutRouting | None]:
    forms = [row.get("routing", [0, 0, 0, 0, 16]) for row in rows]
    if any(len(form) != 5 or form[4] not in (16, 32) for form in forms):
        raise ValueError("routing must be [positions, mixtures, experts per token, first position, 16 or 32]")
    sizes = [math.prod(form[:3]) for form in forms]
    experts = split("routing_experts", arrays["routing_experts"], sizes)
    weights = split("routing_weights", arrays["routing_weights"], sizes)
    return [
        RolloutRouting(
            experts=experts[index].astype(f"int{form[4]}").reshape(form[:3]),
            weights=weights[index].reshape(form[:3]),
            start=form[3],
        )
        if "routing" in row
        else None
        for index, (row, form) in enumerate(zip(rows, forms, strict=True))
    ]


def _join(arrays: list[NDArray[Any]], dtype: str) -> NDArray[Any]:
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return joined.astype(dtype, copy=False)


def _places(name: str, places: list[int], count: int) -> list[int]:
    if places and not 0 <= min(places) <= max(places) < count:
        raise ValueError(f"{name} must be in [0, {count}), got {min(places)} to {max(places)}")
    return places


def _text(encoded: bytes) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"text must be UTF-8: {error}") from None
