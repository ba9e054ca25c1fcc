"""The trainer's forward: right gradients, the engine's bits, and a plain Paddle layer to its user."""

import copy
from itertools import pairwise

import numpy as np
import paddle
import pytest
from ordinary_decoder import OrdinaryDecoder

from zerokl.integrations.policy_files import config_content
from zerokl.integrations.policy_model import PolicyModel
from zerokl.kernels.autograd.ops import AutogradOps
from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.ops import CpuOps
from zerokl.kernels.ops import StepInputs, neutral_sampling
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.decoder_params import build_params
from zerokl.rollout.models.layout import EMBED
from zerokl.rollout.models.rope import rope_table
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config

LENGTHS = (5, 1, 70, 17)
FAMILIES = {
    "llama": tiny_config("LlamaForCausalLM", tie_word_embeddings=True, attention_bias=True),
    "qwen2": tiny_config("Qwen2ForCausalLM"),
    "qwen3": tiny_config("Qwen3ForCausalLM", head_dim=24),
    "ernie": tiny_config("Ernie4_5ForCausalLM", tie_word_embeddings=True),
    "qwen3 moe": tiny_moe_config("Qwen3MoeForCausalLM"),
    "ernie moe": tiny_moe_config("Ernie4_5_MoeForCausalLM"),
}


@pytest.fixture(params=FAMILIES)
def config(request):
    return ModelConfig.from_json(FAMILIES[request.param])


@pytest.fixture
def llama():
    return ModelConfig.from_json(FAMILIES["llama"])


def batch(config, lengths=LENGTHS, seed=3):
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, sum(lengths)).astype(np.int32)
    return ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a, np.float32).view(np.int32), np.asarray(b, np.float32).view(np.int32))


def trainable(model):
    """All parameters but the corrections of routers."""
    return {name: parameter for name, parameter in model.named_tensors().items() if not parameter.stop_gradient}


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_match_an_ordinary_float64_model(config):
    tensors = random_tensors(config, seed=1)
    ids, starts = batch(config, lengths=(9, 2, 70))
    model, ordinary = PolicyModel(config, tensors), OrdinaryDecoder(config, tensors)
    logprobs, entropy = model.logprobs(ids, starts, temperature=0.8)
    parts = [ordinary.logprobs(ids[a:b], 0.8) for a, b in pairwise(starts)]
    expected, expected_entropy = (paddle.concat([part[i] for part in parts]) for i in (0, 1))
    np.testing.assert_allclose(logprobs.numpy(), expected.numpy(), atol=2e-5)
    np.testing.assert_allclose(entropy.numpy(), expected_entropy.numpy(), atol=2e-5)

    weight = np.random.default_rng(0).standard_normal(len(logprobs))
    (logprobs * paddle.to_tensor(weight.astype("float32")) + 0.3 * entropy).sum().backward()
    (expected * paddle.to_tensor(weight) + 0.3 * expected_entropy).sum().backward()
    for name, parameter in trainable(model).items():
        want = ordinary.weights[name].grad.numpy()
        error = np.abs(parameter.grad.numpy() - want).max() / np.abs(want).max()
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


def test_gradients_do_not_depend_on_threads(config):
    """Nor do they change from run to run."""
    ids, starts = batch(config)
    gradients = []
    threads = _cpu.num_threads()
    try:
        for count in (1, 2, 3, 2):
            _cpu.set_num_threads(count)
            model = PolicyModel(config, random_tensors(config, seed=1), chunk_rows=20)
            logprobs, entropy = model.logprobs(ids, starts)
            (logprobs.sum() + entropy.sum()).backward()
            gradients.append({name: p.grad.numpy() for name, p in trainable(model).items()})
    finally:
        _cpu.set_num_threads(threads)
    for other in gradients[1:]:
        for name, gradient in other.items():
            same_bits(gradient, gradients[0][name])


def test_hidden_states_feed_a_value_head(llama):
    model = PolicyModel(llama, seed=2)
    ids, starts = batch(llama)
    head = paddle.nn.Linear(llama.hidden_size, 1)
    rows = np.array([3, 70, 3])
    hidden = model.hidden_states(ids, starts, rows=rows)
    assert hidden.shape == [3, llama.hidden_size]
    same_bits(hidden.numpy(), model(ids, starts).numpy()[rows])
    head(hidden).sum().backward()
    assert np.abs(model.named_tensors()[EMBED].grad.numpy()).max() > 0
    same_bits(model.head_logprobs(hidden, [7, 8, 9])[0].numpy()[0], model.head_logprobs(hidden[:1], [7])[0].numpy())


