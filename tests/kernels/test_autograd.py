"""Gradients of every differentiable op against the same formula in float64 Paddle, which shares no code with them."""

import gc
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from zerokl.kernels.autograd import arrays, attention, elementwise, linear, lm_head, scratch_pool
from zerokl.kernels.autograd.ops import AutogradOps
from zerokl.kernels.ops import AttentionSpec, neutral_sampling
from zerokl.kernels.packed_step import packed_step
from zerokl.rollout.models.config import RopeConfig
from zerokl.rollout.models.rope import rope_table


def leaves(values, dtype):
    return [paddle.to_tensor(value.astype(dtype), stop_gradient=False) for value in values]


def run(function, values, dtype):
    """Outputs of `function` and the gradients of a fixed random functional of them."""
    inputs = leaves(values, dtype)
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    random = np.random.default_rng(7)
    weights = [paddle.to_tensor(random.standard_normal(out.shape).astype(dtype)) for out in outs]
    sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)).backward()
    return [out.numpy() for out in outs], [leaf.grad.numpy() for leaf in inputs]


def check(ours, oracle, values, tolerance=3e-6):
    """Results and gradients agree, relative to the largest entry of each."""
    mine, yardstick = run(ours, values, "float32"), run(oracle, values, "float64")
    for kind, got, want in zip(("output", "gradient"), mine, yardstick, strict=True):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.shape == b.shape
            error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)
            assert error < tolerance, f"{kind} {i}: relative error {error:.2e}"


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def norm64(x, weight, eps):
    x = x.reshape([-1, weight.shape[0]])
    return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_fused_linear_gradients(rows):
    values = [normal(rows, 300), normal(33, 300), normal(33), normal(17, 300)]  # 300: more than one K segment

    def ours(x, w0, b0, w1):
        return linear.fused_linear(x, [w0, w1], [b0, None])

    def oracle(x, w0, b0, w1):
        return x @ w0.T + b0, x @ w1.T

    check(ours, oracle, values)


def test_linear_with_an_unused_output():
    values = [normal(4, 20), normal(6, 20), normal(9, 20)]

    def second(x, w0, w1):
        return linear.fused_linear(x, [w0, w1], [None, None])[1]

    x, w0, w1 = leaves(values, "float32")
    second(x, w0, w1).sum().backward()
    assert w0.grad is None or not w0.grad.numpy().any()
    np.testing.assert_allclose(x.grad.numpy(), np.tile(values[2].sum(0), (4, 1)), rtol=1e-5)


def test_swiglu_linear_gradients():
    def oracle(x, gate, up):
        return F.silu(x @ gate.T) * (x @ up.T)

    check(linear.swiglu_linear, oracle, [normal(13, 40), normal(29, 40, seed=1), normal(29, 40, seed=2)])


@pytest.mark.parametrize("width", [48, 16])
def test_rms_norm_gradients(width):
    def ours(x, w):
        return elementwise.rms_norm(x, w, 1e-5)

    def oracle(x, w):
        return norm64(x, w, 1e-5).reshape(x.shape)

    check(ours, oracle, [normal(7, 48), normal(width)])


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_add_rms_norm_gradients(used):
    def ours(residual, delta, w):
        outs = elementwise.add_rms_norm(residual, delta, w, 1e-6)
        return tuple(outs[i] for i in used) + ((w * 1.0,) if used == (0,) else ())

    def oracle(residual, delta, w):
        outs = (residual + delta, norm64(residual + delta, w, 1e-6))
        return tuple(outs[i] for i in used) + ((w * 1.0,) if used == (0,) else ())

    check(ours, oracle, [normal(9, 50), normal(9, 50, seed=1), normal(50)])


def test_a_residual_used_twice_leaves_the_other_gradient_alone():
    """Paddle sums gradients of one tensor in place, into the first that it was given."""

    def ours(residual, delta, w):
        both = elementwise.add_rms_norm(residual, delta, w, 1e-6)
        return *both, elementwise.rms_norm(residual, w, 1e-6)

    def oracle(residual, delta, w):
        total = residual + delta
        return total, norm64(total, w, 1e-6), norm64(residual, w, 1e-6)

    check(ours, oracle, [normal(9, 50), normal(9, 50, seed=1), normal(50)])


