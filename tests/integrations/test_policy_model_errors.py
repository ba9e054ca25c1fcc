"""What PolicyModel refuses, and the field, value and bound that its message names."""

import numpy as np
import pytest

from zerokl.integrations.policy_model import PolicyModel
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config


@pytest.fixture
def llama():
    return ModelConfig.from_json(tiny_config())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": [1, 96, 2]}, r"token_ids\[1\] must be in \[0, 96\), got 96"),
        ({"token_ids": [1, -1, 2]}, r"token_ids\[1\] must be in \[0, 96\), got -1"),
        ({"token_ids": [[1, 2, 3]]}, r"token_ids must have one dimension, got shape \(1, 3\)"),
        ({"token_ids": [1.0, 2.0, 3.0]}, r"token_ids must hold integers, got dtype float64"),
        ({"cu_seqlens": [0]}, r"cu_seqlens must have at least 2 entries, got 1"),
        ({"cu_seqlens": [0, 2]}, r"cu_seqlens must run from 0 to 3 \(tokens given\), got 0 to 2"),
        ({"cu_seqlens": [1, 3]}, r"cu_seqlens must run from 0 to 3 \(tokens given\), got 1 to 3"),
        ({"cu_seqlens": [0, 1, 1, 3]}, r"cu_seqlens must ascend: sequence 1 has 0 tokens"),
        ({"cu_seqlens": [0, 4, 3]}, r"cu_seqlens must ascend: sequence 1 has -1 tokens"),
        ({"rows": [0, 3]}, r"rows\[1\] must be in \[0, 3\), got 3"),
        ({"rows": [0, 2]}, r"rows\[1\] is 2, the last token of its sequence"),
        ({"temperature": 0.0}, r"temperature must be finite and above 0, got 0.0"),
        (
            {"token_ids": [1] * 300, "cu_seqlens": [0, 300]},
            r"sequence 0 has 300 tokens, the model holds at most max_position_embeddings=256",
        ),
    ],
)
def test_bad_batches_are_refused(llama, arguments, message):
    model = PolicyModel(llama, seed=0)
    with pytest.raises(ValueError, match=message):
        model.logprobs(**{"token_ids": [1, 2, 3], "cu_seqlens": [0, 3], **arguments})


def test_bad_routing_is_refused(llama):
    ids, starts, good = [1, 2, 3], [0, 3], np.tile(np.arange(3), (2, 3, 1))
    with pytest.raises(ValueError, match="routing must be None: LlamaForCausalLM has no mixture of experts"):
        PolicyModel(llama).logprobs(ids, starts, routing=good)
    model = PolicyModel(ModelConfig.from_json(tiny_moe_config()))
    model.logprobs(ids, starts, routing=good)
    with pytest.raises(ValueError, match=r"routing must hold integers in shape \(2, 3, 3\), got int64 in shape"):
        model.logprobs(ids, starts, routing=good[:1])
    with pytest.raises(ValueError, match=r"routing\[2\] must be in \[0, 8\), got 8"):
        model.logprobs(ids, starts, routing=np.where(good == 2, 8, good))
    with pytest.raises(ValueError, match=r"routing\[0, 0\] must hold distinct experts, got \[0, 1, 1\]"):
        model.logprobs(ids, starts, routing=np.where(good == 2, 1, good))
    with pytest.raises(ValueError, match=r"routing\[2\] must be in \[0, 8\), got -1"):
        model.logprobs(ids, starts, routing=np.where(good == 2, -1, good))
    with pytest.raises(ValueError, match=r"routing\[0\] must be in \[0, 8\), got -2"):
        model.logprobs(ids, starts, routing=np.full_like(good, -2))


def test_bad_routing_weights_are_refused():
    model = PolicyModel(ModelConfig.from_json(tiny_moe_config()))
    ids, starts, experts = [1, 2, 3], [0, 3], np.tile(np.arange(3), (2, 3, 1))
    experts[:, 2] = -1
    weights = np.full(experts.shape, 0.5, np.float32)
    weights[:, 2] = np.nan  # of rows that are not given
    model.logprobs(ids, starts, routing=experts, routing_weights=weights)
    with pytest.raises(ValueError, match="routing_weights must be None where routing is"):
        model.logprobs(ids, starts, routing_weights=weights)
    for wrong in (weights.astype(np.float64), weights[:1]):
        with pytest.raises(ValueError, match=r"routing_weights must be float32 in shape \(2, 3, 3\), got"):
            model.logprobs(ids, starts, routing=experts, routing_weights=wrong)
    weights[1, 0, 2] = np.inf
    with pytest.raises(ValueError, match=r"routing_weights\[1, 0, 2\] must be finite, got inf"):
        model.logprobs(ids, starts, routing=experts, routing_weights=weights)


def test_bad_construction_is_refused(llama):
    tensors = random_tensors(llama)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        PolicyModel(llama, tensors)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        PolicyModel(llama, chunk_rows=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        PolicyModel(llama, seed=-1)
