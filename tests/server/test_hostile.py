"""Whatever arrives: nothing is raised, nothing grows, and who has not said hello makes nothing happen."""

from __future__ import annotations

import random
import socket
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import protocol_page
import psutil
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_engine import tiny_options, wait_until
from tiny_server import LIMITS

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.protocol.codec import PROTOCOL_VERSION, Message, encode
from zerokl.rollout.protocol.schema import CLIENT_MESSAGES
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.dispatcher import Dispatcher
from zerokl.rollout.server.jobs import EngineJobs
from zerokl.rollout.server.ledger import Ledger
from zerokl.rollout.server.limits import ServerLimits
from zerokl.rollout.server.sockets import RolloutServer

SMALL = ServerLimits(
    max_clients=4, max_calls=32, max_queued_bytes=1 << 20, max_unread_messages=2000, max_upload_bytes=1 << 20
)
EXAMPLES = [
    [bytes(frame) for frame in encode(replace(message, seq=0, call=message.call * number))]
    for number, (kind, message) in enumerate(protocol_page.examples().items(), 1)
    if kind in CLIENT_MESSAGES
]
"""One of each kind, under rising numbers, acknowledging nothing."""
HELLO = [bytes(frame) for frame in encode(Message(kind="hello", body={"versions": [PROTOCOL_VERSION], "name": "fuzz"}))]


class Rig:
    """A dispatcher on an engine, without sockets; what it sends is counted and forgotten."""

    def __init__(self, engine: RolloutEngine, limits: ServerLimits = SMALL) -> None:
        self.mail: deque[Any] = deque()
        self.sent: list[str] = []
        self.now = 0.0
        self.ledger = Ledger(limits)
        self.jobs = EngineJobs(
            engine, limits, self.ledger, lambda call, outcome: self.mail.append((call, outcome)), dict
        )
        self.dispatcher = Dispatcher(self.jobs, limits, self.ledger, self._send, lambda: None, "rig")

    def _send(self, route: bytes, frames: Any) -> bool:
        self.sent.append(msgpack.unpackb(bytes(frames[0]))[1])
        return True

    def receive(self, route: bytes, frames: list[bytes]) -> None:
        self.dispatcher.receive(route, "", frames, self.now)
        self.settle()

    def settle(self) -> None:
        while self.mail:
            self.dispatcher.complete(*self.mail.popleft())

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.dispatcher.tick(self.now)

    def is_bounded(self) -> bool:
        facts = self.dispatcher.facts()
        return (
            facts["server_clients"] <= SMALL.max_clients
            and facts["server_calls"] <= SMALL.max_clients * (SMALL.max_calls + 1)
            and facts["server_queued_bytes"] <= SMALL.max_queued_bytes
            and self.jobs._uploads.nbytes <= SMALL.max_upload_bytes
        )

    def close(self) -> None:
        """Let everything end, and see that nothing is left of it."""
        for kind in ("resume_generation", "wake_up"):
            getattr(self.jobs._engine, kind)()
        self.pass_time(1e6)
        self.pass_time(1e6)

        def is_done() -> bool:
            self.settle()
            return self.ledger.queued_bytes == 0

        wait_until(is_done)
        assert self.dispatcher.facts()["server_clients"] == 0
        assert not self.dispatcher._deadlines and not self.ledger._requests
        wait_until(lambda: self.jobs._uploads.nbytes == 0)
        self.jobs.close()


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        yield engine


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda items: st.lists(items, max_size=4) | st.dictionaries(st.text(), items, max_size=4),
    max_leaves=12,
)


