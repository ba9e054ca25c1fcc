"""The form of messages on the wire: frames for a ZMQ socket. Pure: no sockets, no processes.

A message is a msgpack header [protocol version, sequence number, kind, body], followed, if it carries arrays, by one
frame with their raw bytes in the order of the tables below, each on an 8-byte boundary. (One frame: a message of 25
frames takes four times as long to pass a socket.) A reply bears the sequence number of its request.

Arrays that come out of `decode` are writable and share the frame's memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult, SamplingBatch, StepInputs
from zerokl.rollout.messages import (
    BringBack,
    Close,
    Commit,
    Configure,
    Describe,
    Discard,
    Done,
    Drop,
    Execute,
    Facts,
    Failed,
    Hello,
    Message,
    Pin,
    PutAway,
    Sampled,
    Stage,
)
from zerokl.rollout.step_order import BlockMove, RoutedTokens, StepOrder, StepResult
from zerokl.rollout.worker import FolderWeights, SharedWeights
from zerokl.weight_sync.disk import PublishedFile
from zerokl.weight_sync.errors import ManifestError
from zerokl.weight_sync.manifest import PublishedWeights
from zerokl.weight_sync.shards import PublishedShards

PROTOCOL_VERSION = 2
"""Raised with every change of the messages or of the tables below; any other is refused."""

_ALIGNMENT = 8
"""Bytes; the largest element size of the tables."""


class WireError(ValueError):
    """Frames that are no message of this protocol version."""


_PLAIN: Mapping[type[Any], tuple[type[Any], ...]] = {
    Hello: (int,),
    Configure: (dict,),
    Commit: (),
    Discard: (),
    Pin: (str,),
    Drop: (str,),
    PutAway: (bool, bool, int, str),
    BringBack: (bool, bool),
    Describe: (),
    Close: (),
    Done: (),
    Facts: (dict,),
    Failed: (str, str, str),
}
"""Messages whose body is the list of their fields, with the fields' types."""

_KINDS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in (*_PLAIN, Execute, Stage, Sampled)}

_I32, _U32, _U64, _F32 = (np.dtype(code) for code in ("int32", "uint32", "uint64", "float32"))

ArrayTable = Mapping[str, tuple["np.dtype[Any]", int]]
"""Field of a dataclass -> dtype and number of dimensions."""

STEP_ARRAYS: ArrayTable = {
    "token_ids": (_I32, 1),
    "positions": (_I32, 1),
    "slot_mapping": (_I32, 1),
    "seq_starts": (_I32, 1),
    "context_lens": (_I32, 1),
    "block_tables": (_I32, 2),
    "logit_rows": (_I32, 1),
    "routing": (_I32, 3),
}
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


def encode(sequence: int, message: Message) -> list[bytes]:
    """The message as one frame or two."""
    chunks: list[Any] = []
    body: list[Any]
    if isinstance(message, Execute):
        body = _order_fields(message.order, chunks)
    elif isinstance(message, Sampled):
        body = _result_fields(message.result, chunks)
    elif isinstance(message, Stage):
        body = [*_source_fields(message.source), message.version]
    else:
        body = [getattr(message, field.name) for field in fields(message)]
    header: bytes = msgpack.packb((PROTOCOL_VERSION, sequence, type(message).__name__, body))
    return [header, b"".join(chunks)] if chunks else [header]


def decode(frames: Sequence[bytes]) -> tuple[int, Message]:
    """Inverse of `encode`: (sequence number, message). Raises WireError for anything else than its output."""
    if not 1 <= len(frames) <= 2:
        raise WireError(f"expected 1 or 2 frames, got {len(frames)}")
    try:
        header = msgpack.unpackb(frames[0])
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"the header is not msgpack: {error}") from error
    if not isinstance(header, list) or not header or header[0] != PROTOCOL_VERSION:
        version = header[0] if isinstance(header, list) and header else header
        raise WireError(f"protocol version {version!r:.80} is not {PROTOCOL_VERSION}")
    _check_types("header", header, (int, int, str, list))
    _, sequence, kind, body = header
    if kind not in _KINDS:
        raise WireError(f"unknown message kind {kind!r:.80}")
    return sequence, _message(_KINDS[kind], body, _Payload(frames[1] if len(frames) == 2 else b""))


