// Backward pass of causal attention over packed sequences: probabilities are recomputed, never stored.
//
// One task owns a sequence and KV head, and adds up in one order: gradients do not depend on the thread count. With
// P = softmax(scale Q K^T), dP = dO V^T and dS = P (dP - rowsum(dO O)) scale:
//   dV = P^T dO,  dK = dS^T Q,  dQ = dS K        (Dao et al., arXiv:2205.14135, appendix B)
#include "attention_tiles.h"
#include "thread_pool.h"

namespace {

using zk::KV_SPLIT;
using zk::MAX_HEAD_DIM;
using zk::TILE_ROWS;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// A sequence and KV head. Query row r is token r / group, head r % group of this KV head.
struct Task {
  const zk::AttentionBackward& args;
  int64_t first_token, tokens, kv_head, group, dim, width;  // width: padded dim

  int64_t head_of(int64_t row) const {
    return (first_token + row / group) * args.heads + kv_head * group + row % group;
  }
  int64_t query(int64_t row) const { return head_of(row) * dim; }
  int64_t key(int64_t j) const { return ((first_token + j) * args.kv_heads + kv_head) * dim; }
};

// 64 keys: as columns for products with query rows, as rows for dQ, and the gradients that gather up.
struct KeyBlock {
  int64_t start;
  int count;
  alignas(64) float k_columns[MAX_HEAD_DIM * KV_SPLIT];
  alignas(64) float v_columns[MAX_HEAD_DIM * KV_SPLIT];
  alignas(64) float k_rows[KV_SPLIT * MAX_HEAD_DIM];
  alignas(64) float dk[KV_SPLIT * MAX_HEAD_DIM];
  alignas(64) float dv[KV_SPLIT * MAX_HEAD_DIM];
};

struct RowBlock {
  int64_t begin;
  int count;
  int seen;  // keys of the block that the last row sees, the most of all rows
  const float* q_rows[TILE_ROWS];
  const float* dout_rows[TILE_ROWS];
  alignas(64) float q[TILE_ROWS * MAX_HEAD_DIM];
  alignas(64) float dout[TILE_ROWS * MAX_HEAD_DIM];
  alignas(64) float dq[TILE_ROWS * MAX_HEAD_DIM];
  alignas(64) float p[TILE_ROWS * KV_SPLIT];
  alignas(64) float ds[TILE_ROWS * KV_SPLIT];
};

// -- products ---------------------------------------------------------------------------------------------------------

struct ProductKernel {
  // out[r] = (add ? out[r] : 0) + sum over t of weight[r * row_step + t * term_step] * x[t]
  template <int R, int G>
  static void run(const float* weight, int64_t row_step, int64_t term_step, int terms, const float* x, int64_t width,
                  float* out, bool add) {
    Block<R, G> block;
    block.clear();
    for (int t = 0; t < terms; ++t, x += width, weight += term_step) {
      vn v[G][PARTS];
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) v[g][p] = nload(x + g * LANES + p * NATIVE);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) block.add_row(r, weight[r * row_step], v);
    }
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < G; ++g)
        for (int p = 0; p < PARTS; ++p) {
          float* place = out + r * width + g * LANES + p * NATIVE;
          nstore(place, add ? nload(place) + block.sum[r][g][p] : block.sum[r][g][p]);
        }
  }
};

// x [terms, width] and out [rows, width], width a multiple of 16.
void product(const float* weight, int64_t row_step, int64_t term_step, int rows, int terms, const float* x,
             int64_t width, float* out, bool add) {
  const int groups = static_cast<int>(width / LANES);
  for_row_blocks(rows, [&](int row, int size) {
    for (int g = 0; g < groups; g += BLOCK_GROUPS)
      dispatch_block<ProductKernel>(size, groups - g, weight + row * row_step, row_step, term_step, terms,
                                    x + g * LANES, width, out + row * width + g * LANES, add);
  });
}

Columns columns_of(const float* data, int count) {
  Columns columns{{}, KV_SPLIT, (count + LANES - 1) / LANES};
  for (int g = 0; g < SPLIT_GROUPS; ++g) columns.group[g] = data + g * LANES;
  return columns;
}

// -- loading ----------------------------------------------------------------------------------------------------------

