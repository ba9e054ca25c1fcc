"""Right, not only equal: the engine on real weights against an independent float64 forward."""

import numpy as np
import pytest
from independent_llama import IndependentLlama

from zerokl.kernels.dispatch import get_ops
from zerokl.kernels.ops import StepInputs, neutral_sampling
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.decoder_params import build_params
from zerokl.rollout.models.loader import open_tensors
from zerokl.rollout.models.rope import rope_table
from zerokl.rollout.sampling_params import SamplingParams

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = (
    CHAT.format("What is the capital of France?") + "The capital of France is Paris.<|im_end|>",
    CHAT.format("Write a haiku about the sea.")
    + "Waves kiss the cold shore,\nsalt wind hums an ancient song,\nthe moon pulls them home.",
    CHAT.format("What is 12 + 30?") + "12 + 30 = 42.<|im_end|>",
)


@pytest.fixture(scope="module")
def engine(smollm2_folder):
    with RolloutEngine(EngineConfig(model=str(smollm2_folder), max_model_len=256, kv_cache_bytes=64 << 20)) as engine:
        yield engine


@pytest.fixture(scope="module")
def yardstick(smollm2_folder):
    return IndependentLlama(smollm2_folder, np.float64)


@pytest.fixture(scope="module")
def sequences(engine):
    return [engine.tokenizer.encode(text).tolist() for text in TEXTS]


@pytest.fixture(scope="module")
def exact_logits(yardstick, sequences):
    return [yardstick.logits(ids) for ids in sequences]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def engine_logits(folder, ids):
    """[T, V] from the very ops of the engine: one prefill step, then the LM head."""
    config = ModelConfig.from_json(folder)
    ops, spec = get_ops("cpu"), DecoderSpec.from_config(config)
    rope = ops.tensor(rope_table(config.rope, config.head_dim, 256))
    params = build_params(ops, config, open_tensors(folder, config), rope, keep=ops.tensor)
    count = len(ids)
    inputs = StepInputs(
        token_ids=np.array(ids, np.int32),
        positions=np.arange(count, dtype=np.int32),
        slot_mapping=np.arange(count, dtype=np.int32),
        seq_starts=np.array([0, count], np.int32),
        context_lens=np.array([count], np.int32),
        block_tables=np.arange(-(-count // 16), dtype=np.int32)[None],
        logit_rows=np.arange(count, dtype=np.int32),
        sampling=neutral_sampling(count),
    )
    pool = ops.kv_pool(config.num_hidden_layers, 16, 16, spec.attention)
    hidden = forward(ops, params, spec, inputs, pool)
    return ops.linear(hidden, params.lm_head).copy()


def test_greedy_answer(engine):
    (rollout,) = engine.generate(
        [CHAT.format("What is the capital of France?")], SamplingParams(temperature=0, max_tokens=16)
    )
    assert "Paris" in rollout.text
    assert rollout.finish_reason == "stop"


def test_chosen_token_logprobs_agree_with_float64(engine, sequences, exact_logits):
    for ids, logits, scored in zip(sequences, exact_logits, engine.score(sequences), strict=True):
        exact = log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
        assert np.abs(scored - exact).max() < 1e-4


def test_logits_agree_with_float64_as_well_as_a_float32_forward_does(sequences, exact_logits, smollm2_folder):
    ordinary = IndependentLlama(smollm2_folder, np.float32)
    ours, theirs = [], []
    for ids, exact in zip(sequences, exact_logits, strict=True):
        ours.append(np.abs(engine_logits(smollm2_folder, ids) - exact).ravel())
        theirs.append(np.abs(ordinary.logits(ids) - exact).ravel())
    error, usual = np.concatenate(ours), np.concatenate(theirs)
    print(
        f"max {error.max():.2e}, p99.9 {np.quantile(error, 0.999):.2e}, float32 p99.9 {np.quantile(usual, 0.999):.2e}"
    )
    assert error.max() < 1e-3
    assert np.mean(error < 1e-4) > 0.99
    assert np.quantile(error, 0.999) <= 2 * np.quantile(usual, 0.999)


def test_a_wrong_forward_is_seen(engine, yardstick, sequences):
    """The negative control: the same comparison with one weight row scaled by 1.001 fails."""
    ids = sequences[0]
    (scored,) = engine.score([ids])
    weight = yardstick.weights["model.layers.7.mlp.down_proj.weight"]
    kept = weight[3].copy()
    weight[3] *= 1.001
    try:
        wrong = log_softmax(yardstick.logits(ids))[np.arange(len(ids) - 1), ids[1:]]
    finally:
        weight[3] = kept
    assert np.abs(scored - wrong).max() > 1e-4
