"""CpuOps itself: buffers, packing, batches cut in parts, refusals. The kernels under it have tests of their own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import zerokl.kernels.cpu.ops as cpu_ops
from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.arena import Arena, Slabs
from zerokl.kernels.cpu.ops import CpuOps
from zerokl.kernels.dispatch import get_ops
from zerokl.kernels.ops import SamplingBatch, neutral_sampling
from zerokl.kernels.reference.ops import ReferenceOps


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    count = _cpu.num_threads()
    yield
    _cpu.set_num_threads(count)


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def random_floats(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# -- buffers ----------------------------------------------------------------------------------------------------------
def test_arena_lends_a_buffer_again_only_when_nobody_holds_it_or_a_view() -> None:
    arena = Arena()
    first = arena.take(3, 5)
    second = arena.take(3, 5)
    assert not np.shares_memory(first, second)
    place = address(first)
    row = first[1]
    del first
    assert not np.shares_memory(arena.take(3, 5), row)
    del row
    assert address(arena.take(3, 5)) == place
    reshaped = arena.take(3, 5).reshape(5, 3)
    assert not np.shares_memory(arena.take(3, 5), reshaped)


def test_arena_reshapes_and_grows_but_never_under_a_holder() -> None:
    arena = Arena()
    place = address(arena.take(8, 4))
    assert [address(arena.take(rows, 4)) for rows in (1, 8, 10, 3)] == [place] * 4
    assert arena.take(7, 4).shape == (7, 4) and arena.take(7, 4).flags.c_contiguous
    held = arena.take(2, 4)
    held[:] = 7.0
    grown = arena.take(100, 4)
    assert grown.shape == (100, 4) and not np.shares_memory(grown, held)
    grown[:] = 1.0
    assert (held == 7.0).all()
    del grown, held

    def take_two(rows: int) -> None:
        pair = arena.take(rows, 4), arena.take(rows, 4)
        assert not np.shares_memory(*pair)

    take_two(100)
    size = arena.nbytes()
    for rows in (100, 3, 50, 100):
        take_two(rows)
    assert arena.nbytes() == size < 3 * 125 * 16


@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 5), (1, 16)])
def test_memory_starts_on_cache_lines(shape: tuple[int, ...]) -> None:
    slabs = Slabs()
    first, second = slabs.take(*shape), slabs.take(*shape)
    assert first.shape == second.shape == shape
    assert address(first) % 64 == address(second) % 64 == 0
    assert not np.shares_memory(first, second)
    assert address(Arena().take(3, shape[-1])) % 64 == 0


def test_equal_steps_use_equal_memory_and_results_do_not_overlap() -> None:
    ops = CpuOps()
    weight = ops.pack_linear([random_floats(24, 24)], [None])
    x, norm = random_floats(6, 24, seed=1), np.ones(24, np.float32)

    def step() -> tuple[list[int], list[NDArray[np.float32]]]:
        made = [ops.linear(x, weight)]
        made.append(ops.rms_norm(made[0], norm, 1e-6))
        made.append(ops.linear(made[1], weight))
        made.extend(ops.add_rms_norm(made[2], made[0], norm, 1e-6))
        return [address(array) for array in made], made

    places, made = step()
    assert made[3] is made[2]  # the sum takes its place
    assert len(set(places)) == 4
    copies = [array.copy() for array in made]
    other_places, others = step()
    assert not set(places) & set(other_places)
    for array, copy, other in zip(made, copies, others, strict=True):
        np.testing.assert_array_equal(array, copy)
        np.testing.assert_array_equal(other, copy)
    del made, array, others, other
    assert step()[0] == step()[0]


# -- packing ----------------------------------------------------------------------------------------------------------
def test_packed_operands_do_not_see_later_changes_of_their_sources() -> None:
    ops = CpuOps()
    weight, bias, x = random_floats(40, 30), random_floats(40, seed=1), random_floats(5, 30, seed=2)
    linear, gate_up = ops.pack_linear([weight], [bias]), ops.pack_gate_up(weight, weight)
    kept = ops.tensor(weight)
    expected, expected_swiglu = ops.linear(x, linear).copy(), ops.swiglu_linear(x, gate_up).copy()
    weight[:] = bias[:] = 0.0
    np.testing.assert_array_equal(ops.linear(x, linear), expected)
    np.testing.assert_array_equal(ops.swiglu_linear(x, gate_up), expected_swiglu)
    assert kept.any()


def test_fused_projections_equal_separate_ones_and_missing_biases_are_zeros() -> None:
    ops = CpuOps()
    x = random_floats(7, 300)
    weights = [random_floats(rows, 300, seed=rows) for rows in (33, 5, 64)]
    biases = [random_floats(33, seed=9), None, random_floats(64, seed=10)]
    fused = ops.linear(x, ops.pack_linear(weights, biases))
    separate = [ops.linear(x, ops.pack_linear([w], [b])) for w, b in zip(weights, biases, strict=True)]
    np.testing.assert_array_equal(fused, np.concatenate(separate, axis=1))
    reference = ReferenceOps()
    np.testing.assert_allclose(fused, reference.linear(x, reference.pack_linear(weights, biases)), atol=2e-4)


# -- sampling ---------------------------------------------------------------------------------------------------------
def busy_batch(rows: int, vocab: int) -> SamplingBatch:
    random = np.random.default_rng(5)
    histories, biases = np.arange(rows) % 4, np.arange(rows) % 3
    return replace(
        neutral_sampling(rows),
        temperature=random.choice(np.array([0.0, 0.8, 1.0], np.float32), rows),
        top_k=random.choice(np.array([0, 3], np.int32), rows),
        top_p=random.choice(np.array([1.0, 0.8], np.float32), rows),
        repetition_penalty=np.full(rows, 1.2, np.float32),
        frequency_penalty=np.full(rows, 0.3, np.float32),
        seed=random.integers(0, 2**64, rows, np.uint64),
        position=np.arange(rows, dtype=np.uint32),
        forced=np.where(np.arange(rows) % 5 == 0, 2, -1).astype(np.int32),
        history_start=np.concatenate([[0], np.cumsum(histories)]).astype(np.int32),
        history_token=np.concatenate([random.permutation(vocab)[:n] for n in histories]).astype(np.int32),
        history_count=random.integers(0, 3, histories.sum()).astype(np.int32),
        bias_start=np.concatenate([[0], np.cumsum(biases)]).astype(np.int32),
        bias_token=np.concatenate([random.permutation(vocab)[:n] for n in biases]).astype(np.int32),
        bias_value=random.standard_normal(biases.sum(), np.float32),
        want_raw=True,
    )


def test_a_large_batch_goes_through_the_head_in_parts_with_equal_results(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = CpuOps()
    head = ops.pack_linear([random_floats(50, 16)], [None])
    hidden, batch = random_floats(23, 16, seed=1), busy_batch(23, 50)
    whole = ops.sample(hidden, head, batch)
    for rows_per_part in (1, 7, 22):
        monkeypatch.setattr(cpu_ops, "_LOGIT_BYTES", rows_per_part * 50 * 4)
        parts = ops.sample(hidden, head, batch)
        for field in fields(whole):
            np.testing.assert_array_equal(getattr(parts, field.name), getattr(whole, field.name), err_msg=field.name)


def test_rows_without_a_distribution_get_token_minus_one() -> None:
    ops = CpuOps()
    head = ops.pack_linear([random_floats(50, 16)], [None])
    hidden = random_floats(3, 16)
    hidden[1, 3] = np.nan
    tokens = ops.sample(hidden, head, neutral_sampling(3)).tokens
    assert tokens[1] == -1 and tokens[0] >= 0 and tokens[2] >= 0


# -- the rest ---------------------------------------------------------------------------------------------------------
def test_threads_are_set_for_the_process_and_bounded() -> None:
    CpuOps(2)
    assert _cpu.num_threads() == 2
    CpuOps()
    assert _cpu.num_threads() == 2
    for count in (0, 1025):
        with pytest.raises(ValueError, match=rf"num_threads must be in \[1, 1024\], got {count}"):
            CpuOps(count)


def test_devices_are_chosen_by_name() -> None:
    assert isinstance(get_ops("cpu"), CpuOps)
    assert isinstance(get_ops("reference"), ReferenceOps)
    with pytest.raises(ValueError, match="device must be one of cpu, gpu, reference, got 'tpu'"):
        get_ops("tpu")


def test_misshapen_operands_are_refused_by_name() -> None:
    ops = CpuOps()
    weight = ops.pack_linear([random_floats(8, 16)], [None])
    with pytest.raises(ValueError, match="panels"):
        ops.linear(random_floats(2, 15), weight)


def test_the_stub_lists_what_the_extension_has() -> None:
    stub = ast.parse((Path(cpu_ops.__file__).parent / "_cpu.pyi").read_text(encoding="utf-8"))
    listed = {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}
    actual = {name: getattr(_cpu, name) for name in dir(_cpu) if callable(getattr(_cpu, name))}
    assert listed.keys() == actual.keys()
    for name, arguments in listed.items():
        if arguments:
            signature = actual[name].__nb_signature__[0][0]
            assert re.findall(r"[(,] ?(\w+): ", signature) == arguments, signature
