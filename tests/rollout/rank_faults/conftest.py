"""Engines for the tests of lost ranks, and what nothing disturbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rank_faults_rig import RESTARTS, SPREAD, sampled
from ranks_engine import on_ranks

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout


@pytest.fixture(scope="module")
def engine_of(moe_model: Path) -> Iterator[Callable[[str], RolloutEngine]]:
    """One engine for each way to spread the model, for tests that leave it as they found it, whatever its pids."""
    engines: dict[str, RolloutEngine] = {}

    def get(spread: str) -> RolloutEngine:
        if spread not in engines:
            engines[spread] = on_ranks(moe_model, return_routing="all", max_rank_restarts=RESTARTS, **SPREAD[spread])
        return engines[spread]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def expected(moe_model: Path) -> list[Rollout]:
    """What an engine of one rank in this process gives, which nothing disturbs."""
    with on_ranks(moe_model, return_routing="all") as engine:
        return sampled(engine)
