"""The reference ops against direct computations, so that what defines the others is itself checked."""

import subprocess
import sys

import numpy as np
import pytest

from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, Ops, StepInputs, neutral_sampling
from zerokl.kernels.reference import attention, elementwise
from zerokl.kernels.reference.ops import ReferenceOps
from zerokl.kernels.reference.sampling import sample_rows, truncate


def rope_table(positions, half):
    angles = np.arange(positions)[:, None] / 100.0 ** (np.arange(half) / half)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def spec_of(heads=4, kv_heads=2, size=6, layout="half"):
    return AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=size, scale=size**-0.5, rotary_layout=layout, norm_eps=1e-6
    )


def test_loads_numpy_alone():
    code = "import sys, zerokl.kernels.reference.ops; print([m for m in sys.modules if 'paddle' in m or '_cpu' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_linear_and_packing():
    rng = np.random.default_rng(0)
    x, a, b, bias = rng.normal(size=(3, 5)), rng.normal(size=(4, 5)), rng.normal(size=(2, 5)), rng.normal(size=4)
    ops = ReferenceOps()
    fused = ops.linear(x, ops.pack_linear([a, b], [bias, None]))
    by_hand = [[sum(x[t, k] * w[k] for k in range(5)) for w in np.concatenate([a, b])] for t in range(3)]
    np.testing.assert_allclose(fused, np.array(by_hand) + np.append(bias, [0, 0]), rtol=1e-12)
    np.testing.assert_allclose(ops.linear(x, ops.pack_linear([b], [None])), np.array(by_hand)[:, 4:], rtol=1e-12)
    gated = ops.swiglu_linear(x, ops.pack_gate_up(a, a))
    y = x @ a.T
    np.testing.assert_allclose(gated, y * y / (1 + np.exp(-y)), rtol=1e-12)


def test_swiglu_at_extremes():
    with np.errstate(all="raise", under="ignore", over="ignore"):
        out = elementwise.swiglu(np.array([-1e4, -50.0, 0.0, 50.0, 1e4]), np.ones(5))
    np.testing.assert_allclose(out, [0, -50 * np.exp(-50), 0, 50, 1e4], atol=1e-30)


def test_rms_norm():
    x, w = np.array([[3.0, -4.0], [0.0, 0.0]]), np.array([1.0, 2.0])
    np.testing.assert_allclose(elementwise.rms_norm(x, w, 0.5), [[3 / 13**0.5, -8 / 13**0.5], [0, 0]])
    total, normed = ReferenceOps().add_rms_norm(x, x, w, 0.5)
    np.testing.assert_array_equal(total, 2 * x)
    np.testing.assert_array_equal(normed, elementwise.rms_norm(2 * x, w, 0.5))


def test_rotation_is_multiplication_by_a_unit_complex_number():
    rng = np.random.default_rng(1)
    x, positions, table = rng.normal(size=(5, 2, 8)), np.array([0, 3, 3, 9, 1], np.int32), rope_table(10, 4)
    turn = (table[positions, 0] + 1j * table[positions, 1])[:, None]
    half = elementwise.rotate(x, positions, table, "half")
    expected = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(half, np.concatenate([expected.real, expected.imag], axis=-1))
    pairs = elementwise.rotate(x, positions, table, "interleaved")
    np.testing.assert_allclose(pairs[..., ::2] + 1j * pairs[..., 1::2], (x[..., ::2] + 1j * x[..., 1::2]) * turn)


