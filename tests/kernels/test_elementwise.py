"""Row-wise CPU ops: against plain NumPy in float64, and bit for bit over batches, threads and instruction sets."""

from collections.abc import Callable

import numpy as np
import pytest

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.packing import Packer

EPS = 1e-5
WIDTHS = [1, 5, 16, 17, 80, 576]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rope_table(positions, dim):
    angles = np.arange(positions)[:, None] / 100.0 ** (np.arange(dim // 2) * 2 / dim)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rms_norm(x, w, inv=None):
    out = np.full_like(x, np.nan)
    _cpu.rms_norm(x, w, EPS, out, inv)
    return out


def add_rms_norm(residual, delta, w):
    total, out = np.full_like(residual, np.nan), np.full_like(residual, np.nan)
    _cpu.add_rms_norm(residual, delta, w, EPS, total, out)
    return total, out


def rope(x, positions, table, interleaved=False, inverse=False):
    out = np.full_like(x, np.nan)
    _cpu.rope(x, positions, table, interleaved, inverse, out)
    return out


def swiglu(gate, up):
    out = np.full_like(gate, np.nan)
    _cpu.swiglu(gate, up, out)
    return out


def embedding(ids, table):
    out = np.full((len(ids), table.shape[1]), np.nan, np.float32)
    _cpu.embedding(ids, table, out)
    return out


def norm64(x, w):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * w


def slope(function, x, weight, step=1e-6):
    """Gradient of sum(function(x) * weight) in float64 by central differences."""
    grad = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        high, low = x.astype(np.float64), x.astype(np.float64)
        high[i] += step
        low[i] -= step
        grad[i] = ((function(high) - function(low)) * weight).sum() / (2 * step)
    return grad


def close(got, want, tolerance=2e-6):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# -- against float64 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_gathers_copy_rows(width):
    table, ids = normal(0, 11, width), np.array([3, 0, 10, 3], np.int32)
    assert np.array_equal(embedding(ids, table), table[ids])
    packed = Packer().pack_linear([table], [None])
    assert np.array_equal(embedding(ids, packed.panels), table[ids])
    out = np.empty((4, width), np.float32)
    _cpu.gather_rows(table, ids, out)
    assert np.array_equal(out, table[ids])


@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width):
    x, delta, w = 30 * normal(0, 7, width), normal(1, 7, width), normal(2, width)
    inv = np.empty(7, np.float32)
    close(rms_norm(x, w, inv), norm64(x, w))
    close(inv, 1 / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1) + EPS))
    total, out = add_rms_norm(x, delta, w)
    assert np.array_equal(total, x + delta)
    assert np.array_equal(out, rms_norm(x + delta, w))
    in_place = x.copy()
    _cpu.add_rms_norm(in_place, delta, w, EPS, in_place, out)
    assert np.array_equal(in_place, total)
    assert np.array_equal(out, rms_norm(total, w))


@pytest.mark.parametrize(("rows", "width"), [(3, 5), (2, 16), (700, 37)])
def test_norm_gradients(rows, width):
    x, w, dy = normal(0, rows, width), normal(1, width), normal(2, rows, width)
    inv, dx, dw = np.empty(rows, np.float32), np.empty_like(x), np.full_like(w, np.nan)
    rms_norm(x, w, inv)
    _cpu.rms_norm_backward(dy, x, w, inv, dx, dw)
    close(dw, (dy * norm64(x, np.ones(width))).sum(axis=0), 2e-5)
    for r in range(min(rows, 3)):
        close(dx[r], slope(lambda row: norm64(row, w), x[r], dy[r].astype(np.float64)), 1e-5)


@pytest.mark.parametrize("dim", [2, 10, 32, 64, 80])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dim, interleaved):
    x, table, positions = normal(0, 5, 3, dim), rope_table(50, dim), np.array([0, 49, 7, 7, 12], np.int32)
    first, second = (
        (np.s_[..., ::2], np.s_[..., 1::2]) if interleaved else (np.s_[..., : dim // 2], np.s_[..., dim // 2 :])
    )
    cos, sin = (table[positions, i][:, None, :].astype(np.float64) for i in (0, 1))
    want = np.empty(x.shape)
    want[first] = x[first] * cos - x[second] * sin
    want[second] = x[second] * cos + x[first] * sin
    got = rope(x, positions, table, interleaved)
    close(got, want)
    close(rope(got, positions, table, interleaved, inverse=True), x)
    in_place = x.copy()
    _cpu.rope(in_place, positions, table, interleaved, False, in_place)
    assert np.array_equal(in_place, got)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 48), (2, 1537)])
def test_swiglu_and_its_gradients(shape):
    gate, up, dout = 5 * normal(0, *shape), normal(1, *shape), normal(2, *shape)
    gate.flat[0] = -200.0  # exp overflows
    g = gate.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-g))
    close(swiglu(gate, up), g * sigmoid * up)
    dgate, dup = np.full_like(gate, np.nan), np.full_like(gate, np.nan)
    _cpu.swiglu_backward(dout, gate, up, dgate, dup)
    close(dup, dout * g * sigmoid)
    close(dgate, dout.astype(np.float64) * up * sigmoid * (1 + g * (1 - sigmoid)), 1e-5)