@st.composite
def messages(draw: st.DrawFn) -> list[bytes]:
    """An example with something wrong: a value in its header or its arrays' table, its bytes, or its frames."""
    frames = list(draw(st.sampled_from(EXAMPLES)))
    how = draw(st.sampled_from(["header", "field", "table", "bytes", "frames", "call", "noise"]))
    header = msgpack.unpackb(frames[0])
    if how == "header":
        header[draw(st.integers(0, 5))] = draw(plain)
    elif how == "field" and header[4]:
        header[4][draw(st.sampled_from(sorted(header[4])))] = draw(plain)
    elif how == "table" and header[5]:
        row = draw(st.sampled_from(header[5]))
        row[draw(st.integers(0, 4))] = draw(plain | st.integers(-8, 64))
    elif how == "call":
        header[2], header[3] = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    elif how == "bytes":
        which = draw(st.integers(0, len(frames) - 1))
        frames[which] = frames[which][: draw(st.integers(0, len(frames[which])))] + draw(st.binary(max_size=8))
        return frames
    elif how == "frames":
        return draw(st.permutations(frames))[: draw(st.integers(0, len(frames)))] + draw(st.lists(st.binary()))
    elif how == "noise":
        return draw(st.lists(st.binary(max_size=64), max_size=5))
    frames[0] = msgpack.packb(header)
    return frames


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), messages()), max_size=25), st.booleans())
def test_any_messages_are_borne(engine: RolloutEngine, received: list[Any], greet: bool) -> None:
    rig = Rig(engine)
    if greet:
        rig.receive(b"a", HELLO)
    for route, frames in received:
        rig.receive(route, frames)
        rig.pass_time(0.5)
        assert rig.is_bounded()
    rig.close()


class Recorder:
    """Stands where the engine does: any use of it is noted."""

    def __init__(self) -> None:
        self.uses: list[str] = []

    def watch_steps(self, watcher: Any) -> Any:
        return lambda: None

    def __getattr__(self, name: str) -> Any:
        self.uses.append(name)
        raise AttributeError(name)


def test_nobody_acts_before_hello() -> None:
    recorder: Any = Recorder()
    rig = Rig(recorder)
    recorder.uses.clear()  # the table of commands looks at the methods
    for frames in EXAMPLES:
        if msgpack.unpackb(frames[0])[1] != "hello":
            rig.receive(b"stranger", frames)
    rig.jobs.close()
    assert recorder.uses == [] and set(rig.sent) == {"refused"} and rig.ledger.queued_bytes == 0
    control = Rig(recorder)  # and after hello they do: the negative control
    recorder.uses.clear()
    control.receive(b"a", HELLO)
    for frames in EXAMPLES:
        if msgpack.unpackb(frames[0])[1] != "bye":
            control.receive(b"a", frames)
    wait_until(lambda: bool(recorder.uses))
    control.jobs.close()


def test_a_session_is_its_owners(engine: RolloutEngine) -> None:
    """With the token of another's session, but under another key, a client gets a session of its own."""
    rig = Rig(engine)
    rig.dispatcher.receive(b"a", "key 1", HELLO, 0.0)
    (token,) = rig.dispatcher._sessions
    thief = encode(Message(kind="hello", body={"versions": [PROTOCOL_VERSION], "name": "thief", "session": token}))
    rig.dispatcher.receive(b"b", "key 2", thief, 0.0)
    assert rig.dispatcher._sessions[token].route == b"a" and len(rig.dispatcher._sessions) == 2
    rig.dispatcher.receive(b"c", "key 1", thief, 0.0)
    assert rig.dispatcher._sessions[token].route == b"c" and len(rig.dispatcher._sessions) == 2
    rig.close()


def test_a_replayed_call_is_answered_once(engine: RolloutEngine) -> None:
    rig = Rig(engine)
    rig.receive(b"a", HELLO)
    frames = [bytes(frame) for frame in encode(Message(kind="abort", call=5, body={"ids": []}))]
    for _ in range(50):
        rig.receive(b"a", frames)

    def is_answered() -> bool:
        rig.settle()
        return "result" in rig.sent

    wait_until(is_answered)
    rig.receive(b"a", frames)
    assert rig.sent.count("result") == 1
    rig.close()


