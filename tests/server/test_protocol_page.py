"""docs/protocol.md is true: its bytes are ours, and a client written from it alone is served."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import protocol_page
import pytest
import zmq
from tiny_engine import tiny_options
from tiny_server import LIMITS

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.protocol.codec import decode, encode
from zerokl.rollout.protocol.schema import CLIENT_MESSAGES, SERVER_MESSAGES
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.sockets import RolloutServer


def test_the_page_is_what_the_code_does() -> None:
    """Run `python tests/protocol_page.py` after a change of the protocol."""
    prose, marker, generated = protocol_page.PAGE.read_text().partition(protocol_page.MARKER)
    assert marker and len(prose) > 2000
    assert generated == protocol_page.reference()


@pytest.mark.parametrize("kind", [*CLIENT_MESSAGES, *SERVER_MESSAGES])
def test_each_example_is_a_message(kind: str) -> None:
    message = protocol_page.examples()[kind]
    schema = CLIENT_MESSAGES if kind in CLIENT_MESSAGES else SERVER_MESSAGES
    back = decode(encode(message), schema)
    assert (back.kind, back.call, back.seq, back.body) == (kind, message.call, message.seq, message.body)


class PageClient:
    """Written from docs/protocol.md, with zmq, msgpack and numpy alone."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.session: bytes | None = None
        self.received = 0
        self.call = 0
        self.socket: Any = None
        self.connect()

    def connect(self) -> None:
        if self.socket is not None:
            self.socket.close(0)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.connect(self.endpoint)
        body: dict[str, Any] = {"versions": [2], "name": "page"}
        if self.session is not None:
            body["session"] = self.session
        self.send("hello", body)
        kind, _, welcome, _ = self.receive()
        assert kind == "welcome" and welcome["resumed"] == (self.session is not None)
        self.session = welcome["session"]

    def send(self, kind: str, body: dict[str, Any], arrays: dict[str, Any] | None = None, call: int = 0) -> None:
        arrays = arrays or {}
        table, payload = [], b""
        for name, array in arrays.items():
            payload += bytes(-len(payload) % 8)
            table.append([name, str(array.dtype), list(array.shape), 1, len(payload)])
            payload += array.tobytes()
        header = msgpack.packb([2, kind, call, self.received, body, table])
        self.socket.send_multipart([header, payload] if arrays else [header])

    def ask(self, kind: str, body: dict[str, Any], arrays: dict[str, Any] | None = None) -> int:
        self.call += 1
        self.send(kind, body, arrays, self.call)
        return self.call

    def receive(self) -> tuple[str, int, Any, dict[str, Any]]:
        assert self.socket.poll(10_000), "no answer"
        frames = self.socket.recv_multipart()
        version, kind, call, seq, body, table = msgpack.unpackb(frames[0])
        assert version == 2
        if seq:
            assert seq == self.received + 1
            self.received = seq
        arrays = {
            name: np.frombuffer(frames[frame], dtype, math.prod(shape), offset).reshape(shape)
            for name, dtype, shape, frame, offset in table
        }
        return kind, call, body, arrays


def turn_seed(seed: int, turn: int) -> int:
    """As the page says under "Conversations"."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, turn, 0), digest_size=8, person=b"zerokl-turn").digest()
    return int(struct.unpack("<Q", digest)[0])


def self_made_session(client: PageClient, engine: RolloutEngine) -> None:
    """Two turns with a tool's answer between them, against a `Session` of the engine."""
    client.ask("new_session_seed", {})
    kind, _, body, _ = client.receive()
    assert kind == "result"
    seed = body["value"]
    tokens, mask, logprobs = [1, 2, 3], [False] * 3, [np.nan] * 3
    session = engine.open_session(tokens, seed=seed)
    for turn, answer in enumerate([[7, 8], []]):
        params = {"max_tokens": 10, "ignore_eos": True, "seed": turn_seed(seed, turn)}
        client.ask(
            "generate",
            {"sampling_params": [params]},
            {
                "prompt_lens": np.array([len(tokens)], np.int32),
                "prompt_tokens": np.array(tokens, np.int32),
                "prompt_text": np.zeros(0, np.uint8),
            },
        )
        kind, _, body, arrays = client.receive()
        assert kind == "rollouts" and body["total"] == 1
        assert body["rollouts"][0]["num_cached_tokens"] == 8 * turn
        tokens += [*arrays["token_ids"].tolist(), *answer]
        mask += [True] * 10 + [False] * len(answer)
        logprobs += [*arrays["policy_logprobs"].tolist(), *([np.nan] * len(answer))]
        session.generate(SamplingParams(max_tokens=10, ignore_eos=True))
        if answer:
            session.append(answer)
    assert session.tokens.tolist() == tokens and session.loss_mask.tolist() == mask
    np.testing.assert_array_equal(session.policy_logprobs, np.array(logprobs, np.float32))


def test_a_client_written_from_the_page_is_served(tiny_model: Path) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=5, n=2)
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        expected = engine.generate([[1, 2, 3], "hi"], params)
        server = RolloutServer("tcp://127.0.0.1:0", limits=LIMITS)
        with server:
            server.start(engine)
            client = PageClient(server.endpoint)
            prompts = {
                "prompt_lens": np.array([3, -2], np.int32),
                "prompt_tokens": np.array([1, 2, 3], np.int32),
                "prompt_text": np.frombuffer(b"hi", np.uint8),
            }
            fields = {"sampling_params": [{"max_tokens": 40, "ignore_eos": True, "seed": 5, "n": 2}], "stream": 2}
            call = client.ask("generate", fields, prompts)
            streamed: dict[int, list[int]] = {index: [] for index in range(4)}
            rows: list[Any] = []
            tokens: list[int] = []
            total = num_messages = 0
            while not total:
                kind, number, body, arrays = client.receive()
                num_messages += 1
                if kind == "tokens":
                    parts = np.split(arrays["token_ids"], np.cumsum(arrays["counts"])[:-1])
                    for index, start, part in zip(arrays["indexes"], arrays["starts"], parts, strict=True):
                        assert start == len(streamed[index])
                        streamed[index] += part.tolist()
                elif kind == "rollouts":
                    rows += body["rollouts"]
                    tokens += arrays["token_ids"].tolist()
                    total = body.get("total", 0)
                if num_messages % 3 == 0 and not total:  # lose the connection, and say the call again
                    client.connect()
                    client.send("generate", fields, prompts, call)
            assert number == call and total == 4 == len(rows)
            assert tokens == [token for rollout in expected for token in rollout.token_ids.tolist()]
            for index, rollout in enumerate(expected):
                assert rollout.token_ids.tolist()[: len(streamed[index])] == streamed[index]
            sequence = np.concatenate([expected[0].prompt_token_ids, expected[0].token_ids])
            client.ask(
                "score",
                {"definition": "policy_logprobs", "policy": "policy"},
                {"token_ids": sequence, "lens": np.array([43], np.int32), "prompt_lens": np.array([3], np.int32)},
            )
            kind, _, body, arrays = client.receive()
            assert kind == "scores" and body["total"] == 1
            np.testing.assert_array_equal(arrays["logprobs"], expected[0].policy_logprobs)
            self_made_session(client, engine)
            client.ask("generate", {"sampling_params": [{"max_tokens": 0}]}, prompts)
            kind, _, body, _ = client.receive()
            assert kind == "error" and body["error"] == "ValueError" and "max_tokens" in body["text"]
            client.send("bye", {})
            client.send("ping", {})
            kind, _, body, _ = client.receive()
            assert (kind, body["code"]) == ("refused", "hello_first")
            client.socket.close(0)
