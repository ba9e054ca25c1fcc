// Register blocks of attention: small matrix products whose sums run in sequence, one fused step at a time from 0.
//
// Lanes never interact, so the width of the registers does not show in the results.
#pragma once

#include "attention.h"
#include "native.h"

namespace {

#if defined(ZK_ISA_avx512)
constexpr int BLOCK_GROUPS = 4;  // 6 rows x 4 groups of 16 lanes: 24 of 32 registers
#elif defined(ZK_ISA_avx2)
constexpr int BLOCK_GROUPS = 1;  // 6 rows x 1 group: 12 of 16 registers
#else
constexpr int BLOCK_GROUPS = 1;
#endif
constexpr int BLOCK_ROWS = 6;
constexpr int PARTS = LANES / NATIVE;  // registers of a group
constexpr int SPLIT_GROUPS = zk::KV_SPLIT / LANES;

constexpr int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// R rows x G groups of accumulators.
template <int R, int G>
struct Block {
  vn sum[R][G][PARTS];

  inline void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) sum[r][g][p] = nset(0.0f);
  }
  inline void add_row(int r, float factor, const vn (&x)[G][PARTS]) {
    const vn f = nset(factor);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) sum[r][g][p] = nfma(f, x[g][p], sum[r][g][p]);
  }
};

// Pieces of 6, or as near to each other as the count allows: 7 rows are 4 and 3, not 6 and 1.
template <class Body>
inline void for_row_blocks(int count, Body&& body) {
  int pieces = (count + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int row = 0; row < count; --pieces) {
    const int size = (count - row + pieces - 1) / pieces;
    body(row, size);
    row += size;
  }
}

// Kernel::run<R, G>(...) for run-time R in [1, 6] and G in [1, BLOCK_GROUPS].
template <class Kernel, int G, class... Args>
inline void dispatch_rows(int rows, const Args&... args) {
  switch (rows) {
    case 1:
      return Kernel::template run<1, G>(args...);
    case 2:
      return Kernel::template run<2, G>(args...);
    case 3:
      return Kernel::template run<3, G>(args...);
    case 4:
      return Kernel::template run<4, G>(args...);
    case 5:
      return Kernel::template run<5, G>(args...);
    default:
      return Kernel::template run<6, G>(args...);
  }
}
template <class Kernel, class... Args>
inline void dispatch_block(int rows, int groups, const Args&... args) {
  if constexpr (BLOCK_GROUPS == 4) {
    if (groups >= 4) return dispatch_rows<Kernel, 4>(rows, args...);
    if (groups == 3) return dispatch_rows<Kernel, 3>(rows, args...);
    if (groups == 2) return dispatch_rows<Kernel, 2>(rows, args...);
  }
  dispatch_rows<Kernel, 1>(rows, args...);
}

// Cache lines to fetch while a kernel computes. Blocks of the cache lie anywhere, so the processor's own prefetching
// starts anew in each; asking for the next split's memory during the present one makes decode faster by a third.
struct Ahead {
  const float* run[zk::KV_SPLIT / 8];  // `lines` lines each, `step` floats apart
  int runs = 0, lines = 0;
  int64_t step = 0;
  int next_run = 0, next_line = 0;

  // Four lines of what is left.
  inline void fetch() {
    if (next_run == runs) return;
    const float* line = run[next_run] + next_line * step;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) __builtin_prefetch(line + i * step, 0, 2);
    next_line += 4;
    if (next_line < lines) return;
    next_line = 0;
    ++next_run;
  }
};

// -- products of rows with the columns of a split ---------------------------------------------------------------------

// A split's keys as columns: entry (d, j) is group[j / 16][d * stride + j % 16].
struct Columns {
  const float* group[SPLIT_GROUPS];
  int64_t stride;
  int groups;
};

struct ScoreKernel {
  // scores[r][j] = sum over d of rows[r][d] * columns(d, j)
  template <int R, int G>
  static void run(const float* const* rows, int64_t depth, const float* const* group, int64_t stride, float* scores,
                  Ahead* shared_ahead) {
    Ahead ahead = *shared_ahead;
    Block<R, G> block;
    block.clear();
    const float* x[R];
    const float* c[G];
    for (int r = 0; r < R; ++r) x[r] = rows[r];
    for (int g = 0; g < G; ++g) c[g] = group[g];
    for (int64_t d = 0; d < depth; ++d) {
      ahead.fetch();
      vn column[G][PARTS];
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) column[g][p] = nload(c[g] + d * stride + p * NATIVE);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) block.add_row(r, x[r][d], column);
    }
    *shared_ahead = ahead;
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < G; ++g)
        for (int p = 0; p < PARTS; ++p) nstore(scores + r * zk::KV_SPLIT + g * LANES + p * NATIVE, block.sum[r][g][p]);
  }
};

// scores[count][KV_SPLIT]; groups beyond columns.groups stay as they are.
inline void score_rows(const float* const* rows, int count, int64_t depth, const Columns& columns, float* scores,
                       Ahead* ahead) {
  for_row_blocks(count, [&](int row, int size) {
    for (int g = 0; g < columns.groups; g += BLOCK_GROUPS)
      dispatch_block<ScoreKernel>(size, columns.groups - g, rows + row, depth, columns.group + g, columns.stride,
                                  scores + row * zk::KV_SPLIT + g * LANES, ahead);
  });
}

}  // namespace