def test_too_many_clients_and_calls_are_refused(engine: RolloutEngine) -> None:
    rig = Rig(engine)
    for number in range(9):
        rig.receive(b"%d" % number, HELLO)
    assert rig.sent.count("welcome") == 4 and rig.sent.count("refused") == 5
    engine.pause_generation("keep")
    arrays = {
        "prompt_lens": np.array([1], np.int32),
        "prompt_tokens": np.array([1], np.int32),
        "prompt_text": np.zeros(0, np.uint8),
    }
    for call in range(1, 100):
        body = {"sampling_params": [{"max_tokens": 4}], "deadline": 1e6}
        rig.receive(b"0", encode(Message(kind="generate", call=call, body=body, arrays=arrays)))
        assert rig.is_bounded()
    assert rig.sent.count("error") >= 99 - 33
    rig.close()


@pytest.mark.parametrize("kind", ["malformed", "refused", "late"])
def test_who_asks_and_never_reads_is_dropped(engine: RolloutEngine, kind: str) -> None:
    rig = Rig(engine, replace(SMALL, max_unread_messages=100))
    rig.receive(b"a", HELLO)
    bodies = {
        "malformed": Message(kind="abort", body={"ids": [1]}),
        "refused": Message(kind="get_weight_version", body={"name": "nobody"}),
        "late": Message(kind="wake_up", body={"deadline": 0.0}),
    }

    def is_dropped() -> bool:
        rig.settle()
        rig.pass_time(0.001)
        return not rig.dispatcher.facts()["server_clients"]

    for call in range(1, 200):
        rig.receive(b"a", [bytes(frame) for frame in encode(replace(bodies[kind], call=call))])
        is_dropped()
    wait_until(is_dropped)
    assert rig.ledger.max_queued_bytes <= SMALL.max_queued_bytes
    rig.close()


def test_bytes_that_are_no_messages_leave_the_server_serving(tiny_model: Path) -> None:
    server = RolloutServer("tcp://127.0.0.1:0", limits=LIMITS)
    with RolloutEngine(tiny_options(tiny_model)) as engine, server:
        server.start(engine)
        address = ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        held = []
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\xff\0\0\0\0\0\0\0\1\x7f\3", bytes(9)):
            held.append(socket.create_connection(address))
            held[-1].sendall(data)
        context = zmq.Context()
        half = context.socket(zmq.DEALER)
        half.setsockopt(zmq.LINGER, 0)
        half.connect(server.endpoint)
        half.send(HELLO[0], zmq.SNDMORE)  # and never the rest
        large = context.socket(zmq.DEALER)
        large.setsockopt(zmq.LINGER, 0)
        large.connect(server.endpoint)
        large.send(bytes(LIMITS.max_message_bytes + 1))
        with RolloutClient(server.endpoint) as client:
            half.close()
            for connection in held:
                connection.close()
            assert len(client.generate("a", SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids) == 5
            assert client.metrics()["server_clients"] == 1
        large.close()
        context.term()
    assert not any(thread.name.startswith("zerokl-server") for thread in threading.enumerate())


@pytest.mark.long
def test_a_million_messages(tiny_model: Path) -> None:
    """Examples with random damage, by clients that come, go and stay silent; resident memory stays where it was."""
    rng = random.Random(1)
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        rig = Rig(engine)
        start = 0
        for number in range(1_000_000):
            frames = damaged(rng)
            rig.receive(rng.choice([b"a", b"b", b"c", b"d", b"e"]), frames)
            rig.sent.clear()
            if number % 100 == 0:
                rig.receive(b"a", HELLO)
                rig.pass_time(rng.choice([0.1, 2.0, 40.0]))
                assert rig.is_bounded(), number
            if number == 100_000:
                start = psutil.Process().memory_info().rss
        assert psutil.Process().memory_info().rss - start < 64 << 20
        rig.close()


def damaged(rng: random.Random) -> list[bytes]:
    """An example, with up to three bytes changed, cut short or with its call's number raised."""
    frames = list(rng.choice(EXAMPLES))
    header = msgpack.unpackb(frames[0])
    if header[2]:
        header[2] = rng.randrange(1, 2**40)
        frames[0] = msgpack.packb(header)
    if rng.random() < 0.7:
        which = rng.randrange(len(frames))
        data = bytearray(frames[which])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        frames[which] = bytes(data[: rng.choice([len(data), rng.randrange(len(data) + 1)])])
    return frames
