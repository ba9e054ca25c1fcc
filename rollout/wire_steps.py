"""A step's order and its result on the wire: tables of their arrays, in the order in which they travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zerokl.kernels.ops import SampleResult, SamplingBatch, StepInputs
from zerokl.rollout.step_order import BlockMove, RoutedTokens, StepOrder, StepResult
from zerokl.rollout.wire_arrays import ArrayTable, Payload, WireError, check_present, check_types, pack_arrays

_I32, _U32, _U64, _F32 = (np.dtype(code) for code in ("int32", "uint32", "uint64", "float32"))

STEP_ARRAYS: ArrayTable = {
    "token_ids": (_I32, 1),
    "positions": (_I32, 1),
    "slot_mapping": (_I32, 1),
    "seq_starts": (_I32, 1),
    "context_lens": (_I32, 1),
    "block_tables": (_I32, 2),
    "logit_rows": (_I32, 1),
    "routing": (_I32, 3),
    "routing_weights": (_F32, 3),
    "token_rows": (_I32, 1),
}
OPTIONAL_ARRAYS = ("routing", "routing_weights", "token_rows")
"""Those of STEP_ARRAYS that a step may lack."""
SAMPLING_ARRAYS: ArrayTable = {
    "temperature": (_F32, 1),
    "top_k": (_I32, 1),
    "top_p": (_F32, 1),
    "min_p": (_F32, 1),
    "repetition_penalty": (_F32, 1),
    "presence_penalty": (_F32, 1),
    "frequency_penalty": (_F32, 1),
    "seed": (_U64, 1),
    "sample_index": (_U32, 1),
    "position": (_U32, 1),
    "forced": (_I32, 1),
    "history_start": (_I32, 1),
    "history_token": (_I32, 1),
    "history_count": (_I32, 1),
    "bias_start": (_I32, 1),
    "bias_token": (_I32, 1),
    "bias_value": (_F32, 1),
}
MOVE_ARRAYS: ArrayTable = {"blocks": (_I32, 1)}
LOAD_ARRAYS: ArrayTable = {"expert_tokens": (_I32, 2)}
ROUTED_ARRAYS: ArrayTable = {"experts": (_I32, 3), "weights": (_F32, 3)}
SAMPLE_ARRAYS: ArrayTable = {
    "tokens": (_I32, 1),
    "logprobs": (_F32, 1),
    "policy_logprobs": (_F32, 1),
    "entropy": (_F32, 1),
    "raw_logprobs": (_F32, 1),
}


def order_fields(order: StepOrder, chunks: list[Any]) -> list[Any]:
    """The order as a message's body; appends its arrays to `chunks`."""
    inputs, sampling = order.inputs, order.inputs.sampling
    shapes = pack_arrays(STEP_ARRAYS, inputs, chunks), pack_arrays(SAMPLING_ARRAYS, sampling, chunks)
    moves = (_move_fields(order.sends, chunks), _move_fields(order.receives, chunks))
    return [inputs.step, inputs.policy, sampling.want_raw, order.has_moves, *shapes, *moves]


def read_order(body: list[Any], payload: Payload) -> StepOrder:
    """Inverse of `order_fields`. Raises WireError for anything else."""
    check_types("Execute", body, (int, str, bool, bool, list, list, list, list))
    step, policy, want_raw, has_moves, step_shapes, sampling_shapes, *moves = body
    arrays: dict[str, Any] = payload.take(STEP_ARRAYS, step_shapes)
    options: dict[str, Any] = payload.take(SAMPLING_ARRAYS, sampling_shapes)
    check_present({name: array for name, array in arrays.items() if name not in OPTIONAL_ARRAYS}, options)
    sampling = SamplingBatch(**options, want_raw=want_raw)
    inputs = StepInputs(**arrays, sampling=sampling, step=step, policy=policy)
    sends, receives = (tuple(_move(one, payload) for one in some) for some in moves)
    return StepOrder(inputs=inputs, sends=sends, receives=receives, has_moves=has_moves)


def _move_fields(moves: Sequence[BlockMove], chunks: list[Any]) -> list[Any]:
    return [(move.peer, pack_arrays(MOVE_ARRAYS, move, chunks)) for move in moves]


def _move(fields_of_move: Any, payload: Payload) -> BlockMove:
    if not isinstance(fields_of_move, list):
        raise WireError(f"Execute: {fields_of_move!r:.80} is no move of blocks")
    check_types("BlockMove", fields_of_move, (int, list))
    arrays: dict[str, Any] = payload.take(MOVE_ARRAYS, fields_of_move[1])
    check_present(arrays)
    return BlockMove(peer=fields_of_move[0], **arrays)


def result_fields(result: StepResult, chunks: list[Any]) -> list[Any]:
    """The result as a message's body; appends its arrays to `chunks`."""
    return [
        pack_arrays(SAMPLE_ARRAYS, result.sampled, chunks),
        pack_arrays(LOAD_ARRAYS, result, chunks),
        None if result.routed is None else pack_arrays(ROUTED_ARRAYS, result.routed, chunks),
    ]


def read_result(body: list[Any], payload: Payload) -> StepResult:
    """Inverse of `result_fields`. Raises WireError for anything else."""
    if len(body) != 3 or not (body[2] is None or isinstance(body[2], list)):
        raise WireError(f"Sampled: expected the shapes of three groups of arrays, got {body!r:.200}")
    sampled: dict[str, Any] = payload.take(SAMPLE_ARRAYS, body[0])
    check_present({name: array for name, array in sampled.items() if name != "raw_logprobs"})
    load: dict[str, Any] = payload.take(LOAD_ARRAYS, body[1])
    routed: dict[str, Any] | None = None if body[2] is None else payload.take(ROUTED_ARRAYS, body[2])
    if routed is not None:
        check_present(routed)
    return StepResult(
        sampled=SampleResult(**sampled), **load, routed=None if routed is None else RoutedTokens(**routed)
    )
