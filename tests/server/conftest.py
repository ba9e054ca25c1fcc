"""Engines and servers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import GatedWorker, gated_engine, tiny_options, write_tiny_model
from tiny_server import LIMITS

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.server.limits import ServerLimits
from zerokl.rollout.server.sockets import RolloutServer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[RolloutServer, RolloutClient]]]:
    """Serve an engine, with a client; everything is closed after the test."""
    with ExitStack() as stack:

        def start(engine: RolloutEngine, limits: ServerLimits = LIMITS, **options: Any) -> Any:
            server = RolloutServer("tcp://127.0.0.1:0", limits=limits)
            server.start(engine)
            client = RolloutClient(server.endpoint, **options)
            stack.callback(engine.close)
            stack.callback(server.close)
            stack.callback(client.close)
            return server, client

        yield start


@pytest.fixture
def client(tiny_model: Path, serve: Any) -> RolloutClient:
    """A client of a server with a tiny engine."""
    _, client = serve(RolloutEngine(tiny_options(tiny_model)))
    return client


@pytest.fixture
def gated(tiny_model: Path, serve: Any) -> tuple[RolloutEngine, GatedWorker, RolloutServer, RolloutClient]:
    """The same on an engine whose steps wait for permits."""
    engine, worker = gated_engine(tiny_model)
    server, client = serve(engine)
    return engine, worker, server, client
