// Bindings of the mixture of experts: routing, the order of rows by expert, products over groups of rows, the sum.
#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "array_checks.h"
#include "dispatch.h"
#include "linear.h"
#include "moe.h"

namespace nb = nanobind;
using namespace nb::literals;
using nb::gil_scoped_release;
using zk::array;
using zk::expect_shape;
using zk::extent;
using zk::Finish;
using zk::PANEL;
using zk::Product;

using Int32s1 = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int32s2 = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every value in [0, end).
void expect_ids(const char* name, const int32_t* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= end) zk::refuse(zk::entry(name, i), zk::half_open(0, end), values[i]);
}

// Rows of -1 throughout, or of values in [0, end) throughout.
void expect_given_or_free(const char* name, const int32_t* values, int64_t rows, int64_t slots, int64_t end) {
  for (int64_t i = 0; i < rows * slots; ++i) {
    const bool free = values[i - i % slots] == -1;
    if (free ? values[i] != -1 : values[i] < 0 || values[i] >= end)
      zk::refuse(zk::entry(name, i), free ? zk::closed(-1, -1) : zk::half_open(0, end), values[i]);
  }
}

void route(const In<2>& logits, const std::optional<In<1>>& correction, bool normalise, float norm_min,
           const Int32s2& ids, const Out<2>& weights, bool replay) {
  const int64_t tokens = extent(logits, 0), experts = extent(logits, 1), slots = extent(ids, 1);
  if (correction) expect_shape("correction", *correction, {experts});
  expect_shape("ids", ids, {tokens, -1});
  expect_shape("weights", weights, {tokens, slots});
  if (slots < 1 || slots > experts) zk::refuse("ids.shape[1]", zk::closed(1, experts), slots);
  if (replay) expect_given_or_free("ids", ids.data(), tokens, slots, experts);
  const zk::Router router{experts, slots, correction ? correction->data() : nullptr, normalise, norm_min, replay};
  gil_scoped_release nogil;
  ZK_PICK(zk::moe).route(logits.data(), tokens, router, ids.data(), weights.data());
}

void sort_by_expert(const Indices<2>& ids, const Int32s1& starts, const Int32s1& tokens, const Int32s2& rows) {
  const int64_t count = extent(ids, 0) * extent(ids, 1), experts = extent(starts, 0) - 1;
  zk::require(experts >= 1, "starts must hold at least 2 entries");
  expect_shape("tokens", tokens, {count});
  expect_shape("rows", rows, {extent(ids, 0), extent(ids, 1)});
  expect_ids("ids", ids.data(), count, experts);
  std::vector<int32_t> next(static_cast<size_t>(experts) + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++next[static_cast<size_t>(ids.data()[i]) + 1];
  for (size_t e = 0; e < static_cast<size_t>(experts); ++e) next[e + 1] += next[e];
  for (int64_t e = 0; e <= experts; ++e) starts.data()[e] = next[static_cast<size_t>(e)];
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = next[static_cast<size_t>(ids.data()[i])]++;
    rows.data()[i] = row;
    tokens.data()[row] = static_cast<int32_t>(i / extent(ids, 1));
  }
}

// One product per expert: rows [starts[e], starts[e + 1]) of x times the expert's panels.
void grouped(const In<2>& x, const Indices<1>& starts, const In<4>& panels, int64_t n, const Out<2>& out,
             Finish finish) {
  const int64_t m = extent(x, 0), k = extent(x, 1), experts = extent(starts, 0) - 1;
  const int64_t width = finish == Finish::swiglu ? PANEL / 2 : PANEL;
  zk::require(experts >= 1 && n >= 1 && k >= 1, "starts must hold at least 2 entries, n and x.shape[1] at least 1");
  expect_shape("panels", panels, {experts, ceil_div(n, width), k, PANEL});
  expect_shape("out", out, {m, n});
  zk::expect_starts("starts", starts, m);
  if (starts.data()[experts] != m) zk::refuse(zk::entry("starts", experts), zk::closed(m, m), starts.data()[experts]);
  const int64_t columns = finish == Finish::swiglu ? ceil_div(n, width) * PANEL : n;
  const int64_t size = extent(panels, 1) * k * PANEL;
  std::vector<Product> products;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = starts.data()[e], rows = starts.data()[e + 1] - first;
    if (rows)
      products.push_back(Product{x.data() + first * k, false, panels.data() + e * size, zk::Right::panels, nullptr,
                                 out.data() + first * n, rows, columns, k, n, finish});
  }
  gil_scoped_release nogil;
  ZK_PICK(zk::linear).multiply_groups(products.data(), static_cast<int64_t>(products.size()));
}

void grouped_linear(const In<2>& x, const Indices<1>& starts, const In<4>& panels, int64_t n, const Out<2>& out) {
  grouped(x, starts, panels, n, out, Finish::store);
}

void grouped_swiglu(const In<2>& x, const Indices<1>& starts, const In<4>& panels, int64_t f, const Out<2>& out) {
  grouped(x, starts, panels, f, out, Finish::swiglu);
}

void combine(const In<2>& y, const Indices<2>& rows, const In<2>& weights, const std::optional<In<2>>& shared,
             const Out<2>& out) {
  const int64_t tokens = extent(rows, 0), slots = extent(rows, 1), width = extent(y, 1);
  expect_ids("rows", rows.data(), tokens * slots, extent(y, 0));
  expect_shape("weights", weights, {tokens, slots});
  if (shared) expect_shape("shared", *shared, {tokens, width});
  expect_shape("out", out, {tokens, width});
  zk::require(out.data() != y.data() || !out.size(), "out must not be y");
  gil_scoped_release nogil;
  ZK_PICK(zk::moe).combine(y.data(), rows.data(), weights.data(), shared ? shared->data() : nullptr, tokens, slots,
                           width, out.data());
}

}  // namespace

void bind_moe(nb::module_& m) {
  m.def("route", &route, array("logits"), array("correction").none(), "normalise"_a, "norm_min"_a, array("ids"),
        array("weights"), "replay"_a = false,
        "Choose ids [T, k] by (softmax(logits [T, X]) + correction [X], ids ascending among equals); with `replay` only "
        "where a row holds -1, and take the others as given. weights [T, k] are their probabilities, normalised if "
        "asked for.");
  m.def("sort_by_expert", &sort_by_expert, array("ids"), array("starts"), array("tokens"), array("rows"),
        "Order the entries of ids [T, k] by (expert, token, slot): expert e has rows starts[e] : starts[e + 1], row r "
        "is of token tokens[r], and slot s of token t is row rows[t, s].");
  m.def("grouped_linear", &grouped_linear, array("x"), array("starts"), array("panels"), "n"_a, array("out"),
        "`linear` of rows starts[e] : starts[e + 1] of x with panels[e], for every e: the same bits.");
  m.def("grouped_swiglu", &grouped_swiglu, array("x"), array("starts"), array("panels"), "f"_a, array("out"),
        "`swiglu_linear` of rows starts[e] : starts[e + 1] of x with panels[e], for every e: the same bits.");
  m.def("combine", &combine, array("y"), array("rows"), array("weights"), array("shared").none(), array("out"),
        "out[t] = the sum over slots, in order, of weights[t, s] * y[rows[t, s]], then + shared[t].");
}
