"""The reference half of docs/protocol.md: tables from the schema, and each message's bytes with what they mean.

python tests/protocol_page.py      writes it into the page
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zerokl.rollout.outputs import Rollout
from zerokl.rollout.protocol.codec import PROTOCOL_VERSION, Message, encode
from zerokl.rollout.protocol.fields import Field, Optional
from zerokl.rollout.protocol.records import prompts_to_arrays, rollouts_to_wire
from zerokl.rollout.protocol.schema import (
    CLIENT_MESSAGES,
    ROLLOUT_FIELDS,
    SERVER_MESSAGES,
    ArrayKind,
    MessageKind,
)
from zerokl.rollout.sampling_params import SamplingParams

PAGE = Path(__file__).resolve().parents[1] / "docs" / "protocol.md"
MARKER = "<!-- Everything below is written by tests/protocol_page.py. -->\n"
_HEADER = ("protocol version", "kind", "call", "seq", "body", "arrays")
_COLUMN = 36


def example_rollout() -> Rollout:
    """A small one; numbers that float32 holds exactly."""
    return Rollout(
        prompt_token_ids=np.array([1, 2], np.int32),
        token_ids=np.array([7], np.int32),
        text="g",
        logprobs=np.array([-0.5], np.float32),
        policy_logprobs=np.array([-0.25], np.float32),
        entropy=np.array([1.5], np.float32),
        raw_logprobs=None,
        policy_versions=np.array([3], np.int64),
        steps=np.array([21], np.int64),
        phases=np.array([1], np.uint8),
        cached_lens=np.array([0], np.int32),
        ranks=np.array([0], np.int16),
        finish_reason="abort",
        stop_reason=None,
        num_cached_tokens=0,
        num_preemptions=0,
        num_restarts=0,
        num_kept_updates=0,
        inexact=False,
        seed=11,
        sample_index=0,
        prompt_index=0,
        sampling_params=SamplingParams(max_tokens=8),
    )


def examples() -> dict[str, Message]:
    """One of each kind."""
    body, arrays = rollouts_to_wire([example_rollout()])
    tokens = {
        "calls": np.array([1], np.int64),
        "indexes": np.array([0], np.int32),
        "starts": np.array([4], np.int32),
        "counts": np.array([1], np.int32),
        "restarts": np.array([0], np.int32),
        "token_ids": np.array([7], np.int32),
        "logprobs": np.array([-0.5], np.float32),
        "policy_logprobs": np.array([-0.25], np.float32),
        "policy_versions": np.array([3], np.int64),
    }
    session = bytes(range(16))
    welcome = {
        "version": PROTOCOL_VERSION,
        "session": session,
        "resumed": False,
        "heartbeat": 5.0,
        "limits": {"max_message_bytes": 16 << 20, "max_calls": 4096, "max_requests": 65536},
        "server": "rollout-server m",
    }
    update = {"source": "folder", "path": "/m", "mode": "wait", "on_stale": "requeue", "allow_rewind": False}
    bodies: dict[str, dict[str, Any]] = {
        "hello": {"versions": [PROTOCOL_VERSION], "name": "me", "session": session},
        "generate": {"sampling_params": [{"max_tokens": 8, "logit_bias": [[5, 1.5]]}], "stream": 4, "deadline": 2.5},
        "resume": body,
        "score": {"definition": "policy_logprobs", "policy": "policy"},
        "abort": {"ids": ["a"]},
        "upload": {"upload": 1, "pieces": [["w", "float32", [2], 0, 8]]},
        "update_weights": update,
        "get_weight_version": {"name": "policy"},
        "pin_weights": {"name": "reference"},
        "drop_weights": {"name": "reference"},
        "expert_load": {"reset": False},
        "report_trainer_logprobs": {"version": 3},
        "sleep": {"tags": ["weights"], "level": 1},
        "wake_up": {"tags": ["weights"]},
        "pause_generation": {"mode": "keep"},
        "welcome": welcome,
        "refused": {"code": "hello_first", "text": "ping before hello"},
        "rollouts": {"first": 0, "total": 1, **body},
        "scores": {"first": 0, "total": 1},
        "result": {"value": 1},
        "error": {"error": "ValueError", "text": "max_tokens must be >= 1"},
    }
    all_arrays: dict[str, Any] = {
        "generate": prompts_to_arrays([np.array([1, 2, 3], np.int32), "hi"]),
        "resume": arrays,
        "score": {"token_ids": np.array([1, 2, 3], np.int32), "lens": np.array([3], np.int32)},
        "upload": {"data": np.frombuffer(np.array([1, -1], np.float32).tobytes(), np.uint8)},
        "report_trainer_logprobs": {
            "trainer_logprobs": np.array([-0.25], np.float32),
            "rollout_logprobs": np.array([-0.25], np.float32),
            "policy_versions": np.array([3], np.int64),
            "inexact": np.array([0], np.uint8),
        },
        "tokens": tokens,
        "rollouts": arrays,
        "scores": {"lens": np.array([2], np.int32), "logprobs": np.array([-0.5, -0.25], np.float32)},
    }
    sequenced = set(SERVER_MESSAGES) - {"welcome", "refused", "pong"}
    return {
        kind: Message(
            kind=kind,
            call=1 if schema.call == "yes" else 0,
            seq=9 if kind in sequenced else 8 if kind in CLIENT_MESSAGES else 0,
            body=bodies.get(kind, {}),
            arrays=all_arrays.get(kind, {}),
        )
        for kind, schema in (CLIENT_MESSAGES | SERVER_MESSAGES).items()
    }


# -- bytes with their meaning -----------------------------------------------------------------------------------------
class Annotator:
    """Walks msgpack bytes, one line per item."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def lines(self, label: str = "", depth: int = 0) -> Iterator[str]:
        """The next item and what it holds."""
        start = self._at
        kind, value = self._head()
        name = f"{label}: " if label else ""
        if kind == "list":
            yield self._line(start, depth, f"{name}list of {value}")
            for index in range(value):
                yield from self.lines(_HEADER[index] if depth == 0 else "", depth + 1)
        elif kind == "map":
            yield self._line(start, depth, f"{name}map of {value}")
            for _ in range(value):
                key_start = self._at
                _, key = self._head()
                yield self._line(key_start, depth + 1, f'"{key}"')
                yield from self.lines("", depth + 2)
        else:
            yield self._line(start, depth, name + (value if kind == "plain" else f'"{value}"'))

    def _line(self, start: int, depth: int, text: str) -> str:
        return hex_line(self._data[start : self._at], "  " * depth + text)

    def _head(self) -> tuple[str, Any]:
        byte = self._take(1)[0]
        if byte < 0x80 or byte >= 0xE0:
            return "plain", str(byte if byte < 0x80 else byte - 0x100)
        if byte < 0x90:
            return "map", byte & 0x0F
        if byte < 0xA0:
            return "list", byte & 0x0F
        if byte < 0xC0:
            return "text", self._take(byte & 0x1F).decode()
        if byte in (0xC0, 0xC2, 0xC3):
            return "plain", {0xC0: "nil", 0xC2: "false", 0xC3: "true"}[byte]
        if byte == 0xC4:
            size = self._take(1)[0]
            self._take(size)
            return "plain", f"{size} bytes"
        if byte == 0xD9:
            return "text", self._take(self._take(1)[0]).decode()
        size, code = {0xCB: (8, "d"), 0xCC: (1, "B"), 0xCD: (2, "H"), 0xCE: (4, "I"), 0xCF: (8, "Q")}.get(byte, (0, ""))
        if code:
            return "plain", f"{struct.unpack('>' + code, self._take(size))[0]}"
        if byte == 0xDE:
            return "map", struct.unpack(">H", self._take(2))[0]
        raise AssertionError(f"byte {byte:#x} is in no example")

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        assert len(taken) == count
        self._at += count
        return taken