# -- the engine's bits -------------------------------------------------------------------------------------------------


def engine_logprobs(config, tensors, ids, chunks, temperature):
    """Next-token logprobs and entropies of one sequence by the engine's ops: packed weights, paged cache, chunks."""
    ops, spec, block = CpuOps(), DecoderSpec.from_config(config), 16
    rope = rope_table(config.rope, config.head_dim, config.max_position_embeddings)
    params = build_params(ops, config, tensors, rope)
    num_blocks = -(-len(ids) // block)
    table = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    pool = ops.kv_pool(config.num_hidden_layers, num_blocks, block, spec.attention)
    results, start = [], 0
    for count in chunks:
        positions = np.arange(start, start + count, dtype=np.int32)
        start += count
        targets = ids[1:][positions[positions < len(ids) - 1]]
        sampling = neutral_sampling(len(targets), targets, temperature)
        step = StepInputs(
            token_ids=ids[positions],
            positions=positions,
            slot_mapping=table[positions // block] * block + positions % block,
            seq_starts=np.array([0, count], np.int32),
            context_lens=np.array([start], np.int32),
            block_tables=table[None, :],
            logit_rows=np.arange(len(targets), dtype=np.int32),
            sampling=sampling,
        )
        hidden = forward(ops, params, spec, step, pool)
        results.append(ops.sample(hidden, params.lm_head, sampling) if len(targets) else None)
    assert start == len(ids)
    done = [result for result in results if result is not None]
    return np.concatenate([r.policy_logprobs for r in done]), np.concatenate([r.entropy for r in done])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engine_path_gives_the_same_bits(config, temperature):
    tensors = random_tensors(config, seed=1)
    model = PolicyModel(config, tensors)
    ids, starts = batch(config)
    logprobs, entropy = model.logprobs(ids, starts, temperature=temperature)
    one_by_one = [1] * LENGTHS[2]  # decode all the way
    for chunks in ([70], [33, 36, 1], one_by_one):
        mine = slice(4, 4 + 69)  # the third sequence's rows
        sequence = ids[starts[2] : starts[3]]
        engine, engine_entropy = engine_logprobs(config, tensors, sequence, chunks, temperature)
        same_bits(logprobs.numpy()[mine], engine)
        same_bits(entropy.numpy()[mine], engine_entropy)


def differing_rows(model, order, lengths=LENGTHS):
    """Hidden rows that change in any bit when the sequences travel packed in this order instead of each alone."""
    ids, starts = batch(model.config, lengths)
    parts = [ids[a:b] for a, b in pairwise(starts)]
    offsets = np.cumsum([0, *(len(parts[i]) for i in order)])
    packed = model.hidden_states(np.concatenate([parts[i] for i in order]), offsets).numpy()
    alone = np.concatenate([model.hidden_states(parts[i], [0, len(parts[i])]).numpy() for i in order])
    return int((packed.view(np.int32) != alone.view(np.int32)).any(-1).sum())


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 2, 1)])
def test_a_sequence_does_not_see_its_batch(config, order):
    assert differing_rows(PolicyModel(config, random_tensors(config, seed=1)), order) == 0


class OrdinaryLinears(AutogradOps):
    """The same model with Paddle's own matrix product."""

    def qkv_linear(self, x, weight):
        return tuple(
            paddle.matmul(x, w, transpose_y=True) + (0.0 if b is None else b)
            for w, b in zip(weight.weights, weight.biases, strict=True)
        )


def test_ordinary_matmul_fails_what_is_tested_above(llama):
    """Negative control: a row of paddle.matmul depends on how many rows go with it."""
    random = np.random.default_rng(0)
    x, weight = (paddle.to_tensor(random.standard_normal(shape, np.float32)) for shape in ((7, 576), (576, 576)))
    rows = {m: paddle.matmul(x[:m], weight, transpose_y=True).numpy()[0] for m in (1, 3, 7)}
    assert not (np.array_equal(rows[1], rows[3]) and np.array_equal(rows[3], rows[7]))

    model = PolicyModel(llama, random_tensors(llama, seed=1))
    assert differing_rows(model, (0, 1, 2, 3), lengths=(1, 3, 7, 1)) == 0
    model._forward.ops = OrdinaryLinears()
    assert differing_rows(model, (0, 1, 2, 3), lengths=(1, 3, 7, 1)) > 0


