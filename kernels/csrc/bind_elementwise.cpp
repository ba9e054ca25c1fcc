// Bindings of the row-wise ops: every index that a kernel follows is checked here.
#include <nanobind/stl/optional.h>

#include <optional>

#include "array_checks.h"
#include "dispatch.h"
#include "elementwise.h"

namespace nb = nanobind;
using namespace nb::literals;
using nb::gil_scoped_release;
using zk::array;
using zk::expect_range;
using zk::expect_shape;
using zk::extent;

namespace {

constexpr int64_t MAX_HEADS = 1 << 16;  // keeps products of sizes far from overflow

const zk::ElementwiseKernels& kernels() { return ZK_PICK(zk::elementwise); }

template <class Array>
float* data_or_null(const std::optional<Array>& array) {
  return array ? array->data() : nullptr;
}

void gather(const char* index_name, const char* source_name, const In<2>& x, const Indices<1>& rows,
            const Out<2>& out) {
  expect_range(index_name, rows, 0, extent(x, 0));
  expect_shape("out", out, {extent(rows, 0), extent(x, 1)});
  if (out.data() == x.data() && out.size()) throw std::invalid_argument(std::string("out must not be ") + source_name);
  gil_scoped_release nogil;
  kernels().gather_rows(x.data(), rows.data(), extent(rows, 0), extent(x, 1), out.data());
}

void embedding(const Indices<1>& ids, const In<2>& table, const Out<2>& out) {
  gather("ids", "table", table, ids, out);
}

void embedding_from_panels(const Indices<1>& ids, const In<3>& panels, const Out<2>& out) {
  expect_range("ids", ids, 0, extent(panels, 0) * 32);
  expect_shape("panels", panels, {extent(panels, 0), extent(panels, 1), 32});
  expect_shape("out", out, {extent(ids, 0), extent(panels, 1)});
  gil_scoped_release nogil;
  kernels().gather_from_panels(panels.data(), ids.data(), extent(ids, 0), extent(panels, 1), out.data());
}

void gather_rows(const In<2>& x, const Indices<1>& rows, const Out<2>& out) { gather("rows", "x", x, rows, out); }

void embedding_backward(const Indices<1>& ids, const In<2>& dout, const Out<2>& dtable) {
  expect_range("ids", ids, 0, extent(dtable, 0));
  expect_shape("dout", dout, {extent(ids, 0), extent(dtable, 1)});
  gil_scoped_release nogil;
  kernels().embedding_backward(ids.data(), dout.data(), extent(ids, 0), extent(dtable, 1), dtable.data());
}

void rms_norm(const In<2>& x, const In<1>& w, float eps, const Out<2>& out, const std::optional<Out<1>>& inv) {
  const int64_t rows = extent(x, 0), width = extent(x, 1);
  expect_shape("w", w, {width});
  expect_shape("out", out, {rows, width});
  if (inv) expect_shape("inv", *inv, {rows});
  gil_scoped_release nogil;
  kernels().rms_norm(x.data(), w.data(), eps, rows, width, out.data(), data_or_null(inv));
}

void add_rms_norm(const In<2>& residual, const In<2>& delta, const In<1>& w, float eps, const Out<2>& residual_out,
                  const Out<2>& out, const std::optional<Out<1>>& inv) {
  const int64_t rows = extent(residual, 0), width = extent(residual, 1);
  expect_shape("delta", delta, {rows, width});
  expect_shape("w", w, {width});
  expect_shape("residual_out", residual_out, {rows, width});
  expect_shape("out", out, {rows, width});
  if (inv) expect_shape("inv", *inv, {rows});
  const bool apart = out.data() != residual_out.data() && out.data() != residual.data();
  zk::require(apart || !out.size(), "out must not be residual or residual_out");
  gil_scoped_release nogil;
  kernels().add_rms_norm(residual.data(), delta.data(), w.data(), eps, rows, width, residual_out.data(), out.data(),
                         data_or_null(inv));
}

void rms_norm_backward(const In<2>& dy, const In<2>& x, const In<1>& w, const In<1>& inv, const Out<2>& dx,
                       const Out<1>& dw) {
  const int64_t rows = extent(x, 0), width = extent(x, 1);
  expect_shape("dy", dy, {rows, width});
  expect_shape("w", w, {width});
  expect_shape("inv", inv, {rows});
  expect_shape("dx", dx, {rows, width});
  expect_shape("dw", dw, {width});
  const bool apart = dx.data() != dy.data() && dx.data() != x.data();
  zk::require(apart || !dx.size(), "dx must be neither dy nor x");
  gil_scoped_release nogil;
  kernels().rms_norm_backward(dy.data(), x.data(), w.data(), inv.data(), rows, width, dx.data(), dw.data());
}

zk::Rotary rotary(int64_t tokens, int64_t dim, const Indices<1>& positions, const In<3>& table, bool interleaved,
                  bool inverse) {
  expect_shape("positions", positions, {tokens});
  if (dim % 2) throw std::invalid_argument("rotary embedding wants an even head size, got " + std::to_string(dim));
  expect_shape("rope", table, {-1, 2, dim / 2});
  expect_range("positions", positions, 0, extent(table, 0));
  return {table.data(), positions.data(), dim / 2, interleaved, inverse};
}

void rope(const In<3>& x, const Indices<1>& positions, const In<3>& table, bool interleaved, bool inverse,
          const Out<3>& out) {
  const zk::Rotary how = rotary(extent(x, 0), extent(x, 2), positions, table, interleaved, inverse);
  expect_shape("out", out, {extent(x, 0), extent(x, 1), extent(x, 2)});
  gil_scoped_release nogil;
  kernels().rope(x.data(), extent(x, 0), extent(x, 1), how, out.data());
}

void swiglu(const In<2>& gate, const In<2>& up, const Out<2>& out) {
  expect_shape("up", up, {extent(gate, 0), extent(gate, 1)});
  expect_shape("out", out, {extent(gate, 0), extent(gate, 1)});
  gil_scoped_release nogil;
  kernels().swiglu(gate.data(), up.data(), static_cast<int64_t>(gate.size()), out.data());
}

void swiglu_backward(const In<2>& dout, const In<2>& gate, const In<2>& up, const Out<2>& dgate, const Out<2>& dup) {
  const int64_t rows = extent(gate, 0), width = extent(gate, 1);
  expect_shape("dout", dout, {rows, width});
  expect_shape("up", up, {rows, width});
  expect_shape("dgate", dgate, {rows, width});
  expect_shape("dup", dup, {rows, width});
  gil_scoped_release nogil;
  kernels().swiglu_backward(dout.data(), gate.data(), up.data(), rows * width, dgate.data(), dup.data());
}

zk::KvCache kv_cache(const Out<4>& keys, const Out<4>& values, int64_t kv_heads, int64_t dim, const Indices<1>& slots,
                     int64_t tokens) {
  expect_shape("k_cache", keys, {-1, kv_heads, dim, -1});
  const int64_t blocks = extent(keys, 0), block_size = extent(keys, 3);
  expect_shape("v_cache", values, {blocks, kv_heads, block_size, dim});
  expect_shape("slot_mapping", slots, {tokens});
  expect_range("slot_mapping", slots, -1, blocks * block_size);
  return {keys.data(), values.data(), kv_heads, dim, block_size};
}

void kv_write(const In<3>& k, const In<3>& v, const Indices<1>& slot_mapping, const Out<4>& k_cache,
              const Out<4>& v_cache) {
  const int64_t tokens = extent(k, 0), heads = extent(k, 1), dim = extent(k, 2);
  expect_shape("v", v, {tokens, heads, dim});
  const zk::KvCache cache = kv_cache(k_cache, v_cache, heads, dim, slot_mapping, tokens);
  gil_scoped_release nogil;
  kernels().kv_write(k.data(), v.data(), tokens, slot_mapping.data(), cache);
}

void qkv_to_cache(const In<2>& qkv, int64_t heads, int64_t kv_heads, const std::optional<In<1>>& q_norm,
                  const std::optional<In<1>>& k_norm, float eps, const Indices<1>& positions, const In<3>& table,
                  bool interleaved, const Indices<1>& slot_mapping, const Out<4>& k_cache, const Out<4>& v_cache,
                  const Out<3>& q_out) {
  const int64_t tokens = extent(qkv, 0), dim = extent(q_out, 2);
  if (heads < 1 || heads > MAX_HEADS) zk::refuse("heads", zk::closed(1, MAX_HEADS), heads);
  if (kv_heads < 1 || kv_heads > MAX_HEADS) zk::refuse("kv_heads", zk::closed(1, MAX_HEADS), kv_heads);
  if (dim > zk::MAX_HEAD_DIM) zk::refuse("head size", zk::closed(1, zk::MAX_HEAD_DIM), dim);
  expect_shape("q_out", q_out, {tokens, heads, dim});
  expect_shape("qkv", qkv, {tokens, (heads + 2 * kv_heads) * dim});
  if (q_norm) expect_shape("q_norm", *q_norm, {dim});
  if (k_norm) expect_shape("k_norm", *k_norm, {dim});
  const zk::Rotary how = rotary(tokens, dim, positions, table, interleaved, false);
  const zk::KvCache cache = kv_cache(k_cache, v_cache, kv_heads, dim, slot_mapping, tokens);
  const zk::QkvToCache args{qkv.data(),
                            tokens,
                            heads,
                            q_norm ? q_norm->data() : nullptr,
                            k_norm ? k_norm->data() : nullptr,
                            eps,
                            how,
                            slot_mapping.data(),
                            cache,
                            q_out.data()};
  gil_scoped_release nogil;
  kernels().qkv_to_cache(args);
}

void bind_norms(nb::module_& m) {
  m.def("rms_norm", &rms_norm, array("x"), array("w"), "eps"_a, array("out"), array("inv").none() = nb::none(),
        "out[T, E] = (x * inv) * w with inv[T] = 1 / sqrt(mean(x^2) + eps), also returned if an array is given.");
  m.def("add_rms_norm", &add_rms_norm, array("residual"), array("delta"), array("w"), "eps"_a, array("residual_out"),
        array("out"), array("inv").none() = nb::none(),
        "residual_out[T, E] = residual + delta, out = rms_norm(residual_out); residual_out may be residual.");
  m.def("rms_norm_backward", &rms_norm_backward, array("dy"), array("x"), array("w"), array("inv"), array("dx"),
        array("dw"), "Gradients of rms_norm; dx[T, E] and dw[E] are overwritten.");
}

void bind_rows(nb::module_& m) {
  m.def("embedding", &embedding, array("ids"), array("table"), array("out"), "out[T, E] = table[ids].");
  m.def("embedding", &embedding_from_panels, array("ids"), array("table"), array("out"),
        "The same from a table that pack_linear packed, panels[ceil(V / 32), E, 32].");
  m.def("embedding_backward", &embedding_backward, array("ids"), array("dout"), array("dtable"),
        "dtable[ids[t]] += dout[t] in token order; the caller zeroes dtable[V, E].");
  m.def("gather_rows", &gather_rows, array("x"), array("rows"), array("out"), "out[R, E] = x[rows].");
  m.def("swiglu", &swiglu, array("gate"), array("up"), array("out"), "out[T, F] = gate / (1 + exp(-gate)) * up.");
  m.def("swiglu_backward", &swiglu_backward, array("dout"), array("gate"), array("up"), array("dgate"), array("dup"),
        "Gradients of swiglu; dgate and dup [T, F] are overwritten.");
}

void bind_cache(nb::module_& m) {
  m.def("rope", &rope, array("x"), array("positions"), array("rope"), "interleaved"_a, "inverse"_a, array("out"),
        "Rotate x[T, n, D] by rope[P, 2, D / 2] (cosines, sines) at positions[T]; `inverse` rotates back.");
  m.def("kv_write", &kv_write, array("k"), array("v"), array("slot_mapping"), array("k_cache"), array("v_cache"),
        "Put k, v [T, KV, D] into k_cache[blocks, KV, D, B], v_cache[blocks, KV, B, D]; slot -1 is skipped.");
  m.def("qkv_to_cache", &qkv_to_cache, array("qkv"), "heads"_a, "kv_heads"_a, array("q_norm").none(),
        array("k_norm").none(), "eps"_a, array("positions"), array("rope"), "interleaved"_a, array("slot_mapping"),
        array("k_cache"), array("v_cache"), array("q_out"),
        "Per-head norms (None: absent) and rotary embedding of qkv[T, (H + 2 KV) D]; keys and values go to the cache, "
        "queries to q_out[T, H, D].");
}

}  // namespace

void bind_elementwise(nb::module_& m) {
  bind_rows(m);
  bind_norms(m);
  bind_cache(m);
}
