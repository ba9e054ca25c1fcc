"""The form of messages on the wire: frames for a ZMQ socket. Pure: no sockets, no processes.

A message is a msgpack header [protocol version, sequence number, kind, body], followed, if it carries arrays, by one
frame with their raw bytes in the order of the tables of `zerokl.rollout.wire_steps`, each on an 8-byte boundary. (One
frame: a message of 25 frames takes four times as long to pass a socket.) A reply bears the sequence number of its
request.

Arrays that come out of `decode` are writable and share the frame's memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import msgpack  # type: ignore[import-untyped]

from zerokl.rollout import messages
from zerokl.rollout.messages import Message
from zerokl.rollout.weight_source import DeviceWeights, FolderWeights, SharedWeights
from zerokl.rollout.wire_arrays import Payload, WireError, check_types
from zerokl.rollout.wire_steps import order_fields, read_order, read_result, result_fields
from zerokl.weight_sync.device_descriptor import PublishedDeviceWeights
from zerokl.weight_sync.disk import PublishedFile
from zerokl.weight_sync.errors import ManifestError
from zerokl.weight_sync.manifest import PublishedWeights
from zerokl.weight_sync.shards import PublishedShards

PROTOCOL_VERSION = 5
"""Raised with every change of the messages or of their tables; any other is refused."""

_PLAIN: Mapping[type[Any], tuple[type[Any], ...]] = {
    messages.Hello: (int,),
    messages.Configure: (dict, int, str, list),
    messages.Connect: (),
    messages.Collect: (),
    messages.Commit: (),
    messages.Discard: (),
    messages.Pin: (str,),
    messages.Drop: (str,),
    messages.PutAway: (bool, bool, int, str),
    messages.BringBack: (bool, bool),
    messages.Rearrange: (list,),
    messages.Describe: (),
    messages.Close: (),
    messages.Done: (),
    messages.Facts: (dict,),
    messages.Failed: (str, str, str),
}
"""Messages whose body is the list of their fields, with the fields' types."""

_STRUCTURED = (messages.Execute, messages.Begin, messages.Stage, messages.Sampled)
_KINDS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in (*_PLAIN, *_STRUCTURED)}


def encode(sequence: int, message: Message) -> list[bytes]:
    """The message as one frame or two."""
    chunks: list[Any] = []
    body: list[Any]
    if isinstance(message, (messages.Execute, messages.Begin)):
        body = order_fields(message.order, chunks)
    elif isinstance(message, messages.Sampled):
        body = result_fields(message.result, chunks)
    elif isinstance(message, messages.Stage):
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
    check_types("header", header, (int, int, str, list))
    _, sequence, kind, body = header
    if kind not in _KINDS:
        raise WireError(f"unknown message kind {kind!r:.80}")
    return sequence, _message(_KINDS[kind], body, Payload(frames[1] if len(frames) == 2 else b""))


def _message(kind: type[Any], body: list[Any], payload: Payload) -> Message:
    message: Message
    if kind in (messages.Execute, messages.Begin):
        message = kind(order=read_order(body, payload))
    elif kind is messages.Sampled:
        message = messages.Sampled(result=read_result(body, payload))
    elif kind is messages.Stage:
        message = _stage(body)
    else:
        check_types(kind.__name__, body, _PLAIN[kind])
        message = kind(**{field.name: value for field, value in zip(fields(kind), body, strict=True)})
    payload.finish()
    return message


def _source_fields(source: FolderWeights | SharedWeights | DeviceWeights) -> tuple[str, str | bytes]:
    if isinstance(source, FolderWeights):
        return "folder", source.path
    if isinstance(source, DeviceWeights):
        return f"device {source.bucket_bytes}", source.published.to_bytes()
    published = source.published
    if isinstance(published, PublishedFile):
        return f"file {published.version} {source.bucket_bytes}", published.path
    return "shards" if isinstance(published, PublishedShards) else "shared", published.to_bytes()


def _stage(body: list[Any]) -> messages.Stage:
    kind = body[0] if body and isinstance(body[0], str) else ""
    if kind == "folder" or re.fullmatch(r"file \d{1,19} \d{1,19}", kind):
        check_types("Stage", body, (str, str, int))
        if kind == "folder":
            return messages.Stage(source=FolderWeights(path=body[1]), version=body[2])
        file_version, bucket_bytes = map(int, kind.split()[1:])
        file = PublishedFile(path=body[1], version=file_version)
        return messages.Stage(source=SharedWeights(published=file, bucket_bytes=bucket_bytes), version=body[2])
    is_device = re.fullmatch(r"device \d{1,19}", kind)
    if not is_device and kind not in ("shared", "shards"):
        raise WireError(f"Stage: {body!r:.200} has no known source of weights")
    check_types("Stage", body, (str, bytes, int))
    try:
        if is_device:
            on_device = PublishedDeviceWeights.from_bytes(body[1])
            source = DeviceWeights(published=on_device, bucket_bytes=int(kind.split()[1]))
            return messages.Stage(source=source, version=body[2])
        published = (PublishedWeights if kind == "shared" else PublishedShards).from_bytes(body[1])
    except ManifestError as error:
        raise WireError(f"Stage: {error}") from error
    return messages.Stage(source=SharedWeights(published=published), version=body[2])


__all__ = ["PROTOCOL_VERSION", "WireError", "decode", "encode"]
