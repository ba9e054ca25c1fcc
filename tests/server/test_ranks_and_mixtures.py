"""What a client gets of an engine over several ranks and of a model with mixtures: routing, and its continuation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks_engine import on_ranks, write_moe_model
from span_replay import cut

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=16, ignore_eos=True, seed=3, n=2)


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moe_model(tmp_path_factory.mktemp("moe_model"))


@pytest.fixture(params=["output", "all"])
def routed(request: pytest.FixtureRequest, moe_model: Path, serve: Any) -> tuple[RolloutEngine, RolloutClient]:
    engine = on_ranks(moe_model, return_routing=request.param)
    return engine, serve(engine)[1]


def same_routing(first: Rollout, second: Rollout) -> None:
    assert first.routing is not None and second.routing is not None
    assert first.routing.start == second.routing.start
    assert first.routing.experts.dtype == second.routing.experts.dtype
    np.testing.assert_array_equal(first.routing.experts, second.routing.experts)
    np.testing.assert_array_equal(first.routing.weights, second.routing.weights)


def test_routing_travels_and_is_continued(routed: tuple[RolloutEngine, RolloutClient]) -> None:
    engine, client = routed
    local = engine.generate([[1, 2, 3, 4]], PARAMS)
    for one, other in zip(client.generate([[1, 2, 3, 4]], PARAMS), local, strict=True):
        same_routing(one, other)
    resumed = client.generate(resume_from=[cut(rollout, 5) for rollout in local])
    for one, other in zip(resumed, local, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.policy_logprobs, other.policy_logprobs)
        same_routing(one, other)


def test_routing_of_another_form_is_refused(routed: tuple[RolloutEngine, RolloutClient]) -> None:
    engine, client = routed
    part = cut(engine.generate([[1, 2, 3, 4]], PARAMS)[0], 5)
    assert part.routing is not None
    routing = part.routing
    wrong = [
        dataclasses.replace(routing, start=routing.start + 1),
        dataclasses.replace(routing, experts=routing.experts[:, :, :1], weights=routing.weights[:, :, :1]),
        dataclasses.replace(routing, experts=routing.experts[1:], weights=routing.weights[1:]),
    ]
    for one in wrong:
        with pytest.raises(ValueError, match="routing must start at"):
            client.generate(resume_from=dataclasses.replace(part, routing=one))
    again = client.generate(resume_from=dataclasses.replace(part, routing=None))
    assert again[0].routing is not None and len(again[0].token_ids) == 16


def test_ranks_are_behind_the_server(moe_model: Path, serve: Any) -> None:
    _, client = serve(on_ranks(moe_model, expert_parallel_size=2))
    with on_ranks(moe_model) as engine:
        local = engine.generate([[1, 2, 3], [4, 5]], PARAMS)
    stream = client.stream([[1, 2, 3], [4, 5]], PARAMS, chunk=1)
    assert sum(len(chunk.token_ids) for chunk in stream) == 64
    for one, other in zip(stream.rollouts(), local, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.policy_logprobs, other.policy_logprobs)
    assert [facts["rank"] for facts in client.health()["ranks"]] == [0, 1] and len(client.describe_ranks()) == 2
    assert client.expert_load().total.sum() > 0
    assert client.rebalance_experts() >= 0
    client.pause_generation("keep")
    client.resume_generation()
