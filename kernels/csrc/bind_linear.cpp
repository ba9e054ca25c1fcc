// Bindings of the matrix products, and the two measurements that benchmarks compare with.
#include <nanobind/stl/optional.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "array_checks.h"
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

using zk::array;
using zk::expect_shape;
using zk::extent;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void expect_at_least(const char* name, int64_t value, int64_t bound) {
  if (value >= bound) return;
  throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(bound) + ", got " +
                              std::to_string(value));
}

void multiply(const Product& product) {
  nb::gil_scoped_release release;
  ZK_PICK(zk::linear).multiply(product);
}

using Patterns = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

bool pack(const float* w, int64_t n, int64_t k, float* panels, bool pool) {
  return ZK_PICK(zk::linear).pack(w, n, k, panels, pool);
}
bool pack(const uint16_t* w, int64_t n, int64_t k, float* panels, bool pool) {
  return ZK_PICK(zk::linear).pack_bfloat16(w, n, k, panels, pool);
}
bool pack(const float* gate, const float* up, int64_t f, int64_t k, float* panels, bool pool) {
  return ZK_PICK(zk::linear).pack_gate_up(gate, up, f, k, panels, pool);
}
bool pack(const uint16_t* gate, const uint16_t* up, int64_t f, int64_t k, float* panels, bool pool) {
  return ZK_PICK(zk::linear).pack_gate_up_bfloat16(gate, up, f, k, panels, pool);
}

template <class Weights>
bool pack_linear(const Weights& w, const Out<3>& panels, bool pool) {
  expect_at_least("w.shape[0]", extent(w, 0), 1);
  expect_at_least("w.shape[1]", extent(w, 1), 1);
  expect_shape("panels", panels, {ceil_div(extent(w, 0), PANEL), extent(w, 1), PANEL});
  nb::gil_scoped_release release;
  return pack(w.data(), extent(w, 0), extent(w, 1), panels.data(), pool);
}

template <class Weights>
bool pack_gate_up(const Weights& gate, const Weights& up, const Out<3>& panels, bool pool) {
  expect_at_least("gate.shape[0]", extent(gate, 0), 1);
  expect_at_least("gate.shape[1]", extent(gate, 1), 1);
  expect_shape("up", up, {extent(gate, 0), extent(gate, 1)});
  expect_shape("panels", panels, {ceil_div(extent(gate, 0), PANEL / 2), extent(gate, 1), PANEL});
  nb::gil_scoped_release release;
  return pack(gate.data(), up.data(), extent(gate, 0), extent(gate, 1), panels.data(), pool);
}

void linear(const In<2>& x, const In<3>& panels, int64_t n, const std::optional<In<1>>& bias, const Out<2>& out) {
  const int64_t m = extent(x, 0), k = extent(x, 1);
  expect_at_least("n", n, 1);
  expect_at_least("x.shape[1]", k, 1);
  expect_shape("panels", panels, {ceil_div(n, PANEL), k, PANEL});
  if (bias) expect_shape("bias", *bias, {n});
  expect_shape("out", out, {m, n});
  multiply(Product{x.data(), false, panels.data(), Right::panels, bias ? bias->data() : nullptr, out.data(), m, n, k, n,
                   Finish::store});
}

void swiglu_linear(const In<2>& x, const In<3>& panels, int64_t f, const Out<2>& out) {
  const int64_t m = extent(x, 0), k = extent(x, 1), gate_panels = ceil_div(f, PANEL / 2);
  expect_at_least("f", f, 1);
  expect_at_least("x.shape[1]", k, 1);
  expect_shape("panels", panels, {gate_panels, k, PANEL});
  expect_shape("out", out, {m, f});
  multiply(Product{x.data(), false, panels.data(), Right::panels, nullptr, out.data(), m, gate_panels * PANEL, k, f,
                   Finish::swiglu});
}

void linear_unpacked(const In<2>& x, const In<2>& w, const std::optional<In<1>>& bias, const Out<2>& out) {
  const int64_t m = extent(x, 0), k = extent(x, 1), n = extent(w, 0);
  expect_at_least("w.shape[0]", n, 1);
  expect_at_least("x.shape[1]", k, 1);
  expect_shape("w", w, {n, k});
  if (bias) expect_shape("bias", *bias, {n});
  expect_shape("out", out, {m, n});
  multiply(Product{x.data(), false, w.data(), Right::rows, bias ? bias->data() : nullptr, out.data(), m, n, k, n,
                   Finish::store});
}

void matmul(const In<2>& a, const In<2>& b, const Out<2>& out, bool trans_a, bool trans_b, bool accumulate) {
  const int64_t m = extent(a, trans_a ? 1 : 0), k = extent(a, trans_a ? 0 : 1), n = extent(b, trans_b ? 0 : 1);
  expect_at_least("the inner size of a", k, 1);
  expect_at_least("the outer size of b", n, 1);
  if (trans_b)
    expect_shape("b", b, {n, k});
  else
    expect_shape("b", b, {k, n});
  expect_shape("out", out, {m, n});
  multiply(Product{a.data(), trans_a, b.data(), trans_b ? Right::rows : Right::columns, nullptr, out.data(), m, n, k, n,
                   accumulate ? Finish::add : Finish::store});
}

