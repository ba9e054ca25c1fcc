"""Sessions over a connection: the engine's bits, tokens as they come, and no state that a server could lose."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import gated_engine, tiny_options, wait_until
from tiny_server import LIMITS

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import SessionBusyError
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.sockets import RolloutServer
from zerokl.rollout.session import Session

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.9)
COLUMNS = ("tokens", "loss_mask", "logprobs", "policy_logprobs", "entropy", "policy_versions")


def converse(host: Any, seed: int | None = None) -> Session:
    session: Session = host.open_session("a tool", seed=seed)
    for _ in range(3):
        rollout = session.generate(PARAMS)
        session.append(rollout.token_ids[:4])
    return session


def same(first: Session, second: Session) -> None:
    assert first.seed == second.seed
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_a_session_has_the_engines_bits(tiny_model: Path, client: RolloutClient) -> None:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        for _ in range(2):  # without seeds: those of the engine, in the same order
            ours, theirs = converse(client), converse(engine)
            same(ours, theirs)
        np.testing.assert_array_equal(ours.score(), theirs.policy_logprobs)
        assert ours.turns[2].num_cached_tokens == theirs.turns[2].num_cached_tokens > 0
        one, other = ours.fork(), theirs.fork()
        asyncio.run(one.agenerate(PARAMS))
        other.generate(PARAMS)
        same(one, other)
        rollout = one.to_rollout()
        np.testing.assert_array_equal(client.score(rollout)[0], engine.score(other.to_rollout())[0])
    # the negative control
    assert converse(client, seed=1).tokens.tolist() != ours.tokens.tolist()


def test_a_turn_can_be_streamed(client: RolloutClient) -> None:
    whole, streamed, async_streamed = (client.open_session([5, 6], seed=3) for _ in range(3))
    whole.generate(PARAMS)
    tokens: list[int] = []
    for chunk in streamed.stream(PARAMS, chunk=4):
        tokens += chunk.token_ids.tolist()
        with pytest.raises(SessionBusyError):
            streamed.append([1])
    assert tokens == whole.tokens[2:].tolist()
    same(streamed, whole)

    async def main() -> None:
        assert sum([len(chunk.token_ids) async for chunk in async_streamed.astream(PARAMS)]) == 20

    asyncio.run(main())
    same(async_streamed, whole)
    with pytest.raises(ValueError, match=r"n must be 1"):
        next(iter(whole.stream(SamplingParams(n=2))))


def test_a_stream_that_is_left_early_leaves_the_session_as_it_was(tiny_model: Path, serve: Any) -> None:
    engine, worker = gated_engine(tiny_model)
    _, client = serve(engine)
    session = client.open_session([5, 6], seed=3)
    stream = session.stream(PARAMS, chunk=1)
    worker.gate.release(3)
    next(stream)
    stream.close()
    worker.open()
    wait_until(lambda: engine.metrics()["finished_abort"] == 1)
    assert session.num_turns == 0
    session.generate(PARAMS)
    assert len(session.tokens) == 22


def test_wrong_input_is_refused_without_asking_the_server(client: RolloutClient) -> None:
    session = client.open_session([1], seed=0)
    calls = client.metrics()["server_calls"]
    for call, message in (
        (lambda: session.append([300]), r"below vocab_size \(300\), got 300"),
        (lambda: session.append([1] * 256), "at most 255 token ids"),
        (lambda: session.generate(SamplingParams(max_tokens=256)), "max_tokens must be at most 255"),
        (lambda: client.open_session([]), "prompt must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert client.metrics()["server_calls"] == calls and session.tokens.tolist() == [1]


def test_an_open_session_outlives_the_server(tiny_model: Path) -> None:
    """All of it is the client's: another server with the same weights goes on with the same bits."""

    def turns(server: RolloutServer, session: Session | None, count: int) -> Session:
        with RolloutClient(server.endpoint) as client:
            mine = client.open_session([9, 9], seed=5) if session is None else session
            mine._host = client
            for _ in range(count):
                mine.generate(PARAMS)
                mine.append([7])
            return mine

    def served(session: Session | None, count: int) -> Session:
        server = RolloutServer("tcp://127.0.0.1:0", limits=LIMITS)
        with RolloutEngine(tiny_options(tiny_model)) as engine, server:
            server.start(engine)
            return turns(server, session, count)

    same(served(served(None, 1), 2), served(None, 3))
