"""The exactness tests can fail: with ordinary matrix products in place of ours, the same comparisons find differences.

Nothing is disturbed on purpose: NumPy's and Paddle's products pick their order of additions by the number of rows.
"""

from __future__ import annotations

import numpy as np
import paddle  # here: Paddle computes nothing in other threads if it is first imported outside the main one
import pytest
from exactness_harness import Job, differences, differing, run, run_variant, score_differences
from ordinary_ops import Floats, OrdinaryOps, engines_use, numpy_product

from zerokl.kernels.cpu.ops import CpuOps
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.loader import open_tensors


def paddle_product(x: Floats, weight: Floats) -> Floats:
    return paddle.matmul(paddle.to_tensor(x), paddle.to_tensor(weight), transpose_y=True).numpy()


PRODUCTS = {"numpy": numpy_product, "paddle": paddle_product}


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_comparisons_find_ordinary_products_out(tiny_job: Job, product: str) -> None:
    with engines_use(lambda num_threads: OrdinaryOps(PRODUCTS[product], num_threads)):
        plain = run(tiny_job)
        again = differences(plain.rollouts, run(tiny_job).rollouts)
        assert again["policy_logprobs"] == 0, "the same run repeats its bits"
        assert score_differences(plain)["policy_logprobs"] > 0
        for variant in ("batch 1", "batch 3", "tokens 16", "preempted"):
            changed = run_variant(tiny_job, variant)
            assert differences(changed.rollouts, plain.rollouts)["policy_logprobs"] > 0, variant


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_row_of_an_ordinary_product_depends_on_its_batch_and_of_ours_it_does_not(
    smollm2_job: Job, product: str
) -> None:
    config = ModelConfig.from_json(smollm2_job.folder)
    tensors = open_tensors(smollm2_job.folder, config)
    x = np.ascontiguousarray(tensors["model.embed_tokens.weight"][smollm2_job.prompts[1][:7]])
    ops = CpuOps()
    counts = {"ordinary": 0, "ours": 0}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"):
        weight = np.ascontiguousarray(tensors[f"model.layers.0.{name}.weight"])
        packed = ops.pack_linear([weight], [None])
        ordinary = [PRODUCTS[product](x[:rows], weight) for rows in (1, 3, 7)]
        ours = [ops.linear(x[:rows], packed).copy() for rows in (1, 3, 7)]
        for few, many in ((0, 1), (0, 2), (1, 2)):
            counts["ordinary"] += differing(ordinary[few].ravel(), ordinary[many][: len(ordinary[few])].ravel())
            counts["ours"] += differing(ours[few].ravel(), ours[many][: len(ours[few])].ravel())
    assert counts["ordinary"] > 0
    assert counts["ours"] == 0