// Reading weights through 4 KiB pages costs some per cent of the memory bandwidth. Huge pages need alignment and a
// hint; the rest that does not fill one stays on small pages.
constexpr size_t HUGE_PAGE = size_t{2} << 20, CACHE_LINE = 64;

using Block = nb::ndarray<nb::numpy, float, nb::ndim<1>>;

Block heap_block(size_t floats) {
  void* data = nullptr;
  if (posix_memalign(&data, CACHE_LINE, floats * sizeof(float))) throw std::bad_alloc();
  return Block(data, {floats}, nb::capsule(data, [](void* memory) noexcept { std::free(memory); }));
}

#if defined(__linux__)
struct Mapping {
  void* start;
  size_t bytes;
};

// Mapped and not from the heap, which would keep a freed block if it had found room for it between others.
Block mapped_block(size_t floats) {
  const size_t bytes = floats * sizeof(float) + HUGE_PAGE;
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  nb::capsule owner(new Mapping{start, bytes}, [](void* memory) noexcept {
    auto* mapping = static_cast<Mapping*>(memory);
    munmap(mapping->start, mapping->bytes);
    delete mapping;
  });
  auto* data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(start) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
#if defined(MADV_HUGEPAGE)
  madvise(data, floats * sizeof(float) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
  return Block(data, {floats}, owner);
}
#endif

Block aligned_empty(int64_t floats) {
  expect_at_least("floats", floats, 1);
#if defined(__linux__)
  if (static_cast<size_t>(floats) * sizeof(float) >= HUGE_PAGE) return mapped_block(static_cast<size_t>(floats));
#endif
  return heap_block(static_cast<size_t>(floats));
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
  expect_at_least("bytes", bytes, 4 * PIECE);
  const int64_t pieces = bytes / (4 * PIECE);
  const auto array = aligned_empty(pieces * PIECE);
  float* data = array.data();
  nb::gil_scoped_release release;
  std::fill(data, data + pieces * PIECE, 1.0f);
  const auto& kernels = ZK_PICK(zk::linear);
  return best_rate(seconds, static_cast<double>(pieces * PIECE * 4), [&] {
           zk::parallel_for(pieces, [&](int64_t i) {
             sink.store(kernels.read(data + i * PIECE, PIECE), std::memory_order_relaxed);
           });
         }) / 1e9;
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.attr("LINEAR_K_SEGMENT") = zk::LINEAR_K_SEGMENT;
  m.def("aligned_empty", &aligned_empty, "floats"_a,
        "Uninitialised float32 [floats] at a cache line and, from 2 MiB on, at a huge page: for packed weights.");
  const char* linear_text =
      "Pack w [N, K], float32 or bfloat16 patterns (uint16), into panels [ceil(N / 32), K, 32], zero-padded; whether no "
      "value is a NaN or an infinity. Without `pool` on the calling thread alone: a step need not wait.";
  m.def("pack_linear", &pack_linear<In<2>>, array("w"), array("panels"), "pool"_a = true, linear_text);
  m.def("pack_linear", &pack_linear<Patterns>, array("w"), array("panels"), "pool"_a = true, linear_text);
  const char* gate_up_text =
      "Pack gate and up [F, K] into panels [ceil(F / 16), K, 32]: 16 gate columns, then the 16 up columns. Otherwise as "
      "pack_linear.";
  m.def("pack_gate_up", &pack_gate_up<In<2>>, array("gate"), array("up"), array("panels"), "pool"_a = true,
        gate_up_text);
  m.def("pack_gate_up", &pack_gate_up<Patterns>, array("gate"), array("up"), array("panels"), "pool"_a = true,
        gate_up_text);
  m.def("linear", &linear, array("x"), array("panels"), "n"_a, array("bias").none(),
        array("out"), "out [M, N] = x [M, K] times packed weights, + bias [N].");
  m.def("swiglu_linear", &swiglu_linear, array("x"), array("panels"), "f"_a, array("out"),
        "out [M, F] = silu(x gate^T) * (x up^T), weights packed by pack_gate_up.");
  m.def("linear_unpacked", &linear_unpacked, array("x"), array("w"), array("bias").none(),
        array("out"), "out [M, N] = x [M, K] w [N, K]^T + bias [N]: the same bits as `linear`.");
  m.def("matmul", &matmul, array("a"), array("b"), array("out"), "trans_a"_a = false,
        "trans_b"_a = false, "accumulate"_a = false,
        "out [M, N] = (or, accumulating, +=) a b, where a is [M, K] or, transposed, [K, M], and b [K, N] or [N, K].");
  m.def("fma_peak", &fma_peak, "seconds"_a, "Best float32 multiply-add rate of all threads, in GFLOP/s.");
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "seconds"_a,
        "Best rate at which all threads read a buffer of `bytes` bytes, in GB/s.");
}