void load_columns(const Task& task, const float* source, const KeyBlock& block, float* columns) {
  for (int j = 0; j < KV_SPLIT; ++j) {
    const float* row = j < block.count ? source + task.key(block.start + j) : nullptr;
    for (int64_t d = 0; d < task.dim; ++d) columns[d * KV_SPLIT + j] = row ? row[d] : 0.0f;
  }
}

void load_padded(const float* source, const Task& task, float* row) {
  std::memcpy(row, source, sizeof(float) * static_cast<size_t>(task.dim));
  for (int64_t d = task.dim; d < task.width; ++d) row[d] = 0.0f;
}

void load_keys(const Task& task, int64_t start, KeyBlock& block) {
  block.start = start;
  block.count = static_cast<int>(min64(task.tokens - start, KV_SPLIT));
  load_columns(task, task.args.k, block, block.k_columns);
}

inline int visible_keys(const Task& task, const KeyBlock& block, int64_t row) {
  return static_cast<int>(min64(row / task.group + 1 - block.start, block.count));
}

// Up to a tile of rows from `begin` on.
void take_rows(const Task& task, const KeyBlock& block, int64_t begin, RowBlock& rows) {
  rows.begin = begin;
  rows.count = static_cast<int>(min64(task.tokens * task.group - begin, TILE_ROWS));
  rows.seen = visible_keys(task, block, begin + rows.count - 1);
}

void load_queries(const Task& task, RowBlock& rows) {
  const int64_t begin = rows.begin;
  for (int r = 0; r < rows.count; ++r) {
    rows.q_rows[r] = rows.q + r * task.width;
    rows.dout_rows[r] = rows.dout + r * task.width;
    load_padded(task.args.q + task.query(begin + r), task, rows.q + r * task.width);
    load_padded(task.args.dout + task.query(begin + r), task, rows.dout + r * task.width);
  }
}

// -- first pass: softmax statistics -----------------------------------------------------------------------------------

inline vi lanes_below(int n) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < n;
}

// Running maximum and sum of a row's e^score over the blocks so far.
void update_statistics(const Task& task, const KeyBlock& block, int64_t row, const float* scores) {
  const int visible = visible_keys(task, block, row);
  const vf scale = vset(task.args.scale), lowest = vset(-__builtin_inff());
  float* max = task.args.row_max + task.head_of(row);
  float* sum = task.args.row_sum + task.head_of(row);
  vf top = vset(block.start ? *max : -__builtin_inff());
  for (int j = 0; j < visible; j += LANES)
    top = vmax(top, lanes_below(visible - j) ? vload(scores + j) * scale : lowest);
  const float new_max = reduce_max(top);
  vf total = vset(0.0f);
  for (int j = 0; j < visible; j += LANES)
    total = total + (lanes_below(visible - j) ? vexp(vload(scores + j) * scale - vset(new_max)) : vset(0.0f));
  *sum = (block.start ? *sum * sexp(*max - new_max) : 0.0f) + reduce_sum(total);
  *max = new_max;
}

float dot(const float* a, const float* b, int64_t n) {
  vf sum = vset(0.0f);
  for (int64_t i = 0; i < n; i += LANES) {
    const int part = static_cast<int>(min64(n - i, LANES));
    sum = part == LANES ? vfma(vload(a + i), vload(b + i), sum)
                        : vfma(vload_part(a + i, part, 0.0f), vload_part(b + i, part, 0.0f), sum);
  }
  return reduce_sum(sum);
}

void statistics_pass(const Task& task, KeyBlock& block, RowBlock& rows) {
  const int64_t row_count = task.tokens * task.group;
  Ahead nothing;
  for (int64_t start = 0; start < task.tokens; start += KV_SPLIT) {
    load_keys(task, start, block);
    for (int64_t begin = start * task.group; begin < row_count; begin += TILE_ROWS) {
      take_rows(task, block, begin, rows);
      for (int r = 0; r < rows.count; ++r) rows.q_rows[r] = task.args.q + task.query(begin + r);
      score_rows(rows.q_rows, rows.count, task.dim, columns_of(block.k_columns, rows.seen), rows.p, &nothing);
      for (int r = 0; r < rows.count; ++r) update_statistics(task, block, begin + r, rows.p + r * KV_SPLIT);
    }
  }
  for (int64_t row = 0; row < row_count; ++row)
    task.args.row_dot[task.head_of(row)] =
        dot(task.args.dout + task.query(row), task.args.out + task.query(row), task.dim);
}