def hex_line(data: bytes, text: str) -> str:
    """Bytes on the left, over several lines where they are many; what they mean on the right."""
    per_line = _COLUMN // 3 - 1
    rows = [data[start : start + per_line].hex(" ") for start in range(0, len(data), per_line)] or ["(no bytes)"]
    first, *rest = rows
    return "\n".join([f"{first:<{_COLUMN}}{text}", *rest])


def dump(message: Message) -> str:
    """All frames of a message."""
    header, *frames = (bytes(frame) for frame in encode(message))
    lines = [f"# frame 0: header, {len(header)} bytes", *Annotator(header).lines()]
    if frames:
        (payload,) = frames
        lines += [f"# frame 1: arrays, {len(payload)} bytes", *array_lines(message, payload)]
    return "\n".join(lines)


def array_lines(message: Message, payload: bytes) -> Iterator[str]:
    """The arrays of a frame that has them all."""
    end = 0
    for name, array in message.arrays.items():
        start = -(-end // 8) * 8
        if start > end:
            yield hex_line(payload[end:start], "up to a multiple of 8 bytes")
        end = start + array.nbytes
        values = ", ".join(map(str, array.tolist()))
        yield hex_line(payload[start:end], f"{name} from byte {start}, {array.dtype.name}{list(array.shape)}: {values}")
    assert end == len(payload)


# -- tables -----------------------------------------------------------------------------------------------------------
def section(kind: str, schema: MessageKind, example: Message) -> str:
    """All about one kind."""
    parts = [f"### {kind}", schema.summary]
    if schema.body:
        parts.append(fields_table(schema.body))
    if schema.arrays:
        parts.append(arrays_table(schema.arrays))
    parts.append(f"```text\n{dump(example)}\n```")
    return "\n\n".join(parts)


def fields_table(fields: Any) -> str:
    """Fields of a body."""
    rows = ["| field | holds |", "| --- | --- |"]
    return "\n".join([*rows, *(f"| `{name}` | {_holds(field)} |" for name, field in fields.items())])


def arrays_table(arrays: Any) -> str:
    """Arrays of a message."""
    rows = ["| array | dtype | may be left out |", "| --- | --- | --- |"]
    return "\n".join([*rows, *(f"| `{name}` | {_array(kind)} |" for name, kind in arrays.items())])


def _holds(field: Field) -> str:
    return f"{field.describe}{', or left out' if isinstance(field, Optional) else ''}".replace("|", "\\|")


def _array(kind: ArrayKind) -> str:
    dimensions = f", {kind.ndim} dimensions" if kind.ndim > 1 else ""
    return f"{kind.dtype}{dimensions} | {'yes' if kind.optional else ''}"


def reference() -> str:
    """The whole generated half."""
    shown = examples()
    parts = ["## From client to server"]
    parts += [section(kind, schema, shown[kind]) for kind, schema in CLIENT_MESSAGES.items()]
    parts += ["## From server to client"]
    parts += [section(kind, schema, shown[kind]) for kind, schema in SERVER_MESSAGES.items()]
    parts += ["## A row of `rollouts`", fields_table(ROLLOUT_FIELDS)]
    return "\n" + "\n\n".join(parts) + "\n"


def main() -> None:
    prose, _, _ = PAGE.read_text().partition(MARKER)
    PAGE.write_text(prose + MARKER + reference())


if __name__ == "__main__":
    main()
