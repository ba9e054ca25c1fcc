"""Tokens as they come: each once, in order, whatever becomes of the connection; and no growth where nobody reads."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import GatedWorker, in_thread, tiny_options, tiny_tensors, wait_until
from tiny_server import LIMITS

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.client_calls import TokenChunk
from zerokl.rollout.client_link import ServerLostError
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.sockets import RolloutServer

LONG = SamplingParams(max_tokens=60, ignore_eos=True, seed=1, n=3)


def joined(chunks: list[TokenChunk], rollouts: list[Rollout]) -> None:
    """The chunks put together are the rollouts."""
    for index, rollout in enumerate(rollouts):
        own = [chunk for chunk in chunks if chunk.index == index]
        for name in ("token_ids", "logprobs", "policy_logprobs", "policy_versions"):
            whole = np.concatenate([getattr(chunk, name) for chunk in own])
            np.testing.assert_array_equal(whole, getattr(rollout, name), err_msg=name)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_make_up_the_rollouts(client: RolloutClient, chunk: int) -> None:
    stream = client.stream(["a", "bc"], LONG, chunk=chunk)
    chunks = list(stream)
    joined(chunks, stream.rollouts())
    assert len(stream.rollouts()) == 6
    assert len(chunks) > 6 if chunk < 60 else len(chunks) == 6


def test_coroutines_get_them_too(client: RolloutClient) -> None:
    async def main() -> None:
        stream = client.stream("a", LONG, chunk=4)
        joined([chunk async for chunk in stream], stream.rollouts())

    asyncio.run(main())


def test_a_loop_that_is_left_early_gives_the_call_up(gated: Any) -> None:
    engine, worker, _, client = gated
    for _ in range(20):
        worker.gate.release()
    for _ in client.stream("a", LONG, chunk=2):
        break
    wait_until(lambda: engine._loop._inbox.num_urgent > 0 or engine.metrics()["finished_abort"] == 3)
    worker.open()
    wait_until(lambda: engine.metrics()["finished_abort"] == 3)


def test_a_broken_connection_loses_and_doubles_nothing(tiny_model: Path, gated: Any) -> None:
    _, worker, _, client = gated
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        whole = engine.generate(["a", "bc"], LONG)

    def read() -> tuple[list[TokenChunk], list[Rollout]]:
        stream = client.stream(["a", "bc"], LONG, chunk=1)
        return list(stream), stream.rollouts()

    call = in_thread(read)
    for step in range(50):
        worker.began.acquire()
        if step % 3 == 0:
            client._link.drop_connection()
        worker.gate.release()
    worker.open()
    chunks, rollouts = call()
    joined(chunks, rollouts)
    for one, other in zip(rollouts, whole, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert client.metrics()["server_clients"] == 1


def test_tokens_of_a_request_that_begins_anew_begin_anew(gated: Any) -> None:
    engine, worker, _, client = gated
    one = dataclasses.replace(LONG, n=1)
    stream = client.stream("a", one, chunk=1)
    chunks: list[TokenChunk] = []
    call = in_thread(lambda: chunks.extend(stream))
    for _ in range(6):
        worker.began.acquire()
        worker.gate.release()
    worker.began.acquire()
    update = in_thread(lambda: client.update_weights(tiny_tensors(1), mode="keep", max_staleness=0))
    wait_until(lambda: engine.health()["num_held"] == 1)
    worker.open()
    update()
    call()
    (rollout,) = stream.rollouts()
    assert rollout.num_restarts == 1 and rollout.version_spans == [(0, 60, 1)]
    assert {chunk.num_restarts for chunk in chunks} <= {0, 1}
    joined([chunk for chunk in chunks if chunk.num_restarts == 1], [rollout])


def test_who_does_not_read_makes_nothing_grow(gated: Any) -> None:
    """The client's thread is held; meanwhile one batch of tokens waits, and the rest stays in the requests."""
    import threading

    _, worker, _, client = gated
    release = threading.Event()
    stream = client.stream(["a", "bc"], LONG, chunk=1)
    chunks: list[TokenChunk] = []
    worker.gate.release()
    call = in_thread(lambda: chunks.extend(stream))
    worker.began.acquire()
    client._link._order(release.wait)
    worker.open()
    other = RolloutClient(client._link._options.endpoint)
    try:
        wait_until(lambda: other.metrics()["finished_length"] == 6)
        assert other.metrics()["server_unacknowledged_bytes"] < 100_000
    finally:
        release.set()
        other.close()
    call()
    joined(chunks, stream.rollouts())


def test_a_window_holds_results_back_until_they_are_acknowledged(tiny_model: Path, serve: Any) -> None:
    limits = dataclasses.replace(LIMITS, window_bytes=1000)
    _, client = serve(RolloutEngine(tiny_options(tiny_model)), limits)
    stream = client.stream(["a", "bc"], LONG, chunk=1)
    chunks = list(stream)
    joined(chunks, stream.rollouts())


def test_calls_beyond_the_servers_memory_wait_for_room(tiny_model: Path, serve: Any) -> None:
    limits = dataclasses.replace(LIMITS, max_queued_bytes=12_000)
    _, client = serve(RolloutEngine(tiny_options(tiny_model)), limits)

    async def main() -> list[list[Rollout]]:
        return await asyncio.gather(*[client.agenerate([index, 1], LONG) for index in range(20)])

    assert [len(rollouts) for rollouts in asyncio.run(main())] == [3] * 20
    assert client.metrics()["server_max_queued_bytes"] <= 12_000
    with pytest.raises(ValueError, match="over max_queued_bytes"):
        client.generate("a", dataclasses.replace(LONG, n=100))


def test_a_client_that_dies_has_its_requests_reaped(tiny_model: Path, gated: Any) -> None:
    engine, worker, server, client = gated
    dying = RolloutClient(server.endpoint, name="dying")
    in_flight = in_thread(lambda: dying.generate("a", LONG))
    worker.began.acquire()
    dying.close()
    with pytest.raises(ConnectionError):
        in_flight()
    wait_until(lambda: engine._loop._inbox.num_urgent > 0)
    worker.open()
    wait_until(lambda: client.metrics()["finished_abort"] == 3)
    wait_until(lambda: client.metrics()["server_queued_bytes"] < 1000)
    assert client.metrics()["server_clients"] == 1


def test_a_server_that_is_gone_or_new_is_said_so(tiny_model: Path) -> None:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        with RolloutServer("tcp://127.0.0.1:0", limits=LIMITS) as server:
            server.start(engine)
            endpoint = server.endpoint
            client = RolloutClient(endpoint, reconnect_seconds=0.5)
        with pytest.raises(ServerLostError, match=r"for 0\.5 s"):
            client.health()
        with RolloutServer(endpoint, limits=LIMITS) as server:
            server.start(engine)
            assert client.health()["state"] == "running"
        client.close()
        with pytest.raises(ConnectionError, match="closed"):
            client.health()
        with pytest.raises(ServerLostError):
            RolloutClient(endpoint, reconnect_seconds=0.2)


def test_a_stream_is_read_as_fast_as_it_comes(gated: Any) -> None:
    """The first token is there before the second step is allowed."""
    worker: GatedWorker = gated[1]
    client = gated[3]
    chunks = iter(client.stream("a", dataclasses.replace(LONG, n=1), chunk=1))
    worker.gate.release()
    assert next(chunks).start == 0
    worker.open()
    assert sum(len(chunk.token_ids) for chunk in chunks) == 59