def test_one_changed_weight_shows(llama):
    tensors = random_tensors(llama, seed=1)
    model = PolicyModel(llama, tensors)
    ids, starts = batch(llama)
    before = model.logprobs(ids, starts)[0].numpy()
    for name, array in list(tensors.items())[1:4]:
        changed = {**tensors, name: array.copy()}
        changed[name].flat[0] += 0.01
        ratio = PolicyModel(llama, changed).logprobs(ids, starts)[0].numpy().astype(np.float64) - before
        assert (np.expm1(ratio) - ratio).mean() > 0, name  # the k3 estimate


# -- a Paddle layer ----------------------------------------------------------------------------------------------------


def train(config, steps, seed=5):
    model = PolicyModel(config, seed=seed)
    optimizer = paddle.optimizer.AdamW(learning_rate=1e-3, parameters=model.parameters())
    ids, starts = batch(config, lengths=(12, 20))
    for _ in range(steps):
        logprobs, entropy = model.logprobs(ids, starts)
        (-logprobs.mean() - 0.01 * entropy.mean()).backward()
        optimizer.step()
        optimizer.clear_grad()
    return model, -float(model.logprobs(ids, starts)[0].mean())


def test_adamw_learns_and_the_forward_uses_the_new_weights(llama):
    model, before = train(llama, steps=0)
    arrays = dict(model.named_arrays())
    first = {name: array.copy() for name, array in arrays.items()}
    trained, after = train(llama, steps=5)
    assert after < before - 0.1
    for name, array in trained.named_arrays():
        assert not np.array_equal(array, first[name]), name


def test_the_same_seed_gives_the_same_weights(llama):
    one, two, other = train(llama, 3)[0], train(llama, 3)[0], train(llama, 3, seed=6)[0]
    for (name, a), (_, b) in zip(one.named_arrays(), two.named_arrays(), strict=True):
        same_bits(a, b)
        assert a.ndim == 1 or not np.array_equal(a, dict(other.named_arrays())[name])


def test_a_copy_is_a_model_of_its_own(llama):
    model = PolicyModel(llama, seed=1)
    ids, starts = batch(llama)
    before = model.logprobs(ids, starts)[0].numpy()
    frozen = copy.deepcopy(model)
    model.named_tensors()[EMBED].set_value(paddle.zeros([llama.vocab_size, llama.hidden_size]))
    same_bits(frozen.logprobs(ids, starts)[0].numpy(), before)
    assert not np.array_equal(model.logprobs(ids, starts)[0].numpy(), before)


def test_names_are_hugging_faces(config):
    model = PolicyModel(config, seed=0)
    tensors = random_tensors(config)
    assert list(model.named_tensors()) == list(tensors) == list(model.state_dict())
    assert {name: tuple(p.shape) for name, p in model.named_tensors().items()} == {
        name: t.shape for name, t in tensors.items()
    }


def test_named_arrays_alias_the_parameters(llama):
    model = PolicyModel(llama, seed=0)
    arrays = dict(model.named_arrays())
    with paddle.no_grad():
        model.named_tensors()[EMBED].set_value(paddle.ones([llama.vocab_size, llama.hidden_size]))
    assert (arrays[EMBED] == 1.0).all()
    with pytest.raises(ValueError, match="read-only"):
        arrays[EMBED][0] = 0.0


def test_save_and_load(config, tmp_path):
    model = PolicyModel(config, random_tensors(config, seed=9))
    folder = model.save_pretrained(tmp_path / "model")
    loaded = PolicyModel.from_pretrained(folder)
    for (name, a), (other, b) in zip(model.named_arrays(), loaded.named_arrays(), strict=True):
        assert name == other
        same_bits(a, b)
    ids, starts = batch(config)
    same_bits(model.logprobs(ids, starts)[0].numpy(), loaded.logprobs(ids, starts)[0].numpy())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_a_config_reads_back_as_it_was(config, rope):
    assert ModelConfig.from_json(config_content(config)) == config
    scaled = ModelConfig.from_json({**config_content(config), "rope_theta": None, "rope_parameters": rope})
    assert ModelConfig.from_json(config_content(scaled)) == scaled


def test_a_batch_without_a_row_to_score(llama):
    """Sequences of one token have no next token; the sum of nothing has no gradient and no error."""
    model = PolicyModel(llama, seed=0)
    logprobs, entropy = model.logprobs([1, 2], [0, 1, 2])
    assert logprobs.shape == [0] and entropy.shape == [0]
