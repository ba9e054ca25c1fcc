"""The mixture of experts: right against the float64 definition, and every row's bits its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.ops import CpuOps
from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.ops import KVPool
from zerokl.kernels.reference.ops import ReferenceOps
from zerokl.rollout.models.synthetic import step_inputs

Floats = NDArray[np.float32]
HIDDEN, INNER, EXPERTS, SLOTS = 300, 72, 20, 4


@dataclass(frozen=True)
class Mixture:
    """Random weights of one layer."""

    router: Floats
    correction: Floats
    experts: list[tuple[Floats, Floats, Floats]]

    def params(self, ops: Any) -> MoeParams[Any]:
        packed = ops.pack_experts(len(self.experts), iter(self.experts))
        return MoeParams(ops.pack_linear([self.router], [None]), self.correction, packed)


def normal(random: np.random.Generator, *shape: int) -> Floats:
    return random.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    random = np.random.default_rng(0)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    experts = [tuple(normal(random, *shape) for shape in shapes) for _ in range(EXPERTS)]
    correction = np.float32(0.1) * random.standard_normal((1, EXPERTS), np.float32)
    return Mixture(normal(random, EXPERTS, HIDDEN) * 2, correction, experts)  # type: ignore[arg-type]


def rows(count: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, HIDDEN), np.float32)


def spec(**changes: Any) -> RouterSpec:
    return RouterSpec(**({"top_k": SLOTS, "normalise": True, "norm_min": 1e-12, "index": 0} | changes))


def run(ops: Any, mixture: Mixture, x: Any, shared: Any, router: RouterSpec) -> tuple[Any, Any, Any]:
    params = mixture.params(ops)
    routing = ops.route(x, params, router)
    out = ops.moe(x, routing, params.experts, shared)
    return routing.experts, np.array(routing.weights), np.array(out)


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Any:
    before = _cpu.instruction_set()
    _cpu.set_instruction_set(request.param)
    yield
    _cpu.set_instruction_set(before)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("router", [spec(), spec(normalise=False), spec(norm_min=10.0), spec(top_k=1)])
def test_agrees_with_the_definition(mixture: Mixture, router: RouterSpec) -> None:
    x, shared = rows(50), rows(50, 2)
    ids, weights, out = run(CpuOps(), mixture, x, shared, router)
    expected_ids, expected_weights, expected = run(ReferenceOps(), mixture, x.astype(float), shared, router)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_bits_do_not_depend_on_batch_threads_or_instruction_set(mixture: Mixture) -> None:
    x, shared = rows(150), rows(150, 2)
    whole = run(CpuOps(), mixture, x, shared, spec())
    before, threads = _cpu.instruction_set(), _cpu.num_threads()
    try:
        for name in _cpu.instruction_sets():
            for count, size in ((1, 1), (2, 7), (3, 150)):
                _cpu.set_instruction_set(name)
                ops = CpuOps(count)
                for start in range(0, 150, size):
                    some = slice(start, start + size)
                    for got, want in zip(run(ops, mixture, x[some], shared[some], spec()), whole, strict=True):
                        np.testing.assert_array_equal(got, want[some])
    finally:
        _cpu.set_instruction_set(before)
        _cpu.set_num_threads(threads)


def test_a_row_equals_the_dense_ops_and_the_stated_sum(mixture: Mixture) -> None:
    """Each expert by `swiglu_linear` and `linear`, then one fused step per slot, which float64 can spell out."""
    x, shared, ops = rows(9), rows(9, 2), CpuOps()
    ids, weights, out = run(ops, mixture, x, shared, spec())
    for t in range(len(x)):
        total = np.zeros(HIDDEN, np.float32)
        for expert, weight in zip(ids[t], weights[t], strict=True):
            gate, up, down = mixture.experts[expert]
            inner = ops.swiglu_linear(x[t : t + 1], ops.pack_gate_up(gate, up))
            y = ops.linear(inner, ops.pack_linear([down], [None]))[0]
            # The product is exact in float64, the sum nearly: double rounding would need a tie to show.
            total = (total.astype(np.float64) + np.float64(weight) * y.astype(np.float64)).astype(np.float32)
        np.testing.assert_array_equal(out[t], total + shared[t])


def chosen(logits: Any, correction: Any = None, top_k: int = 2) -> list[list[int]]:
    values = np.array(logits, np.float32)
    ids, weights = np.empty((len(values), top_k), np.int32), np.empty((len(values), top_k), np.float32)
    bias = None if correction is None else np.array(correction, np.float32)
    _cpu.route(values, bias, False, 0.0, ids, weights)
    return ids.tolist()


def test_ties_go_to_the_lower_id() -> None:
    assert chosen([[1, 3, 3, 3, 0], [0, 0, 0, 0, 0], [5, 1, 2, 5, 2]]) == [[1, 2], [0, 1], [0, 3]]
    assert chosen([[0.0] * 20], top_k=20) == [list(range(20))]


def test_the_correction_changes_the_choice_and_not_the_weights() -> None:
    assert chosen([[2, 1, 0, 0]], [0, 0, 9, 0]) == [[2, 0]]
    ids, weights = np.empty((1, 2), np.int32), np.empty((1, 2), np.float32)
    _cpu.route(
        np.log(np.array([[4, 3, 2, 1]], np.float32)), np.array([0, 0, 9, 0], np.float32), True, 0.0, ids, weights
    )
    np.testing.assert_allclose(weights, [[1 / 3, 2 / 3]], rtol=1e-6)


def test_a_row_of_nans_chooses_distinct_experts_and_stays_nan() -> None:
    assert sorted(chosen([[np.nan] * 5], top_k=5)[0]) == list(range(5))
    assert len(set(chosen([[np.inf, 1, np.inf, 0, 2]], top_k=3)[0])) == 3


def test_given_ids_are_kept_in_their_order(mixture: Mixture) -> None:
    x, ops = rows(6), CpuOps()
    ids, weights, _ = run(ops, mixture, x, None, spec())
    turned, turned_weights = np.ascontiguousarray(ids[:, ::-1]), np.empty_like(weights)
    logits = ops.linear(x, ops.pack_linear([mixture.router], [None]))
    _cpu.route(logits, None, False, 0.0, turned, turned_weights, True)
    np.testing.assert_array_equal(turned, ids[:, ::-1])
    plain = run(ops, mixture, x, None, spec(normalise=False))[1]
    np.testing.assert_array_equal(turned_weights, plain[:, ::-1])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("make_ops", [CpuOps, ReferenceOps])
def test_rows_of_minus_one_are_the_routers_choice(mixture: Mixture, make_ops: Any) -> None:
    x, ops = rows(40).astype(np.float32 if make_ops is CpuOps else np.float64), make_ops()
    params = mixture.params(ops)
    free = ops.route(x, params, spec())
    other = ((free.experts + 1) % EXPERTS).astype(np.int32)[None]
    given, weights = np.arange(40) % 3 == 0, np.full((1, 40, SLOTS), 0.25, np.float32)

    def replayed(ids: Any, **changes: Any) -> Routing[Any]:
        inputs = step_inputs([np.zeros(40, np.int32)], [0], [list(range(5))], 8)
        ops.begin_step(replace(inputs, routing=ids, **changes), KVPool(*[np.zeros((0, 1))] * 2, block_size=8))
        return ops.route(x, params, spec())

    all_given = replayed(other)
    mixed_ids = np.where(given[:, None], other, -1).astype(np.int32)
    for mixed, fixed in (replayed(mixed_ids), False), (replayed(mixed_ids, routing_weights=weights), True):
        np.testing.assert_array_equal(mixed.experts, np.where(given[:, None], other[0], free.experts))
        of_given = weights[0] if fixed else all_given.weights
        np.testing.assert_array_equal(mixed.weights, np.where(given[:, None], of_given, free.weights))
    assert (mixed_ids[0, ~given] == -1).all(), "what was given is left as it was"


@pytest.mark.parametrize(
    ("ids", "bound", "got"), [([0, -1], "[0, 5)", -1), ([-1, 0], "[-1, -1]", 0), ([-2, -2], "[0, 5)", -2)]
)
def test_a_row_is_given_as_a_whole_or_not_at_all(ids: list[int], bound: str, got: int) -> None:
    given, weights = np.array([[1, 2], ids], np.int32), np.empty((2, 2), np.float32)
    with pytest.raises(ValueError, match=re.escape(f"must be in {bound}, got {got}")):
        _cpu.route(np.zeros((2, 5), np.float32), None, False, 0.0, given, weights, True)


def test_no_rows(mixture: Mixture) -> None:
    ids, _, out = run(CpuOps(), mixture, rows(0), None, spec())
    assert ids.shape == (0, SLOTS) and out.shape == (0, HIDDEN)


def test_refusals(mixture: Mixture) -> None:
    ops = CpuOps()
    experts = mixture.params(ops).experts
    x, weights = rows(2), np.ones((2, 1), np.float32)
    with pytest.raises(ValueError, match=r"ids\[1\] must be in \[0, 20\), got 20"):
        ops.moe(x, Routing(np.array([[0], [20]], np.int32), weights), experts, None)
    with pytest.raises(ValueError, match=r"ids.shape\[1\] must be in \[1, 3\], got 4"):
        chosen([[1, 2, 3]], top_k=4)
    with pytest.raises(ValueError, match=r"starts\[1\] must be in \[2, 2\], got 1"):
        _cpu.grouped_linear(
            x, np.array([0, 1], np.int32), np.zeros((1, 1, HIDDEN, 32), np.float32), 8, rows(2)[:, :8].copy()
        )
    with pytest.raises(ValueError, match=r"rows\[0\] must be in \[0, 2\), got 2"):
        _cpu.combine(x, np.array([[2], [0]], np.int32), weights, None, np.empty_like(x))
