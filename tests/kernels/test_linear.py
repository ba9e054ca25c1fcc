"""Matrix products: close to float64, the same bits for every batch, layout, instruction set and thread count."""

import numpy as np
import pytest

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.ops import LINEAR_K_SEGMENT

EPS = np.finfo(np.float32).eps
GUARD = np.float32(-12345)


@pytest.fixture(autouse=True)
def same_settings_after():
    name, threads = _cpu.instruction_set(), _cpu.num_threads()
    yield
    _cpu.set_instruction_set(name)
    _cpu.set_num_threads(threads)


def settings():
    for name in _cpu.instruction_sets():
        for threads in (1, 2, 3):
            _cpu.set_instruction_set(name)
            _cpu.set_num_threads(threads)
            yield f"{name}, {threads} threads"


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def guarded(rows, columns):
    """An output array between two rows of guards, and a check that they still stand."""
    whole = np.full((rows + 2, columns), GUARD)

    def check():
        assert (whole[0] == GUARD).all() and (whole[-1] == GUARD).all()

    return whole[1:-1], check


def pack(w):
    panels = np.full((-(-len(w) // 32), w.shape[1], 32), GUARD)
    _cpu.pack_linear(w, panels)
    return panels


def pack_gate_up(gate, up):
    panels = np.full((-(-len(gate) // 16), gate.shape[1], 32), GUARD)
    _cpu.pack_gate_up(gate, up, panels)
    return panels


def linear(x, panels, n, bias=None):
    out, check = guarded(len(x), n)
    _cpu.linear(x, panels, n, bias, out)
    check()
    return out


def unpacked(x, w, bias=None):
    out, check = guarded(len(x), len(w))
    _cpu.linear_unpacked(x, w, bias, out)
    check()
    return out


def swiglu_linear(x, panels, f):
    out, check = guarded(len(x), f)
    _cpu.swiglu_linear(x, panels, f, out)
    check()
    return out


def matmul(a, b, trans_a=False, trans_b=False):
    rows, columns = a.shape[int(trans_a)], b.shape[1 - int(trans_b)]
    out, check = guarded(rows, columns)
    _cpu.matmul(a, b, out, trans_a=trans_a, trans_b=trans_b)
    check()
    return out


def transposed(a):
    return np.ascontiguousarray(a.T)


def assert_same_bits(got, expected, what=""):
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32), what)


def fused(a, b, c):
    """c + a * b in float32, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd (towards the neighbour with an odd last bit,
    found from the exact error of the sum), after which rounding to float32 is as good as from the exact sum.
    """
    product, addend = np.float64(a) * np.float64(b), np.float64(c)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, odd, total).astype(np.float32)


def stated_order(x, w, bias):
    """The definition: fused multiply-adds in sequence inside segments, segments added in order, then the bias."""
    total = None
    for start in range(0, x.shape[1], LINEAR_K_SEGMENT):
        part = np.zeros((len(x), len(w)), np.float32)
        for k in range(start, min(start + LINEAR_K_SEGMENT, x.shape[1])):
            part = fused(x[:, k, None], w[None, :, k], part)
        total = part if total is None else total + part
    return total + bias


def test_segment_constant_is_shared():
    assert _cpu.LINEAR_K_SEGMENT == LINEAR_K_SEGMENT


@pytest.mark.parametrize("k", [1, 3, 255, 256, 257, 576, 1536])
@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 100])
def test_close_to_float64(n, k):
    x, w, bias = numbers(300, k), numbers(n, k, seed=1), numbers(n, seed=2)
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + bias
    bound = 4 * EPS * np.sqrt(k) * (np.abs(x) @ np.abs(w).T + np.abs(bias))
    panels = pack(w)
    for m in [*range(1, 18), 33, 300]:
        for got in (linear(x[:m], panels, n, bias), unpacked(x[:m], w, bias)):
            assert (np.abs(got - exact[:m]) <= bound[:m]).all(), f"{m} rows"


def test_rows_do_not_depend_on_the_batch():
    x, w, bias = numbers(300, 600), numbers(70, 600, seed=1), numbers(70, seed=2)
    gate, up = numbers(40, 600, seed=3), numbers(40, 600, seed=4)
    panels, gates = pack(w), pack_gate_up(gate, up)
    alone = np.concatenate([linear(x[i : i + 1], panels, 70, bias) for i in range(300)])
    alone_gated = np.concatenate([swiglu_linear(x[i : i + 1], gates, 40) for i in range(300)])
    for m in range(1, 301):
        first = (300 - m) // 2  # so that a row's place in the batch changes too
        rows = slice(first, first + m)
        assert_same_bits(linear(x[rows], panels, 70, bias), alone[rows], f"{m} rows")
        assert_same_bits(unpacked(x[rows], w, bias), alone[rows], f"{m} rows, unpacked")
        assert_same_bits(swiglu_linear(x[rows], gates, 40), alone_gated[rows], f"{m} rows, gated")


@pytest.mark.parametrize("k", [3, 256, 530])
def test_bits_are_those_of_the_stated_order_whatever_the_settings(k):
    x, w, bias = numbers(37, k), numbers(100, k, seed=1), numbers(100, seed=2)
    expected = stated_order(x, w, bias)
    product = expected if not bias.any() else stated_order(x, w, np.float32(0))
    for setting in settings():
        assert_same_bits(linear(x, pack(w), 100, bias), expected, setting)
        assert_same_bits(unpacked(x, w, bias), expected, setting)
        for rows in (1, 2, 5, 13, 29):
            assert_same_bits(linear(x[:rows], pack(w), 100, bias), expected[:rows], f"{setting}, {rows} rows")
        for trans_a in (False, True):
            for trans_b in (False, True):
                a, b = transposed(x) if trans_a else x, w if trans_b else transposed(w)
                assert_same_bits(matmul(a, b, trans_a, trans_b), product, f"{setting}, {trans_a=}, {trans_b=}")


def test_panels_hold_the_weights_whatever_the_settings():
    w, gate, up = numbers(75, 53), numbers(37, 53, seed=1), numbers(37, 53, seed=2)
    for setting in settings():
        columns = pack(w).transpose(0, 2, 1).reshape(-1, 53)
        assert_same_bits(columns[:75], w, setting)
        assert not columns[75:].any(), setting
        columns = pack_gate_up(gate, up).transpose(0, 2, 1).reshape(-1, 2, 16, 53)
        assert_same_bits(columns[:, 0].reshape(-1, 53)[:37], gate, setting)
        assert_same_bits(columns[:, 1].reshape(-1, 53)[:37], up, setting)
        assert not columns.transpose(1, 0, 2, 3).reshape(2, -1, 53)[:, 37:].any(), setting


@pytest.mark.parametrize("f", [1, 15, 16, 17, 40])
def test_swiglu_linear(f):
    x, gate, up = numbers(19, 300), numbers(f, 300, seed=1) / 8, numbers(f, 300, seed=2)
    wide = x.astype(np.float64)
    g, u = wide @ gate.T, wide @ up.T
    exact = g / (1 + np.exp(-g)) * u
    panels = pack_gate_up(gate, up)
    first = swiglu_linear(x, panels, f)
    np.testing.assert_allclose(first, exact, rtol=1e-4, atol=1e-5)
    separate = np.empty_like(first)
    _cpu.swiglu(unpacked(x, gate), unpacked(x, up), separate)
    assert_same_bits(first, separate)
    for setting in settings():
        assert_same_bits(swiglu_linear(x, panels, f), first, setting)


def test_matmul_accumulates_the_finished_product():
    a, b, start = numbers(45, 600), numbers(600, 70, seed=1), numbers(45, 70, seed=2)
    out = start.copy()
    _cpu.matmul(a, b, out, accumulate=True)
    assert_same_bits(out, start + matmul(a, b))


def test_long_inner_dimension_has_the_same_bits():
    """Many rows of many inputs are copied in parts; one row is copied whole."""
    a, b = numbers(512, 5000), numbers(33, 5000, seed=1)
    panels = pack(b)
    whole = linear(a, panels, 33)
    assert_same_bits(matmul(transposed(a), b, trans_a=True, trans_b=True), whole)
    assert_same_bits(matmul(a, transposed(b)), whole)
    for row in (0, 255, 511):
        assert_same_bits(whole[row : row + 1], linear(a[row : row + 1], panels, 33))


def test_bad_numbers_stay_in_their_row():
    x, w = numbers(30, 300), numbers(40, 300, seed=1)
    clean = linear(x, pack(w), 40)
    x[7, 11], x[20, 299] = np.nan, np.inf
    dirty = linear(x, pack(w), 40)
    assert np.isnan(dirty[7]).all() and not np.isfinite(dirty[20]).any()
    others = [i for i in range(30) if i not in (7, 20)]
    assert_same_bits(dirty[others], clean[others])


def test_ordinary_products_do_depend_on_the_batch():
    """The negative control: the comparison of bits tells Paddle's and NumPy's products from ours."""
    import paddle

    x, w = numbers(7, 576), numbers(1536, 576, seed=1)
    panels = pack(w)

    def by_paddle(rows):
        return paddle.matmul(paddle.to_tensor(rows), paddle.to_tensor(w), transpose_y=True).numpy()

    def differs(product):
        return any(not np.array_equal(product(x[:m])[i], product(x[i : i + 1])[0]) for m in (3, 7) for i in range(m))

    assert differs(by_paddle)
    assert differs(lambda rows: rows @ w.T)
    assert not differs(lambda rows: linear(rows, panels, 1536))


def test_no_rows_is_no_work():
    assert linear(np.empty((0, 8), np.float32), pack(numbers(5, 8)), 5).shape == (0, 5)


def floats(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: _cpu.pack_linear(floats(33, 8), floats(1, 8, 32)),
            "panels must have shape .2, 8, 32., got .1, 8, 32.",
        ),
        (lambda: _cpu.pack_linear(floats(0, 8), floats(0, 8, 32)), "w.shape.0. must be at least 1, got 0"),
        (lambda: _cpu.pack_gate_up(floats(16, 8), floats(17, 8), floats(1, 8, 32)), "up must have shape .16, 8."),
        (
            lambda: _cpu.linear(floats(2, 8), floats(1, 9, 32), 5, None, floats(2, 5)),
            "panels must have shape .1, 8, 32.",
        ),
        (lambda: _cpu.linear(floats(2, 8), floats(1, 8, 32), 33, None, floats(2, 33)), "panels must have shape"),
        (lambda: _cpu.linear(floats(2, 8), floats(1, 8, 32), 0, None, floats(2, 0)), "n must be at least 1, got 0"),
        (lambda: _cpu.linear(floats(2, 8), floats(1, 8, 32), 5, floats(6), floats(2, 5)), "bias must have shape .5."),
        (lambda: _cpu.linear(floats(2, 8), floats(1, 8, 32), 5, None, floats(3, 5)), "out must have shape .2, 5."),
        (lambda: _cpu.linear(floats(2, 0), floats(1, 0, 32), 5, None, floats(2, 5)), "x.shape.1. must be at least 1"),
        (lambda: _cpu.swiglu_linear(floats(2, 8), floats(1, 8, 32), 17, floats(2, 17)), "panels must have shape"),
        (lambda: _cpu.linear_unpacked(floats(2, 8), floats(5, 9), None, floats(2, 5)), "w must have shape .5, 8."),
        (lambda: _cpu.matmul(floats(2, 8), floats(9, 5), floats(2, 5)), "b must have shape .8, 5."),
        (lambda: _cpu.matmul(floats(2, 8), floats(5, 9), floats(2, 5), trans_b=True), "b must have shape .5, 8."),
        (lambda: _cpu.matmul(floats(8, 2), floats(8, 5), floats(8, 5), trans_a=True), "out must have shape .2, 5."),
        (lambda: _cpu.read_bandwidth(10, 0.1), "bytes must be at least"),
        (lambda: _cpu.aligned_empty(0), "floats must be at least 1, got 0"),
    ],
)
def test_wrong_sizes_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_wrong_types_and_layouts_are_refused():
    x, w, out = numbers(4, 8), numbers(5, 8), floats(4, 5)
    read_only = floats(4, 5)
    read_only.flags.writeable = False
    for args in [
        (x.astype(np.float64), w, None, out),
        (numbers(8, 4).T, w, None, out),
        (numbers(4, 16)[:, ::2], w, None, out),
        (x, w, None, floats(4, 10)[:, ::2]),
        (x, w, None, read_only),
        (x, w, None, floats(4, 5).astype(np.float64)),
        (x[0], w, None, out),
    ]:
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _cpu.linear_unpacked(*args)
    x.flags.writeable = False  # inputs may be read-only: weights that are mapped from shared memory are
    _cpu.linear_unpacked(x, w, None, out)


def test_aligned_empty():
    for size in (1, 1000, (1 << 19) + 5):
        array = _cpu.aligned_empty(size)
        assert array.shape == (size,) and array.dtype == np.float32 and array.ctypes.data % 64 == 0
        array[:] = 1.0


def test_measurements_are_plausible():
    assert 0.1 < _cpu.fma_peak(0.02) < 1e6
    assert 0.1 < _cpu.read_bandwidth(16 << 20, 0.02) < 1e5