class _Payload:
    """Reads arrays off the second frame, one after the other."""

    def __init__(self, frame: bytes) -> None:
        self._bytes = bytearray(frame)  # writable: the kernels' bindings take no read-only arrays
        self._offset = 0

    def take(self, table: ArrayTable, shapes: Any) -> dict[str, NDArray[Any] | None]:
        """The table's arrays; None where the shape is None."""
        if not isinstance(shapes, list) or len(shapes) != len(table):
            raise WireError(f"expected {len(table)} shapes, got {shapes!r:.200}")
        return {
            name: None if shape is None else self._array(name, dtype, ndim, shape)
            for (name, (dtype, ndim)), shape in zip(table.items(), shapes, strict=True)
        }

    def finish(self) -> None:
        """Raise WireError unless the frame is used up."""
        if self._offset != len(self._bytes):
            raise WireError(f"the arrays take {self._offset} bytes, the frame has {len(self._bytes)}")

    def _array(self, name: str, dtype: np.dtype[Any], ndim: int, shape: Any) -> NDArray[Any]:
        if not isinstance(shape, list) or len(shape) != ndim or not all(type(n) is int and n >= 0 for n in shape):
            raise WireError(f"{name}: {shape!r:.80} is not a shape of {ndim} dimensions")
        nbytes = math.prod(shape) * dtype.itemsize
        if self._offset + nbytes > len(self._bytes):
            raise WireError(f"{name}: shape {shape} needs {nbytes} bytes, {len(self._bytes) - self._offset} are left")
        if not nbytes:
            return np.empty(shape, dtype)
        array = np.frombuffer(self._bytes, dtype, nbytes // dtype.itemsize, self._offset)
        self._offset += nbytes + -nbytes % _ALIGNMENT
        return array if ndim == 1 else array.reshape(shape)


def _pack(table: ArrayTable, owner: object, chunks: list[Any]) -> list[tuple[int, ...] | None]:
    """Append the owner's arrays to `chunks`; returns their shapes."""
    shapes: list[tuple[int, ...] | None] = []
    for name, (dtype, ndim) in table.items():
        array = getattr(owner, name)
        if array is None:
            shapes.append(None)
            continue
        assert array.dtype == dtype and array.ndim == ndim, f"{name}: {array.dtype} {array.shape}"
        shapes.append(array.shape)
        chunks.append(np.ascontiguousarray(array))
        chunks.append(bytes(-array.nbytes % _ALIGNMENT))
    return shapes


def _message(kind: type[Any], body: list[Any], payload: _Payload) -> Message:
    message: Message
    if kind is Execute:
        message = Execute(order=_order(body, payload))
    elif kind is Sampled:
        message = Sampled(result=_result(body, payload))
    elif kind is Stage:
        message = _stage(body)
    else:
        _check_types(kind.__name__, body, _PLAIN[kind])
        message = kind(**{field.name: value for field, value in zip(fields(kind), body, strict=True)})
    payload.finish()
    return message


def _order_fields(order: StepOrder, chunks: list[Any]) -> list[Any]:
    inputs, sampling = order.inputs, order.inputs.sampling
    shapes = _pack(STEP_ARRAYS, inputs, chunks), _pack(SAMPLING_ARRAYS, sampling, chunks)
    moves = [[(move.peer, _pack(MOVE_ARRAYS, move, chunks)) for move in some] for some in (order.sends, order.receives)]
    return [inputs.step, inputs.policy, sampling.want_raw, order.has_moves, *shapes, *moves]


def _order(body: list[Any], payload: _Payload) -> StepOrder:
    _check_types("Execute", body, (int, str, bool, bool, list, list, list, list))
    step, policy, want_raw, has_moves, step_shapes, sampling_shapes, *moves = body
    arrays: dict[str, Any] = payload.take(STEP_ARRAYS, step_shapes)
    options: dict[str, Any] = payload.take(SAMPLING_ARRAYS, sampling_shapes)
    _check_present({name: array for name, array in arrays.items() if name != "routing"}, options)
    sampling = SamplingBatch(**options, want_raw=want_raw)
    inputs = StepInputs(**arrays, sampling=sampling, step=step, policy=policy)
    sends, receives = (tuple(_move(one, payload) for one in some) for some in moves)
    return StepOrder(inputs=inputs, sends=sends, receives=receives, has_moves=has_moves)


def _move(fields_of_move: Any, payload: _Payload) -> BlockMove:
    if not isinstance(fields_of_move, list):
        raise WireError(f"Execute: {fields_of_move!r:.80} is no move of blocks")
    _check_types("BlockMove", fields_of_move, (int, list))
    arrays: dict[str, Any] = payload.take(MOVE_ARRAYS, fields_of_move[1])
    _check_present(arrays)
    return BlockMove(peer=fields_of_move[0], **arrays)


def _result_fields(result: StepResult, chunks: list[Any]) -> list[Any]:
    return [
        _pack(SAMPLE_ARRAYS, result.sampled, chunks),
        _pack(LOAD_ARRAYS, result, chunks),
        None if result.routed is None else _pack(ROUTED_ARRAYS, result.routed, chunks),
    ]


def _result(body: list[Any], payload: _Payload) -> StepResult:
    if len(body) != 3 or not (body[2] is None or isinstance(body[2], list)):
        raise WireError(f"Sampled: expected the shapes of three groups of arrays, got {body!r:.200}")
    sampled: dict[str, Any] = payload.take(SAMPLE_ARRAYS, body[0])
    _check_present({name: array for name, array in sampled.items() if name != "raw_logprobs"})
    load: dict[str, Any] = payload.take(LOAD_ARRAYS, body[1])
    routed: dict[str, Any] | None = None if body[2] is None else payload.take(ROUTED_ARRAYS, body[2])
    if routed is not None:
        _check_present(routed)
    return StepResult(
        sampled=SampleResult(**sampled), **load, routed=None if routed is None else RoutedTokens(**routed)
    )


def _source_fields(source: FolderWeights | SharedWeights) -> tuple[str, str | bytes]:
    if isinstance(source, FolderWeights):
        return "folder", source.path
    published = source.published
    if isinstance(published, PublishedFile):
        return f"file {published.version} {source.bucket_bytes}", published.path
    return "shards" if isinstance(published, PublishedShards) else "shared", published.to_bytes()


def _stage(body: list[Any]) -> Stage:
    kind = body[0] if body and isinstance(body[0], str) else ""
    if kind == "folder" or re.fullmatch(r"file \d{1,19} \d{1,19}", kind):
        _check_types("Stage", body, (str, str, int))
        if kind == "folder":
            return Stage(source=FolderWeights(path=body[1]), version=body[2])
        file_version, bucket_bytes = map(int, kind.split()[1:])
        file = PublishedFile(path=body[1], version=file_version)
        return Stage(source=SharedWeights(published=file, bucket_bytes=bucket_bytes), version=body[2])
    if kind not in ("shared", "shards"):
        raise WireError(f"Stage: {body!r:.200} has no known source of weights")
    _check_types("Stage", body, (str, bytes, int))
    try:
        published = (PublishedWeights if kind == "shared" else PublishedShards).from_bytes(body[1])
    except ManifestError as error:
        raise WireError(f"Stage: {error}") from error
    return Stage(source=SharedWeights(published=published), version=body[2])


def _check_types(what: str, values: list[Any], types: tuple[type[Any], ...]) -> None:
    if [type(value) for value in values] != list(types):
        names = ", ".join(kind.__name__ for kind in types)
        raise WireError(f"{what}: expected fields of types [{names}], got {values!r:.200}")


def _check_present(*arrays: dict[str, Any]) -> None:
    for name in (name for group in arrays for name, array in group.items() if array is None):
        raise WireError(f"{name}: the array is missing")
