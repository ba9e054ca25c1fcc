// Bindings of the matrix products, and the two measurements that benchmarks compare with.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "dispatch.h"
#include "linear.h"
#include "thread_pool.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using zk::Finish;
using zk::PANEL;
using zk::Product;
using zk::Right;

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Panels = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Array>
std::string shape_text(const Array& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

template <class Array>
void check_shape(const char* name, const Array& array, std::initializer_list<int64_t> expected) {
  size_t axis = 0;
  std::string text;
  bool equal = true;
  for (int64_t size : expected) {
    text += (axis ? ", " : "") + std::to_string(size);
    equal = equal && static_cast<int64_t>(array.shape(axis++)) == size;
  }
  if (!equal) throw nb::value_error((std::string(name) + " must have shape [" + text + "], got " + shape_text(array)).c_str());
}

void check_positive(const char* name, int64_t value) {
  if (value < 1) throw nb::value_error((std::string(name) + " must be at least 1, got " + std::to_string(value)).c_str());
}

template <class Array>
int64_t size(const Array& array, size_t axis) {
  return static_cast<int64_t>(array.shape(axis));
}

void multiply(const Product& product) {
  nb::gil_scoped_release release;
  ZK_PICK(zk::linear).multiply(product);
}

void pack_linear(const Matrix& w, const Floats3& panels) {
  check_positive("w.shape[0]", size(w, 0));
  check_positive("w.shape[1]", size(w, 1));
  check_shape("panels", panels, {ceil_div(size(w, 0), PANEL), size(w, 1), PANEL});
  nb::gil_scoped_release release;
  ZK_PICK(zk::linear).pack(w.data(), size(w, 0), size(w, 1), panels.data());
}

void pack_gate_up(const Matrix& gate, const Matrix& up, const Floats3& panels) {
  check_positive("gate.shape[0]", size(gate, 0));
  check_positive("gate.shape[1]", size(gate, 1));
  check_shape("up", up, {size(gate, 0), size(gate, 1)});
  check_shape("panels", panels, {ceil_div(size(gate, 0), PANEL / 2), size(gate, 1), PANEL});
  nb::gil_scoped_release release;
  ZK_PICK(zk::linear).pack_gate_up(gate.data(), up.data(), size(gate, 0), size(gate, 1), panels.data());
}

void linear(const Matrix& x, const Panels& panels, int64_t n, const std::optional<Vector>& bias, const Floats2& out) {
  const int64_t m = size(x, 0), k = size(x, 1);
  check_positive("n", n);
  check_positive("x.shape[1]", k);
  check_shape("panels", panels, {ceil_div(n, PANEL), k, PANEL});
  if (bias) check_shape("bias", *bias, {n});
  check_shape("out", out, {m, n});
  multiply(Product{x.data(), false, panels.data(), Right::panels, bias ? bias->data() : nullptr, out.data(), m, n, k, n,
                   Finish::store});
}

void swiglu_linear(const Matrix& x, const Panels& panels, int64_t f, const Floats2& out) {
  const int64_t m = size(x, 0), k = size(x, 1), gate_panels = ceil_div(f, PANEL / 2);
  check_positive("f", f);
  check_positive("x.shape[1]", k);
  check_shape("panels", panels, {gate_panels, k, PANEL});
  check_shape("out", out, {m, f});
  multiply(Product{x.data(), false, panels.data(), Right::panels, nullptr, out.data(), m, gate_panels * PANEL, k, f,
                   Finish::swiglu});
}

void linear_unpacked(const Matrix& x, const Matrix& w, const std::optional<Vector>& bias, const Floats2& out) {
  const int64_t m = size(x, 0), k = size(x, 1), n = size(w, 0);
  check_positive("w.shape[0]", n);
  check_positive("x.shape[1]", k);
  check_shape("w", w, {n, k});
  if (bias) check_shape("bias", *bias, {n});
  check_shape("out", out, {m, n});
  multiply(Product{x.data(), false, w.data(), Right::rows, bias ? bias->data() : nullptr, out.data(), m, n, k, n,
                   Finish::store});
}

void matmul(const Matrix& a, const Matrix& b, const Floats2& out, bool trans_a, bool trans_b, bool accumulate) {
  const int64_t m = size(a, trans_a ? 1 : 0), k = size(a, trans_a ? 0 : 1), n = size(b, trans_b ? 0 : 1);
  check_positive("the inner size of a", k);
  check_positive("the outer size of b", n);
  if (trans_b)
    check_shape("b", b, {n, k});
  else
    check_shape("b", b, {k, n});
  check_shape("out", out, {m, n});
  multiply(Product{a.data(), trans_a, b.data(), trans_b ? Right::rows : Right::columns, nullptr, out.data(), m, n, k, n,
                   accumulate ? Finish::add : Finish::store});
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The best rate of `amount` per call of `body`, over calls that fill `seconds`.
template <class Body>
double best_rate(double seconds, double amount, Body body) {
  double best = 0.0;
  const Clock::time_point start = Clock::now();
  do {
    const Clock::time_point begin = Clock::now();
    body();
    best = std::max(best, amount / seconds_since(begin));
  } while (seconds_since(start) < seconds);
  return best;
}

std::atomic<float> sink;  // what measured loops return goes here, or the compiler would drop the loops

double fma_peak(double seconds) {
  nb::gil_scoped_release release;
  const int64_t pieces = 8 * zk::num_threads(), rounds = 20000;
  const auto& kernels = ZK_PICK(zk::linear);
  const double flops = 2.0 * static_cast<double>(pieces * rounds * zk::FMA_PER_ROUND);
  return best_rate(seconds, flops, [&] {
           zk::parallel_for(pieces, [&](int64_t) { sink.store(kernels.fma_burst(rounds), std::memory_order_relaxed); });
         }) / 1e9;
}

double read_bandwidth(int64_t bytes, double seconds) {
  constexpr int64_t PIECE = int64_t{1} << 18;  // floats
  if (bytes < 4 * PIECE) throw nb::value_error(("bytes must be at least " + std::to_string(4 * PIECE) + ", got " + std::to_string(bytes)).c_str());
  nb::gil_scoped_release release;
  const int64_t pieces = bytes / (4 * PIECE);
  const std::unique_ptr<float[]> data(new float[static_cast<size_t>(pieces * PIECE)]);
  std::fill(data.get(), data.get() + pieces * PIECE, 1.0f);
  const auto& kernels = ZK_PICK(zk::linear);
  return best_rate(seconds, static_cast<double>(pieces * PIECE * 4), [&] {
           zk::parallel_for(pieces, [&](int64_t i) {
             sink.store(kernels.read(data.get() + i * PIECE, PIECE), std::memory_order_relaxed);
           });
         }) / 1e9;
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.attr("LINEAR_K_SEGMENT") = zk::LINEAR_K_SEGMENT;
  m.def("pack_linear", &pack_linear, "w"_a.noconvert(), "panels"_a.noconvert(),
        "Pack w [N, K] into panels [ceil(N / 32), K, 32], zero-padded.");
  m.def("pack_gate_up", &pack_gate_up, "gate"_a.noconvert(), "up"_a.noconvert(), "panels"_a.noconvert(),
        "Pack gate and up [F, K] into panels [ceil(F / 16), K, 32]: 16 gate columns, then the 16 up columns.");
  m.def("linear", &linear, "x"_a.noconvert(), "panels"_a.noconvert(), "n"_a, "bias"_a.noconvert().none(),
        "out"_a.noconvert(), "out [M, N] = x [M, K] times packed weights, + bias [N].");
  m.def("swiglu_linear", &swiglu_linear, "x"_a.noconvert(), "panels"_a.noconvert(), "f"_a, "out"_a.noconvert(),
        "out [M, F] = silu(x gate^T) * (x up^T), weights packed by pack_gate_up.");
  m.def("linear_unpacked", &linear_unpacked, "x"_a.noconvert(), "w"_a.noconvert(), "bias"_a.noconvert().none(),
        "out"_a.noconvert(), "out [M, N] = x [M, K] w [N, K]^T + bias [N]: the same bits as `linear`.");
  m.def("matmul", &matmul, "a"_a.noconvert(), "b"_a.noconvert(), "out"_a.noconvert(), "trans_a"_a = false,
        "trans_b"_a = false, "accumulate"_a = false,
        "out [M, N] = (or, accumulating, +=) a b, where a is [M, K] or, transposed, [K, M], and b [K, N] or [N, K].");
  m.def("fma_peak", &fma_peak, "seconds"_a, "Best float32 multiply-add rate of all threads over short runs, in GFLOP/s.");
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "seconds"_a,
        "Best rate at which all threads read a buffer of `bytes` bytes, in GB/s.");
}
