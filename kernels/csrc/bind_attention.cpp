// Bindings of attention: the block ids that the kernel follows are checked here.
#include <vector>

#include "array_checks.h"
#include "attention.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;
using nb::gil_scoped_release;
using zk::array;
using zk::expect_shape;
using zk::expect_starts;
using zk::extent;
using zk::require;

namespace {

void check_heads(int64_t heads, int64_t kv_heads, int64_t dim) {
  if (kv_heads < 1 || heads < 1 || heads % kv_heads)
    throw std::invalid_argument("q must have a multiple of the " + std::to_string(kv_heads) + " KV heads, got " +
                                std::to_string(heads) + " heads");
  if (dim < 1 || dim > zk::MAX_HEAD_DIM) zk::refuse("head size", zk::closed(1, zk::MAX_HEAD_DIM), dim);
}

// Every key that a sequence with tokens sees must lie in an existing block.
void check_context(const Indices<1>& seq_starts, const Indices<1>& context_lens, const Indices<2>& tables,
                   int64_t blocks, int64_t block_size) {
  const int64_t width = extent(tables, 1);
  for (int64_t s = 0; s < extent(context_lens, 0); ++s) {
    const int64_t tokens = seq_starts.data()[s + 1] - seq_starts.data()[s], context = context_lens.data()[s];
    if (tokens == 0) continue;
    if (context < tokens || context > width * block_size)
      zk::refuse(zk::entry("context_lens", s), zk::closed(tokens, width * block_size), context);
    const int32_t* table = tables.data() + s * width;
    for (int64_t b = 0; b * block_size < context; ++b)
      if (table[b] < 0 || table[b] >= blocks)
        zk::refuse(zk::entry("block_tables", s) + "[" + std::to_string(b) + "]", zk::half_open(0, blocks), table[b]);
  }
}

// Tiles per sequence, summed up; the memory is the thread's own and lives as long.
const int32_t* tile_starts(const Indices<1>& seq_starts, int64_t group) {
  static thread_local std::vector<int32_t> starts;
  const int64_t rows = zk::rows_per_tile(group);
  starts.assign(1, 0);
  for (size_t s = 0; s + 1 < seq_starts.size(); ++s) {
    const int64_t tokens = seq_starts.data()[s + 1] - seq_starts.data()[s];
    starts.push_back(static_cast<int32_t>(starts.back() + (tokens * group + rows - 1) / rows));
  }
  return starts.data();
}

void attention(const In<3>& q, const In<4>& k_cache, const In<4>& v_cache, const Indices<2>& block_tables,
               const Indices<1>& seq_starts, const Indices<1>& context_lens, float scale, const Out<3>& out) {
  const int64_t tokens = extent(q, 0), heads = extent(q, 1), dim = extent(q, 2), sequences = extent(context_lens, 0);
  const int64_t blocks = extent(k_cache, 0), kv_heads = extent(k_cache, 1), block_size = extent(k_cache, 3);
  check_heads(heads, kv_heads, dim);
  if (block_size < 8 || block_size % 8)
    throw std::invalid_argument("block size (last axis of k_cache) must be a multiple of 8, got " +
                                std::to_string(block_size));
  expect_shape("k_cache", k_cache, {blocks, kv_heads, dim, block_size});
  expect_shape("v_cache", v_cache, {blocks, kv_heads, block_size, dim});
  expect_shape("seq_starts", seq_starts, {sequences + 1});
  expect_shape("block_tables", block_tables, {sequences, -1});
  expect_shape("out", out, {tokens, heads, dim});
  expect_starts("seq_starts", seq_starts, tokens);
  check_context(seq_starts, context_lens, block_tables, blocks, block_size);
  require(out.data() != q.data() || !out.size(), "out must not be q");
  const zk::Attention args{q.data(),
                           k_cache.data(),
                           v_cache.data(),
                           block_tables.data(),
                           seq_starts.data(),
                           context_lens.data(),
                           tile_starts(seq_starts, heads / kv_heads),
                           extent(block_tables, 1),
                           sequences,
                           heads,
                           kv_heads,
                           dim,
                           block_size,
                           scale,
                           out.data()};
  gil_scoped_release nogil;
  ZK_PICK(zk::attention).forward(args);
}

// Packed sequences leave no token out.
void check_starts(const Indices<1>& starts, int64_t tokens) {
  if (extent(starts, 0) < 1) throw std::invalid_argument("seq_starts must have at least one entry");
  expect_starts("seq_starts", starts, tokens);
  const int64_t end = starts.data()[extent(starts, 0) - 1];
  if (end != tokens)
    throw std::invalid_argument("seq_starts must end at the " + std::to_string(tokens) + " tokens of q, got " +
                                std::to_string(end));
}

void attention_backward(const In<3>& dout, const In<3>& q, const In<3>& k, const In<3>& v, const In<3>& out,
                        const Indices<1>& seq_starts, float scale, const Out<3>& dq, const Out<3>& dk,
                        const Out<3>& dv) {
  const int64_t tokens = extent(q, 0), heads = extent(q, 1), dim = extent(q, 2), kv_heads = extent(k, 1);
  check_heads(heads, kv_heads, dim);
  expect_shape("dout", dout, {tokens, heads, dim});
  expect_shape("out", out, {tokens, heads, dim});
  expect_shape("dq", dq, {tokens, heads, dim});
  expect_shape("k", k, {tokens, kv_heads, dim});
  expect_shape("v", v, {tokens, kv_heads, dim});
  expect_shape("dk", dk, {tokens, kv_heads, dim});
  expect_shape("dv", dv, {tokens, kv_heads, dim});
  check_starts(seq_starts, tokens);
  gil_scoped_release nogil;
  std::vector<float> rows(static_cast<size_t>(3 * tokens * heads));
  const zk::AttentionBackward args{dout.data(),
                                   q.data(),
                                   k.data(),
                                   v.data(),
                                   out.data(),
                                   seq_starts.data(),
                                   extent(seq_starts, 0) - 1,
                                   heads,
                                   kv_heads,
                                   dim,
                                   scale,
                                   rows.data(),
                                   rows.data() + tokens * heads,
                                   rows.data() + 2 * tokens * heads,
                                   dq.data(),
                                   dk.data(),
                                   dv.data()};
  ZK_PICK(zk::attention_backward).backward(args);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "attention", &attention, array("q"), array("k_cache"), array("v_cache"), array("block_tables"),
      array("seq_starts"), array("context_lens"), "scale"_a, array("out"),
      "Causal attention of q[T, H, D] over k_cache[blocks, KV, D, B] and v_cache[blocks, KV, B, D]. Sequence s owns "
      "tokens "
      "seq_starts[s] : seq_starts[s + 1], the last at position context_lens[s] - 1; tokens past seq_starts[S] are left "
      "alone. The same bits for any chunking, block size, batch, thread count and instruction set.");
  m.def("attention_backward", &attention_backward, array("dout"), array("q"), array("k"), array("v"), array("out"),
        array("seq_starts"), "scale"_a, array("dq"), array("dk"), array("dv"),
        "Gradients of causal attention over packed sequences: q, out, dout, dq [T, H, D], the others [T, KV, D].");
}
