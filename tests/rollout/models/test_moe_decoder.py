"""Mixtures of experts against float64 with the CPU's own choice of experts replayed into the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zerokl.kernels.cpu.ops import CpuOps
from zerokl.kernels.reference.ops import ReferenceOps
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, build_params, forward
from zerokl.rollout.models.rope import rope_table
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_moe_config

TOKENS = np.random.default_rng(0).integers(0, 96, 120).astype(np.int32)


class RecordingOps(CpuOps):
    """CpuOps that keep what their routers choose."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[NDArray[np.int32]] = []

    def route(self, x: Any, params: Any, spec: Any) -> Any:
        routing = super().route(x, params, spec)
        self.chosen.append(routing.experts)
        return routing


def logits(ops: Any, content: dict[str, Any], seed: int, routing: NDArray[np.int32] | None) -> NDArray[Any]:
    """[T, V] of one prefill step."""
    config = ModelConfig.from_json(content)
    spec = DecoderSpec.from_config(config)
    params = build_params(ops, config, random_tensors(config, seed), rope_table(config.rope, config.head_dim, 256))
    inputs = replace(step_inputs([TOKENS], [0], [list(range(8))], 16), routing=routing)
    pool = ops.kv_pool(config.num_hidden_layers, 8, 16, spec.attention)
    return np.array(ops.linear(forward(ops, params, spec, inputs, pool), params.lm_head))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", ["Qwen3MoeForCausalLM", "Ernie4_5_MoeForCausalLM"])
def test_logits_agree_with_float64_under_the_same_choice(family: str, seed: int) -> None:
    content, ops = tiny_moe_config(family), RecordingOps()
    ours = logits(ops, content, seed, None)
    chosen = np.stack(ops.chosen)
    assert chosen.shape == (2, len(TOKENS), 3) and len(np.unique(chosen)) == 8
    assert np.abs(ours - logits(ReferenceOps(), content, seed, chosen)).max() < 1e-4
    # The control: another expert in one slot of one token is seen.
    chosen[1, 60, 2] = next(expert for expert in range(8) if expert not in chosen[1, 60])
    assert np.abs(ours - logits(ReferenceOps(), content, seed, chosen)).max() > 1e-3


def test_replayed_choices_give_the_same_bits() -> None:
    content, ops = tiny_moe_config("Ernie4_5_MoeForCausalLM"), RecordingOps()
    ours = logits(ops, content, 0, None)
    np.testing.assert_array_equal(logits(CpuOps(), content, 0, np.stack(ops.chosen)), ours)