// -- second pass: gradients -------------------------------------------------------------------------------------------

// Scores -> P and dP -> dS, zero where a row does not see the key.
void softmax_gradient(const Task& task, const KeyBlock& block, int64_t row, int seen, float* p, float* ds) {
  const int64_t at = task.head_of(row);
  const vf scale = vset(task.args.scale), max = vset(task.args.row_max[at]), dot = vset(task.args.row_dot[at]);
  const vf weight = vset(1.0f / task.args.row_sum[at]), zero = vset(0.0f);
  const int visible = visible_keys(task, block, row);
  for (int j = 0; j < seen; j += LANES) {
    const vi mask = lanes_below(visible - j);
    const vf prob = vexp(vload(p + j) * scale - max) * weight;
    const vf slope = prob * (vload(ds + j) - dot) * scale;
    vstore(p + j, mask ? prob : zero);
    vstore(ds + j, mask ? slope : zero);
  }
}

void add_query_gradient(const Task& task, const KeyBlock& block, const RowBlock& rows) {
  for (int r = 0; r < rows.count; ++r) {
    float* dq = task.args.dq + task.query(rows.begin + r);
    const float* part = rows.dq + r * task.width;
    for (int64_t d = 0; d < task.dim; ++d) dq[d] = block.start ? dq[d] + part[d] : part[d];
  }
}

void gradient_tile(const Task& task, KeyBlock& block, RowBlock& rows) {
  Ahead nothing;
  score_rows(rows.q_rows, rows.count, task.dim, columns_of(block.k_columns, rows.seen), rows.p, &nothing);
  score_rows(rows.dout_rows, rows.count, task.dim, columns_of(block.v_columns, rows.seen), rows.ds, &nothing);
  for (int r = 0; r < rows.count; ++r)
    softmax_gradient(task, block, rows.begin + r, rows.seen, rows.p + r * KV_SPLIT, rows.ds + r * KV_SPLIT);
  product(rows.p, 1, KV_SPLIT, rows.seen, rows.count, rows.dout, task.width, block.dv, true);
  product(rows.ds, 1, KV_SPLIT, rows.seen, rows.count, rows.q, task.width, block.dk, true);
  product(rows.ds, KV_SPLIT, 1, rows.count, rows.seen, block.k_rows, task.width, rows.dq, false);
  add_query_gradient(task, block, rows);
}

void gradient_pass(const Task& task, KeyBlock& block, RowBlock& rows) {
  for (int64_t start = 0; start < task.tokens; start += KV_SPLIT) {
    load_keys(task, start, block);
    load_columns(task, task.args.v, block, block.v_columns);
    for (int j = 0; j < block.count; ++j)
      load_padded(task.args.k + task.key(start + j), task, block.k_rows + j * task.width);
    std::memset(block.dk, 0, sizeof(float) * static_cast<size_t>(KV_SPLIT * task.width));
    std::memset(block.dv, 0, sizeof(float) * static_cast<size_t>(KV_SPLIT * task.width));
    // Tokens before the block do not see its keys.
    for (int64_t begin = start * task.group; begin < task.tokens * task.group; begin += TILE_ROWS) {
      take_rows(task, block, begin, rows);
      load_queries(task, rows);
      gradient_tile(task, block, rows);
    }
    for (int j = 0; j < block.count; ++j) {
      const size_t bytes = sizeof(float) * static_cast<size_t>(task.dim);
      std::memcpy(task.args.dk + task.key(start + j), block.dk + j * task.width, bytes);
      std::memcpy(task.args.dv + task.key(start + j), block.dv + j * task.width, bytes);
    }
  }
}

void backward(const zk::AttentionBackward& args) {
  zk::parallel_for(args.sequences * args.kv_heads, [&](int64_t i) {
    const int64_t sequence = i / args.kv_heads, first = args.seq_starts[sequence];
    const Task task{args,
                    first,
                    args.seq_starts[sequence + 1] - first,
                    i % args.kv_heads,
                    args.heads / args.kv_heads,
                    args.head_dim,
                    padded(args.head_dim)};
    KeyBlock block;
    RowBlock rows;
    statistics_pass(task, block, rows);
    gradient_pass(task, block, rows);
  });
}

}  // namespace

namespace zk {

const AttentionBackwardKernels ZK_CAT(attention_backward_, ZK_ISA) = {backward};

}  // namespace zk
