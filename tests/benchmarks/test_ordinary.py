"""The ordinary bfloat16 forward is right up to its roundings, and the comparison with it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ordinary import OrdinaryOps, rounded
from reference import (
    Forward,
    _exact_logits,
    _float_logits,
    _rounded_logits,
    error_row,
    reference_rows,
    weights_as_served,
)

from zerokl.kernels.reference.ops import ReferenceOps
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config

CONTENT = tiny_config("Qwen3ForCausalLM", num_hidden_layers=3, eos_token_id=2)


@pytest.fixture(scope="module")
def weights() -> Any:
    return weights_as_served(random_tensors(ModelConfig.from_json(CONTENT), 1, gain=2.0))


@pytest.fixture(scope="module")
def errors(weights: Any) -> Any:
    config = ModelConfig.from_json(CONTENT)
    sequences = [np.random.default_rng(4).integers(10, 96, 60).astype(np.int32)]
    exact = Forward(ReferenceOps(), config, weights).logprobs(sequences, [_exact_logits])[0][0]
    usual = Forward(OrdinaryOps(), config, weights).logprobs(sequences, [_rounded_logits, _float_logits])
    return exact, usual[0][0], usual[1][0]


def test_rounding_is_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 0.0], np.float32)
    np.testing.assert_array_equal(rounded(values), np.array([1.0, 1.0, 1.015625, -3.140625, 0.0], np.float32))
    np.testing.assert_array_equal(rounded(rounded(values)), rounded(values))


def test_the_ordinary_forward_is_right_to_its_roundings(errors: Any) -> None:
    exact, usual, with_float_logits = errors
    assert exact.dtype == np.float64
    assert 1e-4 < np.abs(with_float_logits - exact).mean() < 0.2
    assert np.corrcoef(usual, exact)[0, 1] > 0.99


def test_errors_above_the_bound_do_not_pass(errors: Any) -> None:
    exact, usual, _ = errors
    assert error_row(usual, usual, exact)["passed"]
    assert error_row(exact + 0.5 * (usual - exact), usual, exact)["ratio_mean"] == pytest.approx(0.5)
    assert not error_row(exact + 1.2 * (usual - exact), usual, exact)["passed"]


def test_the_part_runs_over_an_engine(tmp_path: Path, weights: Any) -> None:
    """On the CPU, whose float32 forward has far smaller errors."""
    folder = save_pretrained(tmp_path / "model", CONTENT | {"max_position_embeddings": 256}, weights)
    rows = reference_rows(["smollm2"], tmp_path, folder, device="cpu")
    assert [row["ordinary_logits"] for row in rows] == ["bfloat16", "float32"]
    assert all(row["passed"] and row["ratio_rms"] < 0.1 for row in rows)