def test_causal_attention_is_masked_softmax():
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(5, 4, 6)), rng.normal(size=(5, 2, 6)), rng.normal(size=(5, 2, 6))
    out = attention.causal_attention(q, k, v, 0, 0.3)
    for head in range(4):
        scores = np.where(np.tri(5, dtype=bool), q[:, head] @ k[:, head // 2].T * 0.3, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out[:, head], weights @ v[:, head // 2], rtol=1e-12)


def step_inputs(chunks, block_size, tables):
    """One step; chunks: per sequence (first position, tokens)."""
    positions = np.concatenate([np.arange(first, first + count) for first, count in chunks]).astype(np.int32)
    owner = np.repeat(np.arange(len(chunks)), [count for _, count in chunks])
    return StepInputs(
        token_ids=np.zeros(len(positions), np.int32),
        positions=positions,
        slot_mapping=(tables[owner, positions // block_size] * block_size + positions % block_size).astype(np.int32),
        seq_starts=np.cumsum([0, *(count for _, count in chunks)]).astype(np.int32),
        context_lens=np.array([first + count for first, count in chunks], np.int32),
        block_tables=tables,
        logit_rows=np.zeros(0, np.int32),
        sampling=neutral_sampling(0),
    )


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("block_size", [8, 16])
def test_paging_and_chunks_change_nothing(layout, block_size):
    """Two sequences at once in shuffled blocks and in chunks against each alone, straight through."""
    rng = np.random.default_rng(3)
    spec, lengths = spec_of(layout=layout), (21, 13)
    table = rope_table(32, 3)
    norm = LayerParams(*[None] * 2, rng.normal(size=6), rng.normal(size=6), *[None] * 4)
    qkv = [rng.normal(size=(length, 8 * 6)) for length in lengths]
    ops = ReferenceOps()
    pool = ops.kv_pool(1, 8, block_size, spec)
    tables = np.array([[5, 2, 7], [0, 6, 1]], np.int32)
    done: list[list[np.ndarray]] = [[], []]
    for chunks in (((0, 9), (0, 0)), ((9, 11), (0, 12)), ((20, 1), (12, 1))):
        ops.begin_step(step_inputs(chunks, block_size, tables), pool)
        rows = np.concatenate([x[first : first + n] for x, (first, n) in zip(qkv, chunks, strict=True)])
        out = ops.attention(rows, 0, norm, table, spec)
        done[0].append(out[: chunks[0][1]])
        done[1].append(out[chunks[0][1] :])
    for x, length, parts in zip(qkv, lengths, done, strict=True):
        heads, positions = x.reshape(length, 8, 6), np.arange(length, dtype=np.int32)
        q = elementwise.rotate(elementwise.rms_norm(heads[:, :4], norm.q_norm, 1e-6), positions, table, layout)
        k = elementwise.rotate(elementwise.rms_norm(heads[:, 4:6], norm.k_norm, 1e-6), positions, table, layout)
        whole = attention.causal_attention(q, k, heads[:, 6:], 0, spec.scale)
        np.testing.assert_allclose(np.concatenate(parts), whole.reshape(length, -1), rtol=1e-11)


def test_padding_is_ignored():
    ops, spec = ReferenceOps(), spec_of(heads=1, kv_heads=1, size=2)
    pool = KVPool(keys=np.full((1, 2, 1, 2, 8), 7.0), values=np.full((1, 2, 1, 8, 2), 7.0), block_size=8)
    inputs = StepInputs(
        token_ids=np.zeros(3, np.int32),
        positions=np.zeros(3, np.int32),
        slot_mapping=np.array([8, -1, -1], np.int32),
        seq_starts=np.array([0, 1, 1], np.int32),
        context_lens=np.array([1, 0], np.int32),
        block_tables=np.array([[1], [-1]], np.int32),
        logit_rows=np.zeros(0, np.int32),
        sampling=neutral_sampling(0),
    )
    ops.begin_step(inputs, pool)
    out = ops.attention(np.arange(18.0).reshape(3, 6), 0, LayerParams(*[None] * 8), rope_table(4, 1), spec)
    np.testing.assert_array_equal(out, [[4, 5], [0, 0], [0, 0]])
    assert np.all(pool.keys[0, 0] == 7) and np.all(pool.values[0, 1, :, 1:] == 7)


def test_truncation_by_hand():
    x = np.log(np.array([0.1, 0.4, 0.2, 0.2, 0.1], np.float32))
    masses = np.array([1, 4, 2, 2, 1], np.uint64) * np.uint64(2**38)

    def kept(top_k=0, top_p=1.0, min_p=0.0):
        return np.flatnonzero(truncate(x, masses, top_k, top_p, min_p)).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 2]
    assert kept(top_p=0.4) == [1]
    assert kept(top_p=0.41) == [1, 2]
    assert kept(top_p=0.61) == [1, 2, 3]
    assert kept(top_k=3, top_p=0.5) == [1]
    assert kept(top_k=3, top_p=0.51) == [1, 2]
    assert kept(min_p=0.5) == [1, 2, 3]
    assert kept(min_p=0.51) == [1]
    assert kept(top_p=1e-30) == [1]


def test_sampled_rows_by_hand():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    rows = sample_rows(np.log(np.repeat(p[None], 4, axis=0)), neutral_sampling(4, forced=np.arange(4, dtype=np.int32)))
    np.testing.assert_allclose(rows.logprobs, np.log(p), atol=1e-7)
    np.testing.assert_allclose(rows.policy_logprobs, np.log(p), atol=1e-7)
    np.testing.assert_allclose(rows.entropy, 1.75 * np.log(2), atol=1e-7)


def test_implements_the_op_table():
    ops: Ops = ReferenceOps()
    public = {name for name in vars(Ops) if not name.startswith("_")}
    assert public <= {name for name in dir(ops) if callable(getattr(ops, name))}
    weight = ops.pack_linear([np.eye(3)], [None])
    batch = neutral_sampling(2, forced=np.array([0, 1], np.int32))
    x = ops.gather_rows(ops.embedding(np.array([2, 1, 0], np.int32), np.eye(3, dtype=np.float32)), np.array([0, 2]))
    result = ops.sample(x, weight, batch)
    np.testing.assert_allclose(result.logprobs, [-np.log(2 + np.e), -np.log(2 + np.e)], rtol=1e-6)
    assert result.logprobs.dtype == np.float32 and result.raw_logprobs is None
