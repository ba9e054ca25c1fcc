"""Processes that die or are told to end: ranks, clients, the server itself, and a second server at its side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from leftovers import children_of, segments_of, wait_for_end
from server_process import address_of, server_process
from tiny_engine import in_thread, tiny_options, tiny_tensors, wait_until

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.client_link import ServerLostError
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineClosedError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

PROMPTS = [[1, 2, 3, index] for index in range(6)]
PARAMS = SamplingParams(n=2, max_tokens=60, ignore_eos=True, seed=1)
ENDLESS = SamplingParams(max_tokens=250, ignore_eos=True, seed=1)


def two_ranks(model: Path, endpoint: str, *options: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """A `rollout-server` of two ranks that soon misses a client."""
    limits = ("--limit", "heartbeat_seconds=0.2", "--limit", "session_seconds=1.0")
    return server_process(model, endpoint, "--ranks", "2", *limits, *options)


def bits(rollouts: list[Rollout]) -> list[tuple[bytes, bytes]]:
    return [(rollout.token_ids.tobytes(), rollout.logprobs.tobytes()) for rollout in rollouts]


def test_a_second_server_is_refused_and_touches_nothing_of_the_first_which_survives_its_ranks(
    tiny_model: Path, tmp_path: Path
) -> None:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        engine.update_weights(tiny_tensors(1))
        expected = bits(engine.generate(PROMPTS, PARAMS))
    with two_ranks(tiny_model, f"ipc://{tmp_path}/socket") as server:
        endpoint = address_of(server)
        with RolloutClient(endpoint) as client:
            client.update_weights(tiny_tensors(1))
            segments = segments_of(server.pid)
            assert segments, "the copy of the weights"
            with two_ranks(tiny_model, endpoint) as second:
                _, errors = second.communicate(timeout=30)
            assert second.returncode == 3 and "is taken by another server" in errors
            assert segments_of(server.pid) == segments
            call = in_thread(lambda: client.generate(PROMPTS, PARAMS))
            wait_until(lambda: client.metrics()["steps"] > 5)
            os.kill(client.health()["ranks"][1]["pid"], signal.SIGKILL)
            assert bits(call()) == expected
            os.kill(client.health()["ranks"][0]["pid"], signal.SIGSTOP)
            assert bits(client.generate(PROMPTS, PARAMS)) == expected
            assert client.metrics()["rank_restarts"] == 2
            ranks = children_of(server.pid)
            os.killpg(server.pid, signal.SIGTERM)  # as the end of a service does: ranks leave it to the server
            assert server.wait(20) == 0
        assert all(wait_for_end(pid) for pid in ranks) and segments_of(server.pid) == []


_CLIENT = """
import sys
from zerokl.rollout.client import RolloutClient
from zerokl.rollout.sampling_params import SamplingParams
client = RolloutClient(sys.argv[1])
client.generate([[1, 2]] * 40, SamplingParams(max_tokens=250, ignore_eos=True))
"""


def test_the_requests_of_a_client_that_is_killed_are_reaped(tiny_model: Path, tmp_path: Path) -> None:
    with two_ranks(tiny_model, f"ipc://{tmp_path}/socket", "--set", "max_num_seqs=1") as server:
        endpoint = address_of(server)
        with (
            RolloutClient(endpoint) as client,
            subprocess.Popen([sys.executable, "-c", _CLIENT, endpoint]) as other,
        ):
            wait_until(lambda: client.health()["num_running"] + client.health()["num_waiting"] > 30)
            other.kill()
            wait_until(lambda: client.health()["num_running"] + client.health()["num_waiting"] == 0)
            metrics = client.metrics()
            assert metrics["server_clients"] == 1 and metrics["server_queued_bytes"] < 100  # this very call's
            assert metrics["finished_abort"] > 30
            assert len(client.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_sigterm_ends_a_busy_server_within_its_bound(tiny_model: Path, tmp_path: Path) -> None:
    """What is in flight comes back with the tokens so far."""
    options = ["--drain-timeout", "0.2", "--set", "max_num_seqs=1"]
    with two_ranks(tiny_model, f"ipc://{tmp_path}/socket", *options) as server:
        with RolloutClient(address_of(server)) as client:
            call = in_thread(lambda: client.generate([[1, 2]] * 40, ENDLESS))
            wait_until(lambda: client.metrics()["steps"] > 5)
            ranks = children_of(server.pid)
            server.send_signal(signal.SIGTERM)
            rollouts = call()
            assert server.wait(30) == 0
        assert {rollout.finish_reason for rollout in rollouts} == {"abort"}
        assert any(0 < len(rollout.token_ids) < 250 for rollout in rollouts)
        assert all(wait_for_end(pid) for pid in ranks) and segments_of(server.pid) == []


@pytest.mark.slow
def test_sigterm_ends_a_server_with_a_rank_that_does_nothing_within_its_bound(tiny_model: Path, tmp_path: Path) -> None:
    options = ["--drain-timeout", "0.2", "--rank-heartbeat-timeout", "600"]
    with two_ranks(tiny_model, f"ipc://{tmp_path}/socket", *options) as server:
        with RolloutClient(address_of(server)) as client:
            call = in_thread(lambda: client.generate([[1, 2]] * 40, ENDLESS))
            wait_until(lambda: client.metrics()["steps"] > 5)
            ranks = children_of(server.pid)
            os.kill(ranks[0], signal.SIGSTOP)
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0  # 0.2 s of drain, 2 s for clients to fetch, 5 s for the step
            client.close()
            with pytest.raises((EngineClosedError, ServerLostError, ConnectionError)):
                call()
        assert all(wait_for_end(pid) for pid in ranks) and segments_of(server.pid) == []
