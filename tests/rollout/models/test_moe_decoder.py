"""Mixtures of experts against float64 with the CPU's own choice of experts replayed into the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ranks_rig import communicators, each

from zerokl.kernels.cpu.ops import CpuOps
from zerokl.kernels.dispatch import spread_experts
from zerokl.kernels.reference.ops import ReferenceOps
from zerokl.rollout.expert_parallel.placement import ExpertPlacement, RankExperts
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.decoder_params import build_params
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


def logits(
    ops: Any, content: dict[str, Any], seed: int, routing: NDArray[np.int32] | None, share: Any = None
) -> NDArray[Any]:
    """[T, V] of one prefill step."""
    config = ModelConfig.from_json(content)
    spec = DecoderSpec.from_config(config)
    rope = rope_table(config.rope, config.head_dim, 256)
    params = build_params(ops, config, random_tensors(config, seed), rope, share=share)
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


@pytest.mark.parametrize("family", ["Qwen3MoeForCausalLM", "Ernie4_5_MoeForCausalLM"])
def test_two_ranks_agree_with_float64_and_with_one(family: str) -> None:
    """Each rank holds half of the experts and prefills the same tokens, so that both choose alike."""
    content, one = tiny_moe_config(family), RecordingOps()
    expected = logits(one, content, 0, None)
    placement = ExpertPlacement.initial(2, 8, 2)
    with communicators(2) as ends:

        def work(rank: int) -> NDArray[Any]:
            ops = CpuOps()
            spread_experts(ops, ends[rank])
            return logits(ops, content, 0, None, RankExperts(placement, rank))

        for ours in each(2, work):
            np.testing.assert_array_equal(ours, expected)
            assert np.abs(ours - logits(ReferenceOps(), content, 0, np.stack(one.chosen))).max() < 1e-4
