"""Each kernel of the bfloat16 path: against float64, and bit for bit with itself over 1 to 512 rows.

Under TRITON_INTERPRET=1 everything runs on the CPU in float32, with fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from numpy.typing import NDArray

rig.require_device()

import gpu_sampler  # noqa: E402

from zerokl.kernels.experts import Replay, RouterSpec  # noqa: E402
from zerokl.kernels.gpu import experts, lm_head, matmul, norms, sampling  # noqa: E402
from zerokl.kernels.gpu.step_arrays import sampling_options  # noqa: E402
from zerokl.kernels.ops import SamplingBatch, neutral_sampling  # noqa: E402
from zerokl.kernels.reference import moe as reference_moe  # noqa: E402
from zerokl.kernels.reference import sampling as reference_sampling  # noqa: E402

pytestmark = pytest.mark.gpu

MANY = 24 if rig.INTERPRETED else 512
SOME = (1, 7, 17) if rig.INTERPRETED else (1, 2, 8, 15, 16, 17, 32, 33, 64, 100, 128, 129, 200, 256, 257, 384)
WIDTH = 72 if rig.INTERPRETED else 1024
OUTPUTS = 50 if rig.INTERPRETED else 1600
ROUNDING = 1e-6 if rig.INTERPRETED else 3e-3  # of one bfloat16 result: at most 2^-9 each
Arrays = tuple[NDArray[Any], ...]


def rows_differ(run: Callable[[int], Arrays]) -> int:
    """Values of run(m), for m of SOME, that are not those of the first m rows of run(MANY)."""
    everything = run(MANY)
    assert not any(np.isnan(values).any() for values in everything if values.dtype.kind == "f")
    return sum(
        int((part != whole[: len(part)]).sum()) for m in SOME for part, whole in zip(run(m), everything, strict=True)
    )


def run_linear(m: int, bias: bool = True) -> Arrays:
    x, w, b = rig.normal(1, MANY, WIDTH)[:m], rig.normal(2, OUTPUTS, WIDTH), rig.normal(3, OUTPUTS)
    out = rig.empty(m, OUTPUTS)
    matmul.linear(rig.put(x), rig.put(w), rig.put(b, "float32") if bias else None, out)
    return (rig.get(out),)


def run_split_linear(m: int) -> Arrays:
    """The control: K in two halves where there are few rows, as vendor libraries do."""
    if m > 64:
        return run_linear(m, bias=False)
    x, w = rig.normal(1, MANY, WIDTH)[:m], rig.normal(2, OUTPUTS, WIDTH)
    total = np.zeros((m, OUTPUTS), np.float32)
    for part in (slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)):
        out = rig.empty(m, OUTPUTS, dtype="float32")
        matmul.linear(rig.put(x[:, part]), rig.put(w[:, part]), None, out)
        total += rig.get(out)
    return (rig.rounded(total),)


def run_swiglu(m: int) -> Arrays:
    x = rig.normal(1, MANY, WIDTH)[:m]
    gate, up = (rig.normal(seed, OUTPUTS, WIDTH, scale=WIDTH**-0.5) for seed in (2, 3))
    out = rig.empty(m, OUTPUTS)
    matmul.swiglu(rig.put(x), rig.put(in_turn(gate, up)), out)
    return (rig.get(out),)


def in_turn(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """Rows of gate and up in turn."""
    return np.stack([gate, up], axis=-2).reshape(*gate.shape[:-2], -1, gate.shape[-1])


def run_norm(m: int, warps: int | None = None) -> Arrays:
    x, delta, weight = rig.normal(1, MANY, WIDTH)[:m], rig.normal(2, MANY, WIDTH)[:m], rig.normal(3, WIDTH)
    residual, out = rig.put(x, "float32"), rig.empty(m, WIDTH)
    norms.rms_norm(residual, rig.put(weight, "float32"), 1e-6, out, delta=rig.put(delta), num_warps=warps)
    return rig.get(out), rig.get(residual)


def test_linear_against_float64() -> None:
    x, w, b = rig.normal(1, MANY, WIDTH), rig.normal(2, OUTPUTS, WIDTH), rig.normal(3, OUTPUTS)
    expected = x.astype(np.float64) @ w.T.astype(np.float64) + b
    assert rig.relative_error(run_linear(MANY)[0], expected) < ROUNDING


def test_swiglu_against_float64() -> None:
    x = rig.normal(1, MANY, WIDTH).astype(np.float64)
    gate, up = (x @ rig.normal(seed, OUTPUTS, WIDTH, scale=WIDTH**-0.5).T.astype(np.float64) for seed in (2, 3))
    assert rig.relative_error(run_swiglu(MANY)[0], gate / (1 + np.exp(-gate)) * up) < ROUNDING


def test_norm_against_float64_and_in_the_stated_order() -> None:
    x, delta, weight = rig.normal(1, MANY, WIDTH), rig.normal(2, MANY, WIDTH), rig.normal(3, WIDTH)
    _, residual = run_norm(MANY)
    np.testing.assert_array_equal(residual, x + delta)
    folded = np.zeros((MANY, 1 << (WIDTH - 1).bit_length()), np.float32)
    folded[:, :WIDTH] = residual * residual
    while folded.shape[1] > 1:
        folded = folded[:, : folded.shape[1] // 2] + folded[:, folded.shape[1] // 2 :]
    scale = np.float32(1) / np.sqrt(folded / np.float32(WIDTH) + np.float32(1e-6))
    expected = rig.rounded((residual * scale) * weight)
    for warps in (None, 1, 8):
        np.testing.assert_array_equal(run_norm(MANY, warps)[0], expected)


@pytest.mark.skipif(rig.INTERPRETED, reason="the interpreter has a library's products, whose bits follow the tile")
@pytest.mark.parametrize("run", [run_linear, run_swiglu, run_norm])
def test_rows_do_not_know_each_other(run: Callable[[int], Arrays]) -> None:
    assert rows_differ(run) == 0


@pytest.mark.skipif(rig.INTERPRETED, reason="as above")
def test_a_product_that_splits_k_where_rows_are_few_is_found_out() -> None:
    assert rows_differ(run_split_linear) > 0


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_norm_rotation_and_cache_write(layout: str) -> None:
    heads, kv_heads, size, tokens, block = 6, 2, 24, 40, 16
    spec = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_dim=size, rotary_layout=layout, norm_eps=1e-6)
    qkv = rig.normal(1, tokens, heads + 2 * kv_heads, size)
    q_norm, k_norm = rig.normal(2, size), rig.normal(3, size)
    rope = np.random.default_rng(4).standard_normal((64, 2, size // 2)).astype(np.float32)
    positions = np.random.default_rng(5).permutation(64)[:tokens].astype(np.int32)
    slots = np.random.default_rng(6).permutation(64)[:tokens].astype(np.int32)
    slots[3] = -1
    pool = rig.Pool(*(rig.empty(2, 4, kv_heads, block, size) for _ in range(2)), block)
    query = rig.empty(tokens, heads * size)
    norms.qkv_to_cache(
        rig.put(qkv.reshape(tokens, -1)), rig.put(q_norm, "float32"), rig.put(k_norm, "float32"),
        rig.put(rope, "float32"), rig.put(positions), rig.put(slots), pool, 1, query, spec,
    )  # fmt: skip

    def turned(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
        x = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * weight
        cos, sin = rope[positions, 0][:, None], rope[positions, 1][:, None]
        a, b = (x[..., : size // 2], x[..., size // 2 :]) if layout == "half" else (x[..., ::2], x[..., 1::2])
        low, high = a * cos - b * sin, a * sin + b * cos
        pairs = np.stack([low, high], -1)
        return pairs.reshape(x.shape) if layout == "interleaved" else np.concatenate([low, high], -1)

    expected = turned(qkv[:, :heads], q_norm)
    assert rig.relative_error(rig.get(query).reshape(expected.shape), expected) < ROUNDING
    written = slots >= 0
    at = slots[written]
    keys, values = (rig.get(part)[1, at // block, :, at % block] for part in (pool.keys, pool.values))
    assert rig.relative_error(keys, turned(qkv[:, heads : heads + kv_heads], k_norm)[written]) < ROUNDING
    np.testing.assert_array_equal(values, qkv[written, heads + kv_heads :])
    assert np.isnan(rig.get(pool.keys)).sum() == rig.get(pool.keys).size - written.sum() * kv_heads * size


VOCAB = 1500 if rig.INTERPRETED else 20_000
HEAD_ROWS = 6 if rig.INTERPRETED else 300


def sampling_batch(rows: int) -> SamplingBatch:
    at = np.arange(rows)
    return replace(
        neutral_sampling(rows),
        temperature=np.array([1.0, 0.7, 0.0, 1.3], np.float32)[at % 4],
        seed=np.full(rows, 2**40 + 17, np.uint64),
        position=at.astype(np.uint32),
        sample_index=(at % 3).astype(np.uint32),
        forced=np.where(at % 5 == 4, at % VOCAB, -1).astype(np.int32),
    )


def run_head(rows: int) -> tuple[NDArray[np.int32], NDArray[np.float32], Any]:
    hidden, head = rig.normal(1, HEAD_ROWS, 64)[:rows], rig.normal(2, VOCAB, 64, scale=0.3)
    logits, chunks = rig.empty(rows, VOCAB, dtype="float32"), lm_head.num_chunks(VOCAB)
    tile_max = rig.empty(rows, lm_head.num_tiles(rows, VOCAB, rig.FLOAT), dtype="float32")
    sums, masses = rig.empty(rows, chunks, 2, dtype="float32"), rig.empty(rows, chunks, dtype="int64")
    out = rig.empty(rows, int(sampling.NUM_RESULTS), dtype="int32")
    options = rig.put(sampling_options(sampling_batch(rows), rows))
    lm_head.settle(rig.put(hidden), rig.put(head), options, logits, tile_max, sums, masses, out)
    return rig.get(out), rig.get(logits), (logits, options)


def test_head_draws_what_the_definition_draws() -> None:
    out, logits, _ = run_head(HEAD_ROWS)
    batch = sampling_batch(HEAD_ROWS)
    assert lm_head.serves(batch)
    expected = reference_sampling.sample_rows(logits, batch)
    # The interpreter does not fuse fma, so masses may differ in their last digits.
    assert (out[:, int(sampling.TOKEN)] != expected.tokens).sum() <= (1 if rig.INTERPRETED else 0)
    floats = out.view(np.float32)
    for column, values in (
        (sampling.LOGPROB, expected.logprobs),
        (sampling.POLICY_LOGPROB, expected.policy_logprobs),
        (sampling.ENTROPY, expected.entropy),
    ):
        np.testing.assert_allclose(floats[:, int(column)], values, rtol=0, atol=1e-5)


def test_head_has_the_bits_of_the_general_sampler_for_any_number_of_rows() -> None:
    out, _, (logits, options) = run_head(HEAD_ROWS)
    general = rig.empty(HEAD_ROWS, int(sampling.NUM_RESULTS), dtype="int32")
    gpu_sampler.sample(logits, logits, options, general)
    columns = slice(0, int(sampling.ENTROPY) + 1)
    np.testing.assert_array_equal(rig.get(general)[:, columns], out[:, columns])
    for rows in [m for m in SOME if m <= HEAD_ROWS]:
        np.testing.assert_array_equal(run_head(rows)[0][:, columns], out[:rows, columns])


def test_rows_without_a_distribution_are_named() -> None:
    hidden = np.ones((3, 64), np.float32)
    hidden[1, 5] = np.nan
    head = rig.normal(2, VOCAB, 64)
    out = rig.empty(3, int(sampling.NUM_RESULTS), dtype="int32")
    chunks = lm_head.num_chunks(VOCAB)
    lm_head.settle(
        rig.put(hidden), rig.put(head), rig.put(sampling_options(sampling_batch(3), 3)),
        rig.empty(3, VOCAB, dtype="float32"), rig.empty(3, lm_head.num_tiles(3, VOCAB, rig.FLOAT), dtype="float32"),
        rig.empty(3, chunks, 2, dtype="float32"), rig.empty(3, chunks, dtype="int64"), out,
    )  # fmt: skip
    tokens = rig.get(out)[:, int(sampling.TOKEN)]
    assert tokens[1] == -1 and (tokens[[0, 2]] >= 0).all()
    assert np.isnan(rig.get(out)[1, 1:5].view(np.float32)).all()


EXPERTS, SLOTS, INNER = 8, 3, 40
ROUTER = RouterSpec(top_k=SLOTS, normalise=True, norm_min=1e-12, index=0)


def run_mixture(m: int, given: NDArray[np.int32] | None = None) -> Arrays:
    width = 48
    x, logits = rig.normal(1, MANY, width)[:m], rig.normal(2, MANY, EXPERTS)[:m]
    gate, up, down = expert_matrices(width)
    correction = np.linspace(-0.1, 0.1, EXPERTS, dtype=np.float32)
    ids, weights = rig.empty(m, SLOTS, dtype="int32"), rig.empty(m, SLOTS, dtype="float32")
    experts.choose_experts(
        rig.put(logits, "float32"), rig.put(correction, "float32"), ROUTER, ids, weights,
        given=None if given is None else rig.put(given[:m]),
    )  # fmt: skip
    tile = experts.expert_tile(m * SLOTS, EXPERTS, rig.FLOAT)
    num_tiles = experts.num_tiles(m * SLOTS, EXPERTS, tile.BLOCK_M)
    counts, tile_expert = rig.empty(EXPERTS, dtype="int32"), rig.empty(num_tiles, dtype="int32")
    order = rig.empty(num_tiles * tile.BLOCK_M, dtype="int32")
    experts.sort_slots(ids, EXPERTS, counts, order, tile_expert, tile)
    out = rig.empty(m, width)
    experts.mixture(
        rig.put(x), rig.put(in_turn(gate, up)), rig.put(down), ids, weights, order, tile_expert,
        rig.empty(m * SLOTS, INNER), rig.empty(m * SLOTS, width, dtype="float32"), rig.put(x), out, tile=tile,
    )  # fmt: skip
    np.testing.assert_array_equal(rig.get(counts), np.bincount(rig.get(ids).reshape(-1), minlength=EXPERTS))
    return rig.get(out), rig.get(ids), rig.get(weights)


def expert_matrices(width: int) -> Arrays:
    shapes = ((EXPERTS, INNER, width), (EXPERTS, INNER, width), (EXPERTS, width, INNER))
    return tuple(rig.normal(3 + i, *shape, scale=shape[-1] ** -0.5) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("replayed", [False, True])
def test_mixture_against_the_definition(replayed: bool) -> None:
    x, logits = rig.normal(1, MANY, 48), rig.normal(2, MANY, EXPERTS)
    given, replaces = None, np.arange(MANY) % 3 != 0
    if replayed:
        given = np.stack([np.random.default_rng(t).permutation(EXPERTS)[:SLOTS] for t in range(MANY)]).astype(np.int32)
        given[~replaces] = -1
    out, ids, weights = run_mixture(MANY, given)
    correction = np.linspace(-0.1, 0.1, EXPERTS, dtype=np.float32)
    chosen = reference_moe.route(logits.astype(np.float64), correction, ROUTER, None)
    if given is not None:
        given[~replaces] = chosen.experts[~replaces]
    replay = None if given is None else Replay(given, None)
    routing = reference_moe.route(logits.astype(np.float64), correction, ROUTER, replay)
    np.testing.assert_array_equal(ids, routing.experts)
    np.testing.assert_allclose(weights, routing.weights, rtol=1e-5)
    blocks = [reference_moe.ReferenceExpert(*matrices) for matrices in zip(*expert_matrices(48), strict=True)]
    expected = reference_moe.moe(x.astype(np.float64), routing, blocks, x.astype(np.float64))
    assert rig.relative_error(out, expected) < 2 * ROUNDING


def test_a_token_of_a_mixture_does_not_know_the_others() -> None:
    assert rows_differ(run_mixture) == 0
