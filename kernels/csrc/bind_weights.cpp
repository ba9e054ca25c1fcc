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

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t PIECE = int64_t{1} << 16;  // values that one thread takes at once

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

void stream_bytes(const Bytes& values, const OutBytes& out) {
  const int64_t count = static_cast<int64_t>(values.shape(0));
  if (static_cast<int64_t>(out.shape(0)) != count) throw std::invalid_argument("out must be as long as values");
  nb::gil_scoped_release release;
  kernels().stream(values.data(), count, out.data());
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
  m.def("stream_bytes", &stream_bytes, array("values"), array("out"),
        "Copy bytes [n] on the calling thread to memory that is not read soon.");
  m.def("round_bfloat16", &round_bfloat16, array("values"), array("out"),
        "float32 [n] rounded to the nearest bfloat16 value, ties to even.");
}