def test_embedding_gradient_adds_in_token_order():
    ids = np.array([2, 0, 2, 2, 5] * 20, np.int32)
    dout, dtable = normal(0, 100, 130) * 1e4, normal(1, 6, 130)
    want = dtable.copy()
    for row, token in zip(dout, ids, strict=True):
        want[token] += row
    _cpu.embedding_backward(ids, dout, dtable)
    assert np.array_equal(dtable, want)


# -- into the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "dim"), [(8, 5), (16, 64), (24, 33), (128, 32)])
def test_kv_write_puts_each_token_into_its_slot(block_size, dim):
    k, v = normal(0, 6, 2, dim), normal(1, 6, 2, dim)
    slots = np.array([5 * block_size - 1, -1, 0, 2 * block_size + 3, 1, -1], np.int32)
    keys, values = (
        np.full((5, 2, dim, block_size), np.nan, np.float32),
        np.full((5, 2, block_size, dim), np.nan, np.float32),
    )
    want_keys, want_values = keys.copy(), values.copy()
    for t, slot in enumerate(slots):
        if slot >= 0:
            want_keys[slot // block_size, :, :, slot % block_size] = k[t]
            want_values[slot // block_size, :, slot % block_size] = v[t]
    _cpu.kv_write(k, v, slots, keys, values)
    assert np.array_equal(keys, want_keys, equal_nan=True)
    assert np.array_equal(values, want_values, equal_nan=True)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_qkv_to_cache_equals_the_separate_ops(normed, interleaved):
    tokens, heads, kv_heads, dim, block_size = 37, 6, 2, 34, 8
    qkv, table = normal(0, tokens, (heads + 2 * kv_heads) * dim), rope_table(99, dim)
    rng = np.random.default_rng(1)
    positions, slots = rng.integers(0, 99, tokens).astype(np.int32), rng.permutation(48)[:tokens].astype(np.int32)
    slots[3] = -1
    weights = (normal(2, dim), normal(3, dim)) if normed else (None, None)
    fused = [np.zeros((6, kv_heads, dim, block_size), np.float32), np.zeros((6, kv_heads, block_size, dim), np.float32)]
    apart = [array.copy() for array in fused]
    got = np.empty((tokens, heads, dim), np.float32)
    _cpu.qkv_to_cache(qkv, heads, kv_heads, *weights, EPS, positions, table, interleaved, slots, *fused, got)
    q, k, v = (np.ascontiguousarray(part) for part in np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=1))
    if normed:
        q, k = (rms_norm(x.reshape(-1, dim), w) for x, w in zip((q, k), weights, strict=True))
    q, k = (rope(x.reshape(tokens, -1, dim), positions, table, interleaved) for x in (q, k))
    _cpu.kv_write(k, v.reshape(tokens, kv_heads, dim), slots, *apart)
    assert np.array_equal(got, q)
    assert all(np.array_equal(a, b) for a, b in zip(fused, apart, strict=True))


# -- bit for bit -------------------------------------------------------------------------------------------------------

ROWS, WIDTH = 300, 129
TABLE, IDS = rope_table(ROWS, 34), np.random.default_rng(9).permutation(ROWS).astype(np.int32)
X, Y, W, HEADS = normal(3, ROWS, WIDTH), 3 * normal(4, ROWS, WIDTH), normal(5, WIDTH), normal(6, ROWS, 3, 34)

ROW_OPS: dict[str, Callable[[slice], np.ndarray]] = {
    "embedding": lambda rows: embedding(IDS[rows], X),
    "rms_norm": lambda rows: rms_norm(X[rows], W),
    "add_rms_norm": lambda rows: np.stack(add_rms_norm(X[rows], Y[rows], W), axis=1),
    "rope": lambda rows: rope(HEADS[rows], IDS[rows], TABLE),
    "rope interleaved": lambda rows: rope(HEADS[rows], IDS[rows], TABLE, interleaved=True),
    "swiglu": lambda rows: swiglu(X[rows], Y[rows]),
}


def differing_batches(op):
    """Batch sizes at which a row differs from the same row in the whole batch."""
    whole = op(slice(0, ROWS))
    first = [n for n in range(1, ROWS + 1) if op(slice(0, n)).tobytes() != whole[:n].tobytes()]
    return first + [n for n in range(1, ROWS + 1) if op(slice(ROWS - n, ROWS)).tobytes() != whole[ROWS - n :].tobytes()]


@pytest.mark.parametrize("name", ROW_OPS)
def test_rows_do_not_depend_on_the_batch(name):
    assert differing_batches(ROW_OPS[name]) == []


def test_control_a_norm_that_sums_by_memory_layout_is_caught():
    def ordinary(rows):
        x = np.asfortranarray(X[rows])  # one row is summed pairwise, several are summed column after column
        return np.ascontiguousarray(x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(EPS)))

    assert differing_batches(ordinary) != []


