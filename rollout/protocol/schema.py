"""Every kind of message: its fields and arrays. The tables that both sides check what they receive against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.protocol.fields import (
    Bytes,
    Field,
    Flag,
    Integer,
    ListOf,
    Map,
    Number,
    OneOf,
    Optional,
    Plain,
    ProtocolError,
    Text,
    check_fields,
)

SESSION_BYTES = 16
MAX_SECONDS = 1e6


@dataclass(frozen=True)
class ArrayKind:
    """dtype and number of dimensions of an array; `optional` ones may be left out."""

    dtype: str
    ndim: int = 1
    optional: bool = False

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """`dtype` as NumPy's own; comparing with its name takes NumPy a microsecond."""
        return np.dtype(self.dtype)


@dataclass(frozen=True)
class MessageKind:
    """What a kind of message holds. `call`: whether it bears a call's number, none, or either."""

    summary: str
    call: Literal["yes", "no"] = "yes"
    body: Mapping[str, Field] = field(default_factory=dict)
    arrays: Mapping[str, ArrayKind] = field(default_factory=dict)

    def check_call(self, kind: str, call: int) -> None:
        """Raise ProtocolError for a number where none belongs, or none where one does."""
        if (call > 0) != (self.call == "yes"):
            raise ProtocolError(f"{kind}: call must be {'from 1 up' if self.call == 'yes' else '0'}, got {call}")

    def check_body(self, kind: str, body: Any) -> None:
        """Raise ProtocolError unless the body has this kind's fields."""
        check_fields(kind, self.body, body)

    def check_arrays(self, kind: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise ProtocolError unless the arrays are this kind's."""
        for name in arrays:
            if name not in self.arrays:
                raise ProtocolError(f"{kind} has no array {name!r:.40}")
        for name, expected in self.arrays.items():
            array = arrays.get(name)
            if array is None:
                if not expected.optional:
                    raise ProtocolError(f"{kind}: array {name} is missing")
            elif array.dtype != expected.numpy_dtype or array.ndim != expected.ndim:
                raise ProtocolError(
                    f"{kind}: array {name} must be {expected.dtype} of {expected.ndim} dimensions, "
                    f"got {array.dtype.name} of {array.ndim}"
                )


Schema = Mapping[str, MessageKind]

_I32, _I64, _F32 = ArrayKind("int32"), ArrayKind("int64"), ArrayKind("float32")
_TEXTS = ListOf(Text())
_DEADLINE = {"deadline": Optional(Number(MAX_SECONDS))}
_CALL = _DEADLINE | {"request_ids": Optional(_TEXTS), "stream": Optional(Integer(1, 2**20))}
_PARAMS = {"sampling_params": Optional(ListOf(Map()))}
_PARAMS_INDEX = {"params_index": ArrayKind("int32", optional=True)}
_PIECE = {"first": Integer(), "total": Optional(Integer(1))}
_TAGS = {"tags": Optional(ListOf(OneOf(("weights", "kv_cache"))))}

ROLLOUT_ARRAYS: Mapping[str, ArrayKind] = {
    "prompt_token_ids": _I32,
    "token_ids": _I32,
    "logprobs": _F32,
    "policy_logprobs": _F32,
    "entropy": _F32,
    "raw_logprobs": ArrayKind("float32", optional=True),
    "policy_versions": _I64,
    "steps": _I64,
    "phases": ArrayKind("uint8"),
    "cached_lens": _I32,
    "ranks": ArrayKind("int16"),
    "loss_mask": ArrayKind("uint8", optional=True),
    "text": ArrayKind("uint8", optional=True),
    "routing_experts": ArrayKind("int32", optional=True),
    "routing_weights": ArrayKind("float32", optional=True),
}
"""Arrays of rollouts, one rollout's after another's; `raw_logprobs`, `loss_mask` (0 or 1), `text` and routing of those
that have them, left out where none has."""
ROLLOUT_FIELDS: Mapping[str, Field] = {
    "num_prompt_tokens": Integer(),
    "num_tokens": Integer(),
    "has_raw": Flag(),
    "has_mask": Flag(),
    "num_text_bytes": Optional(Integer()),
    "finish_reason": OneOf(("stop", "length", "abort")),
    "stop_reason": Optional(Plain()),
    "num_cached_tokens": Integer(),
    "num_preemptions": Integer(),
    "num_restarts": Integer(),
    "num_kept_updates": Integer(),
    "inexact": Flag(),
    "seed": Integer(0, 2**64 - 1),
    "sample_index": Integer(),
    "prompt_index": Integer(),
    "sampling_params": Integer(),
    "routing": Optional(ListOf(Integer(0, 2**31))),
    "logprobs_definition": OneOf(("processed_logprobs",)),
}
"""Of each rollout; `sampling_params` is an index into the message's list."""

CLIENT_MESSAGES: Schema = {
    "hello": MessageKind(
        "First message of every connection. With `session` it goes on with an earlier one.",
        "no",
        {
            "versions": ListOf(Integer()),
            "name": Text(),
            "session": Optional(Bytes(SESSION_BYTES)),
        },
    ),
    "ping": MessageKind("Says that the client lives and what it has received.", "no"),
    "bye": MessageKind("Ends the session; its calls are aborted.", "no"),
    "cancel": MessageKind("Gives up a call: requests are aborted, an update that waits is called off.", "yes"),
    "generate": MessageKind(
        "Samples from prompts.",
        "yes",
        _CALL | _PARAMS,
        {
            "prompt_lens": _I32,
            "prompt_tokens": _I32,
            "prompt_text": ArrayKind("uint8"),
            **_PARAMS_INDEX,
        },
    ),
    "resume": MessageKind(
        "Continues rollouts that an abort cut off.",
        "yes",
        _CALL | {"rollouts": ListOf(Map()), "sampling_params": ListOf(Map())},
        ROLLOUT_ARRAYS,
    ),
    "score": MessageKind(
        "Rates given tokens.",
        "yes",
        _DEADLINE | _PARAMS | {"definition": OneOf(("policy_logprobs", "logprobs", "raw")), "policy": Text()},
        {"token_ids": _I32, "lens": _I32, "prompt_lens": ArrayKind("int32", optional=True), **_PARAMS_INDEX},
    ),
    "abort": MessageKind("Ends requests by id.", "yes", {"ids": _TEXTS}),
    "abort_all": MessageKind("Ends all requests of all clients."),
    "upload": MessageKind(
        "Pieces of tensors for a later update_weights; `pieces` are [name, dtype, shape, first byte, bytes].",
        "yes",
        {"upload": Integer(1), "pieces": ListOf(Plain())},
        {"data": ArrayKind("uint8")},
    ),
    "update_weights": MessageKind(
        "Replaces the policy's weights.",
        "yes",
        _DEADLINE
        | {
            "source": OneOf(("folder", "file", "shared", "shards", "device", "upload")),
            "path": Optional(Text()),
            "published": Optional(Bytes()),
            "upload": Optional(Integer(1)),
            "version": Optional(Integer()),
            "mode": Text(),
            "kv": Optional(Text()),
            "max_staleness": Optional(Integer()),
            "on_stale": Text(),
            "allow_rewind": Flag(),
            "bucket_bytes": Optional(Integer(1)),
        },
    ),
    "new_session_seed": MessageKind(
        "Gives a seed for a conversation, which no other one gets; the result is an integer in [0, 2^64)."
    ),
    "get_weight_version": MessageKind("Version of the live weights or of a pinned set.", "yes", {"name": Text()}),
    "pin_weights": MessageKind("Keeps the live weights under a name.", "yes", _DEADLINE | {"name": Text()}),
    "drop_weights": MessageKind("Forgets a pinned set.", "yes", _DEADLINE | {"name": Text()}),
    "sleep": MessageKind(
        "Frees the worker's memory.",
        "yes",
        _DEADLINE | _TAGS | {"level": Integer(), "spill_dir": Optional(Text())},
    ),
    "wake_up": MessageKind("Brings memory back.", "yes", _DEADLINE | _TAGS),
    "reset_prefix_cache": MessageKind("Forgets all cached prefixes."),
    "pause_generation": MessageKind(
        "Runs no requests until resume_generation.", "yes", _DEADLINE | {"mode": OneOf(("abort", "wait", "keep"))}
    ),
    "resume_generation": MessageKind("Ends a pause."),
    "health": MessageKind("State of engine and server."),
    "metrics": MessageKind("Counters of engine and server."),
    "telemetry": MessageKind("All that can be observed of engine and server: metrics, health, histograms, mismatch."),
    "report_trainer_logprobs": MessageKind(
        "Compares the trainer's logprobs of T tokens with the rollouts' `policy_logprobs`. `inexact` is 1 for tokens "
        "of rollouts that are inexact or kept keys and values through an update. `version`: of the weights that the "
        "trainer's forward had, by default the newest. The result is the report and whether it alarmed.",
        "yes",
        {"version": Optional(Integer())},
        {
            "trainer_logprobs": _F32,
            "rollout_logprobs": _F32,
            "policy_versions": _I64,
            "inexact": ArrayKind("uint8"),
        },
    ),
    "describe_ranks": MessageKind("Facts of each rank's worker."),
    "expert_load": MessageKind("How often tokens chose each expert.", "yes", {"reset": Flag()}),
    "rebalance_experts": MessageKind("Moves experts between ranks by their load."),
    "describe_engine": MessageKind("Configuration of engine and model; the tokenizer, if it has one."),
}
"""What a server takes."""

SERVER_MESSAGES: Schema = {
    "welcome": MessageKind(
        "Answers hello. `resumed`: the session is the one asked for; what was not received follows.",
        "no",
        {
            "version": Integer(),
            "session": Bytes(SESSION_BYTES),
            "resumed": Flag(),
            "heartbeat": Number(MAX_SECONDS),
            "limits": Map(),
            "server": Text(),
        },
    ),
    "refused": MessageKind(
        "Answers what is no message, or comes before hello.", "no", {"code": Text(), "text": Text()}
    ),
    "pong": MessageKind("Answers ping.", "no"),
    "room": MessageKind("Calls that were answered by the error `BusyError` may be made again.", "no"),
    "closing": MessageKind("The server ends soon and takes no further calls.", "no"),
    "tokens": MessageKind(
        "New tokens of calls that asked for a stream; row k is `counts[k]` tokens of rollout `indexes[k]` of call "
        "`calls[k]` from token `starts[k]` on.",
        "no",
        {},
        {
            "calls": _I64,
            "indexes": _I32,
            "starts": _I32,
            "counts": _I32,
            "restarts": _I32,
            "token_ids": _I32,
            "logprobs": _F32,
            "policy_logprobs": _F32,
            "policy_versions": _I64,
        },
    ),
    "rollouts": MessageKind(
        "Finished rollouts of a call, from number `first` on; the message with `total`, their number, ends the call.",
        "yes",
        _PIECE | {"rollouts": ListOf(Map()), "sampling_params": ListOf(Map())},
        ROLLOUT_ARRAYS,
    ),
    "scores": MessageKind(
        "Logprobs of a score call's sequences, from number `first` on; the message with `total`, their number, ends "
        "the call.",
        "yes",
        _PIECE,
        {"lens": _I32, "logprobs": _F32},
    ),
    "result": MessageKind(
        "Ends a call that went well.",
        "yes",
        {"value": Plain()},
        {"data": ArrayKind("uint8", optional=True)},
    ),
    "error": MessageKind("Ends a call that did not.", "yes", {"error": Text(), "text": Text()}),
}
"""What a client takes."""