def test_embedding_and_gather_gradients_add_repeated_rows():
    ids = np.array([3, 0, 3, 3, 10, 0], np.int32)
    index = paddle.to_tensor(ids.astype("int64"))
    check(lambda table: elementwise.embedding(table, ids), lambda table: table[index], [normal(11, 24)])
    check(lambda x: elementwise.gather_rows(x, ids), lambda x: x[index], [normal(12, 24)])


def rotate64(x, positions, table, interleaved):
    """Rotation by complex numbers."""
    cos, sin = (paddle.to_tensor(table[positions, i].astype("float64")).unsqueeze(1) for i in (0, 1))
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :])
    pair = [a * cos - b * sin, b * cos + a * sin]
    return paddle.stack(pair, -1).reshape(x.shape) if interleaved else paddle.concat(pair, -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_gradients(interleaved):
    table = rope_table(RopeConfig(theta=10000.0), 16, 64)
    positions = np.array([0, 1, 2, 0, 40], np.int32)

    def oracle(x):
        return rotate64(x.reshape([5, 3, 16]), positions, table, interleaved).reshape([5, 48])

    check(lambda x: elementwise.rope(x, positions, table, interleaved), oracle, [normal(5, 48)])


def attention64(q, k, v, starts, spec):
    """Whole-sequence softmax attention on [T, n * D]."""
    outs = []
    for start, end in pairwise(starts):
        n = int(end - start)
        query, key, value = (t[start:end].reshape([n, -1, spec.head_dim]).transpose([1, 0, 2]) for t in (q, k, v))
        key, value = (t.repeat_interleave(spec.num_heads // spec.num_kv_heads, axis=0) for t in (key, value))
        mask = paddle.triu(paddle.full([n, n], -math.inf, q.dtype), 1)
        weights = F.softmax(query @ key.transpose([0, 2, 1]) * spec.scale + mask, axis=-1)
        outs.append((weights @ value).transpose([1, 0, 2]).reshape([n, -1]))
    return paddle.concat(outs)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_attention_gradients(heads):
    spec = AttentionSpec(
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=16, scale=0.25, rotary_layout="half", norm_eps=1e-6
    )
    starts = np.array([0, 1, 71, 134, 264], np.int32)  # 1, 70, 63 and 130 tokens: one to three key splits
    step = packed_step(np.zeros(264, np.int32), starts, np.zeros(0, np.int32))
    pool = scratch_pool.scratch_pool(step, spec)
    caches = (arrays.array_of(pool.keys)[0], arrays.array_of(pool.values)[0])
    for cache in caches:
        cache.fill(np.nan)  # what the memory held must not matter

    def ours(q, k, v):
        return attention.packed_attention(q, k, v, step, spec, caches)

    values = [normal(264, heads[0] * 16), normal(264, heads[1] * 16, seed=1), normal(264, heads[1] * 16, seed=2)]
    check(ours, lambda q, k, v: attention64(q, k, v, starts, spec), values, tolerance=1e-5)


def head64(targets, temperature):
    def oracle(hidden, weight):
        logs = F.log_softmax(hidden @ weight.T / temperature, axis=-1)
        chosen = logs[paddle.arange(len(targets)), paddle.to_tensor(targets.astype("int64"))]
        return chosen, -(logs.exp() * logs).sum(-1)

    return oracle


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_lm_head_gradients(temperature, chunk_rows):
    targets = np.random.default_rng(0).integers(0, 1500, 11).astype(np.int32)

    def ours(hidden, weight):
        return lm_head.lm_head_logprobs(hidden, weight, targets, temperature, chunk_rows)

    values = [normal(11, 64), normal(1500, 64) * np.float32(0.2)]
    check(ours, head64(targets, temperature), values, tolerance=1e-5)


def test_lm_head_forward_does_not_depend_on_the_chunk():
    targets = np.arange(23, dtype=np.int32)
    hidden, weight = leaves([normal(23, 300), normal(1100, 300)], "float32")
    whole = lm_head.lm_head_logprobs(hidden, weight, targets, 0.9, 23)
    for chunk_rows in (1, 3, 8):
        parts = lm_head.lm_head_logprobs(hidden, weight, targets, 0.9, chunk_rows)
        for a, b in zip(whole, parts, strict=True):
            np.testing.assert_array_equal(a.numpy().view(np.int32), b.numpy().view(np.int32))


def test_logprobs_are_those_of_the_sampler():
    """The differentiable head and the op that draws tokens give the same bits."""
    ops = AutogradOps()
    hidden, weight = leaves([normal(9, 48), normal(200, 48)], "float32")
    head = ops.pack_linear([weight], [None])
    drawn = ops.sample(hidden, head, neutral_sampling(9, temperature=0.8))
    logprobs, entropy = ops.logprobs(hidden, head, drawn.tokens, 0.8, chunk_rows=4)
    np.testing.assert_array_equal(logprobs.numpy(), drawn.policy_logprobs)
    np.testing.assert_array_equal(entropy.numpy(), drawn.entropy)


def test_a_tied_weight_gets_the_gradients_of_both_uses():
    ids, targets = np.array([1, 5, 5], np.int32), np.array([5, 2, 0], np.int32)

    def ours(table):
        return lm_head.lm_head_logprobs(elementwise.embedding(table, ids), table, targets)

    def oracle(table):
        return head64(targets, 1.0)(table[paddle.to_tensor(ids.astype("int64"))], table)

    check(ours, oracle, [normal(40, 24)])


def test_frozen_inputs_get_no_gradient():
    x, weight = leaves([normal(3, 20), normal(5, 20)], "float32")
    weight.stop_gradient = True
    linear.fused_linear(x, [weight], [None])[0].sum().backward()
    assert weight.grad is None and x.grad is not None


def test_strided_tensors_and_gradients():
    x = paddle.to_tensor(normal(20, 3), stop_gradient=False)
    weight = paddle.to_tensor(normal(5, 20))
    (out,) = linear.fused_linear(x.T, [weight], [None])  # a strided input
    (out.T * paddle.to_tensor(normal(5, 3))).sum().backward()  # a strided gradient
    np.testing.assert_allclose(x.grad.numpy(), (normal(5, 3).T @ normal(5, 20)).T, rtol=1e-5, atol=1e-5)


def test_arrays_alias_tensors_and_keep_them_alive():
    tensor = paddle.zeros([3, 4])
    array = arrays.array_of(tensor)
    array[1, 2] = 5.0
    assert tensor.numpy()[1, 2] == 5.0
    del tensor
    gc.collect()
    paddle.ones([3, 4])
    assert array.sum() == 5.0
    made, memory = arrays.empty(7, 3)
    memory[:] = 2.0
    assert made.numpy().sum() == 42.0 and made.data_ptr() % 64 == 0
    assert arrays.empty(0, 3)[0].shape == [0, 3]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: paddle.zeros([2], dtype="float64"), "float32"),
        (lambda: paddle.zeros([2, 3]).T, "contiguous"),
    ],
)
def test_array_of_refuses(tensor, message):
    with pytest.raises(ValueError, match=message):
        arrays.array_of(tensor())


def test_a_graph_is_freed_with_its_last_tensor():
    """No cycle holds saved activations: without the cycle collector, memory stays level."""

    def resident_mib():
        text = Path("/proc/self/statm").read_text()
        return int(text.split()[1]) / 256

    def pass_through():
        x, w = leaves([np.ones((1024, 1024), np.float32), np.ones(1024, np.float32)], "float32")
        total, normed = elementwise.add_rms_norm(x, x, w, 1e-6)
        (total + normed).sum().backward()

    gc.collect()
    gc.disable()
    try:
        pass_through()
        before = resident_mib()
        for _ in range(15):
            pass_through()
        assert resident_mib() - before < 40  # a leaking graph would hold at least 8 MiB a pass
    finally:
        gc.enable()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_lm_head_refuses_a_bad_temperature(temperature):
    hidden, weight = leaves([normal(2, 4), normal(5, 4)], "float32")
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        lm_head.lm_head_logprobs(hidden, weight, np.zeros(2, np.int32), temperature)
