// Bindings of what happens to weights on their way: see weights.h.

#include "array_checks.h"
#include "dispatch.h"
#include "thread_pool.h"
#include "weights.h"

namespace nb = nanobind;
using zk::array;
using zk::expect_shape;
using zk::extent;

namespace {

using Patterns = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutPatterns = nb::ndarray<uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t PIECE = int64_t{1} << 16;  // values that one thread takes at once
constexpr int64_t SHORT = 240;               // bytes, whose checksum has another algorithm

const zk::WeightKernels& kernels() { return ZK_PICK(zk::weights); }

bool copy_weights(const In<1>& values, const Out<1>& out) {
  expect_shape("out", out, {extent(values, 0)});
  nb::gil_scoped_release release;
  return kernels().copy(values.data(), extent(values, 0), out.data());
}

bool widen_weights(const Patterns& values, const Out<1>& out) {
  expect_shape("out", out, {extent(values, 0)});
  nb::gil_scoped_release release;
  return kernels().widen(values.data(), extent(values, 0), out.data());
}

void narrow_bfloat16(const In<1>& values, const OutPatterns& out) {
  expect_shape("out", out, {extent(values, 0)});
  nb::gil_scoped_release release;
  kernels().narrow(values.data(), extent(values, 0), out.data());
}

template <class Out>
uint64_t fill(const In<1>& values, const Out& out, uint64_t (*kernel)(const float*, int64_t, typename Out::Scalar*)) {
  const int64_t count = extent(values, 0), bytes = count * static_cast<int64_t>(sizeof(typename Out::Scalar));
  expect_shape("out", out, {count});
  if (bytes <= SHORT) throw std::invalid_argument("out must have more than 240 bytes, got " + std::to_string(bytes));
  nb::gil_scoped_release release;
  return kernel(values.data(), count, out.data());
}

void round_bfloat16(const In<1>& values, const Out<1>& out) {
  const int64_t count = extent(values, 0);
  expect_shape("out", out, {count});
  nb::gil_scoped_release release;
  zk::parallel_for((count + PIECE - 1) / PIECE, [&](int64_t i) {
    const int64_t first = i * PIECE, length = count - first < PIECE ? count - first : PIECE;
    kernels().round(values.data() + first, length, out.data() + first);
  });
}

}  // namespace

void bind_weights(nb::module_& m) {
  m.def("copy_weights", &copy_weights, array("values"), array("out"),
        "Copy float32 [n] on the calling thread; whether no value is a NaN or an infinity.");
  m.def("copy_weights", &widen_weights, array("values"), array("out"),
        "Widen bfloat16 patterns (uint16) [n] to float32; whether no value is a NaN or an infinity.");
  m.def("narrow_bfloat16", &narrow_bfloat16, array("values"), array("out"),
        "The bfloat16 patterns (uint16) nearest to float32 [n], ties to even, on the calling thread.");
  m.def("fill_weights", [](const In<1>& values, const Out<1>& out) { return fill(values, out, kernels().fill); },
        array("values"), array("out"),
        "Copy float32 [n] on the calling thread, to memory that is not read soon; the xxh3_64 of its bytes (> 240).");
  m.def("fill_weights",
        [](const In<1>& values, const OutPatterns& out) { return fill(values, out, kernels().fill_bfloat16); },
        array("values"), array("out"), "The same, to the nearest bfloat16 patterns (uint16).");
  m.def("round_bfloat16", &round_bfloat16, array("values"), array("out"),
        "float32 [n] rounded to the nearest bfloat16 value, ties to even.");
}
