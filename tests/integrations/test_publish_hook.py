"""An optimizer that publishes: every k-th step reaches the engine, and only a step that was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import tiny_options, tiny_tensors, write_tiny_model

from zerokl.integrations import PublishEvery
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync import WeightPublisher

paddle = pytest.importorskip("paddle")


def test_every_second_step_is_published(tmp_path: Path) -> None:
    tensors = tiny_tensors(0)
    norm = paddle.create_parameter([64], "float32", default_initializer=paddle.nn.initializer.Assign(np.ones(64)))
    optimizer = paddle.optimizer.SGD(learning_rate=0.1, parameters=[norm])

    def named_arrays() -> dict[str, Any]:
        return tensors | {"model.norm.weight": norm.numpy()}

    def train_step() -> None:
        (norm * norm).sum().backward()
        optimizer.step()
        optimizer.clear_grad()

    with RolloutEngine(tiny_options(write_tiny_model(tmp_path))) as engine, WeightPublisher() as publisher:
        with PublishEvery(optimizer, named_arrays, engine, publisher, every=2, mode="keep") as hook:
            versions = []
            for _ in range(5):
                train_step()
                versions.append(engine.get_weight_version())
            assert versions == [0, 1, 1, 2, 2] and hook.num_steps == 5
            assert hook.publish() == 3
        train_step()
        assert engine.get_weight_version() == 3, "a closed hook leaves the optimizer alone"
        params = SamplingParams(max_tokens=4, seed=0)
        served = engine.generate("a", params)[0]
        engine.update_weights(named_arrays())
        assert not np.array_equal(engine.generate("a", params)[0].logprobs, served.logprobs)
        with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
            PublishEvery(optimizer, named_arrays, engine, publisher, every=0)