@pytest.mark.parametrize("name", ROW_OPS)
def test_threads_and_instruction_sets_give_the_same_bits(name):
    def big():
        return b"".join(ROW_OPS[name](slice(0, ROWS)).tobytes() for _ in range(2))

    _cpu.set_num_threads(1)
    want = big()
    for instruction_set in _cpu.instruction_sets():
        _cpu.set_instruction_set(instruction_set)
        for threads in (1, 2, 3):
            _cpu.set_num_threads(threads)
            assert big() == want, (instruction_set, threads)


def test_gradients_do_not_depend_on_threads_or_instruction_set():
    x, dy, w, inv = normal(0, 600, 200), normal(1, 600, 200), normal(2, 200), np.empty(600, np.float32)
    rms_norm(x, w, inv)
    ids = np.random.default_rng(0).integers(0, 9, 600).astype(np.int32)

    def gradients():
        dx, dw, dtable, dgate, dup = (
            np.zeros(s, np.float32) for s in [(600, 200), 200, (9, 200), (600, 200), (600, 200)]
        )
        _cpu.rms_norm_backward(dy, x, w, inv, dx, dw)
        _cpu.embedding_backward(ids, dy, dtable)
        _cpu.swiglu_backward(dy, x, dx, dgate, dup)
        return [array.tobytes() for array in (dx, dw, dtable, dgate, dup)]

    want = gradients()
    for instruction_set in _cpu.instruction_sets():
        _cpu.set_instruction_set(instruction_set)
        for threads in (1, 2, 3):
            _cpu.set_num_threads(threads)
            assert gradients() == want


# -- refusals ----------------------------------------------------------------------------------------------------------

F = np.float32
BAD = {
    r"ids\[1\] must be in \[0, 11\), got 11": lambda: embedding(np.array([0, 11], np.int32), normal(0, 11, 4)),
    r"rows\[0\] must be in \[0, 3\), got -1": lambda: _cpu.gather_rows(
        normal(0, 3, 4), np.array([-1], np.int32), np.empty((1, 4), F)
    ),
    r"out must have shape \(2, 4\), got \(2, 5\)": lambda: _cpu.embedding(
        np.zeros(2, np.int32), normal(0, 11, 4), np.empty((2, 5), F)
    ),
    r"w must have shape \(4\), got \(5\)": lambda: rms_norm(normal(0, 2, 4), normal(0, 5)),
    r"inv must have shape \(2\), got \(3\)": lambda: rms_norm(normal(0, 2, 4), normal(0, 4), np.empty(3, F)),
    r"delta must have shape": lambda: add_rms_norm(normal(0, 2, 4), normal(0, 3, 4), normal(0, 4)),
    r"positions\[0\] must be in \[0, 5\), got 5": lambda: rope(
        normal(0, 1, 1, 4), np.array([5], np.int32), rope_table(5, 4)
    ),
    r"rope must have shape \(\*, 2, 2\), got \(5, 2, 3\)": lambda: rope(
        normal(0, 1, 1, 4), np.zeros(1, np.int32), rope_table(5, 6)
    ),
    r"even head size, got 3": lambda: rope(normal(0, 1, 1, 3), np.zeros(1, np.int32), rope_table(5, 4)),
    r"up must have shape": lambda: swiglu(normal(0, 2, 4), normal(0, 2, 5)),
    r"slot_mapping\[0\] must be in \[-1, 16\), got 16": lambda: _cpu.kv_write(
        normal(0, 1, 1, 4),
        normal(0, 1, 1, 4),
        np.array([16], np.int32),
        np.zeros((2, 1, 4, 8), F),
        np.zeros((2, 1, 8, 4), F),
    ),
    r"v_cache must have shape \(2, 1, 8, 4\)": lambda: _cpu.kv_write(
        normal(0, 1, 1, 4),
        normal(0, 1, 1, 4),
        np.array([0], np.int32),
        np.zeros((2, 1, 4, 8), F),
        np.zeros((2, 1, 4, 8), F),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_would_read_out_of_bounds_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_outputs_are_never_copied_and_inputs_may_be_read_only():
    x, w = normal(0, 4, 6), normal(1, 6)
    for out in (np.empty((4, 6), np.float64), np.empty((6, 4), F).T, np.empty((4, 12), F)[:, ::2]):
        with pytest.raises(TypeError):
            _cpu.rms_norm(x, w, EPS, out)
    frozen = np.empty_like(x)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        _cpu.rms_norm(x, w, EPS, frozen)
    x.flags.writeable = w.flags.writeable = False
    close(rms_norm(x, w), norm64(x, w))


def test_no_rows_are_fine():
    none = np.zeros((0, 6), F)
    assert (
        rms_norm(none, normal(0, 6)).shape == swiglu(none, none).shape == embedding(np.zeros(0, np.int32), none).shape
    )
