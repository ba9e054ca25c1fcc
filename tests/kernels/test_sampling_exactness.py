"""Same bits whatever stands beside a row, however many threads run, and on every instruction set."""

from dataclasses import replace

import numpy as np
import pytest
from sampling_rig import assert_same_bits, make_batch, random_batch, sample, take_rows

from zerokl.kernels.cpu import _cpu


def case(rows, vocab, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(rows, vocab)) * rng.choice([0.1, 3, 9], (rows, 1))).astype(np.float32)
    return logits, random_batch(rows, vocab, rng)


def rows_of(result, rows):
    return replace(result, **{name: getattr(result, name)[rows] for name in result.__dataclass_fields__})


def test_rows_are_independent_in_batches_of_1_to_300():
    logits, batch = case(300, 777)
    whole = sample(logits, batch)
    for count in range(1, 301):
        rows = np.arange(count) if count % 2 else np.arange(300 - count, 300)
        part = sample(np.ascontiguousarray(logits[rows]), take_rows(batch, rows))
        assert_same_bits(part, rows_of(whole, rows))
    shuffled = np.random.default_rng(1).permutation(300)
    part = sample(np.ascontiguousarray(logits[shuffled]), take_rows(batch, shuffled))
    assert_same_bits(part, rows_of(whole, shuffled))


def test_rows_are_independent_at_a_real_vocabulary():
    logits, batch = case(33, 49152)
    whole = sample(logits, batch)
    for rows in ([0], [5], [32, 7], list(range(7))):
        part = sample(np.ascontiguousarray(logits[rows]), take_rows(batch, rows))
        assert_same_bits(part, rows_of(whole, rows))


@pytest.mark.parametrize("vocab", [777, 49152])
def test_threads_and_instruction_sets_give_the_same_bits(vocab):
    logits, batch = case(12, vocab)
    whole = sample(logits, batch)
    for threads in (1, 2, 3):
        _cpu.set_num_threads(threads)
        assert_same_bits(sample(logits, batch), whole)
    for name in _cpu.instruction_sets():
        _cpu.set_instruction_set(name)
        assert_same_bits(sample(logits, batch), whole)


def test_rows_may_lie_at_any_address():
    logits, batch = case(5, 1001)
    whole = sample(logits, batch)
    for offset in (1, 3, 7):
        memory = np.zeros(logits.size + 16, np.float32)
        moved = memory[offset : offset + logits.size].reshape(logits.shape)
        moved[:] = logits
        assert_same_bits(sample(moved, batch), whole)


def test_draw_depends_on_seed_sample_and_position_alone():
    rng = np.random.default_rng(2)
    row = rng.normal(size=(1, 4000)).astype(np.float32)
    logits = np.repeat(row, 64, axis=0)
    for varied in ("seed", "sample_index", "position"):
        tokens = sample(logits, make_batch(64, **{varied: np.arange(64)})).tokens
        assert len(set(tokens.tolist())) > 40, varied
    high_seed = sample(logits, make_batch(64, seed=np.arange(64, dtype=np.uint64) << np.uint64(32))).tokens
    assert len(set(high_seed.tolist())) > 40
    same = sample(logits, make_batch(64, seed=9, sample_index=3, position=100))
    assert len(set(same.tokens.tolist())) == 1 and len(set(same.logprobs.tolist())) == 1
    assert len({*sample(logits, make_batch(64, temperature=0, seed=np.arange(64))).tokens.tolist()}) == 1


def ordinary_sampler(logits, uniforms, tile):
    """Float32 softmax whose sums run tile by tile, as in a kernel that picks its tile by the batch size."""
    weights = np.exp(logits - logits.max())
    tiles = weights.reshape(-1, tile)
    before = np.cumsum(np.append(np.float32(0), tiles.sum(axis=1, dtype=np.float32)), dtype=np.float32)
    cumulative = (before[:-1, None] + np.cumsum(tiles, axis=1, dtype=np.float32)).ravel()
    tokens = np.searchsorted(cumulative, uniforms * before[-1], side="right")
    return tokens, logits - logits.max() - np.log(before[-1])


def test_control_ordinary_float32_sums_depend_on_their_order():
    """Two tile sizes, the same logits and random numbers: other log-probabilities and, now and then, another token."""
    rng = np.random.default_rng(3)
    rows, uniforms = 40, rng.random(5000, np.float32)
    tokens_differ = logprobs_differ = 0
    for _ in range(rows):
        logits = rng.normal(scale=0.5, size=49152).astype(np.float32)
        tokens, logprobs = ordinary_sampler(logits, uniforms, 256)
        other_tokens, other_logprobs = ordinary_sampler(logits, uniforms, 3072)
        tokens_differ += np.sum(tokens != other_tokens)
        logprobs_differ += np.any(logprobs != other_logprobs)
    assert tokens_differ > 10
    assert logprobs_differ > 2
