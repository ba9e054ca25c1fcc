// The inner loops of linear.cpp: a register tile of rows x PANEL columns over one segment, and transposition.
// Included once per instruction set; internal to that translation unit, like simd.h.
#pragma once

#include "linear.h"
#include "native.h"

namespace {

using zk::LINEAR_K_SEGMENT;
using zk::PANEL;

// MAX_TILE_ROWS x GROUP accumulators, GROUP weights and one broadcast input fill the register file.
#if defined(ZK_ISA_avx512)
#define MAX_TILE_ROWS 14
constexpr int GROUP = 2;
#elif defined(ZK_ISA_avx2)
#define MAX_TILE_ROWS 6
constexpr int GROUP = 2;
#else
#define MAX_TILE_ROWS 4
constexpr int GROUP = 4;
#endif
typedef uint32_t nu __attribute__((vector_size(4 * NATIVE)));

// To memory that is not read soon, at a multiple of its size; see vstream.
inline void nstream(float* p, vn v) {
#if defined(ZK_ISA_avx512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(ZK_ISA_avx2)
  _mm256_stream_ps(p, (__m256)v);
#else
  nstore(p, v);
#endif
}

// Distance between rows of a packed segment of inputs; 17 cache lines, so that rows do not compete for a cache set.
constexpr int64_t ROW_STRIDE = LINEAR_K_SEGMENT + 16;
constexpr int BLOCK = 4;                   // inner indices between two prefetches
constexpr int LINES = BLOCK * PANEL / 16;  // cache lines of weights in a block

// What to fetch into the second-level cache while a tile runs: cache line number L of LINES per block, counted from the
// tile's start, lies at from + (L >> shift) * stride + (L mod 2^shift) * 16. Nothing if `from` is null.
struct Ahead {
  const float* from;
  int64_t stride;
  int shift;
};

inline void fetch(const Ahead& ahead, int k) {
  const int first = k / BLOCK * LINES, mask = (1 << ahead.shift) - 1;
  for (int line = first; line < first + LINES; ++line)
    __builtin_prefetch(ahead.from + (line >> ahead.shift) * ahead.stride + (line & mask) * 16, 0, 2);
}

// sums[R, PANEL] = or += x[R, length] w[length, PANEL]: the partial sums of one segment, each from 0 and in order.
template <int R>
void tile(const float* x, const float* w, int length, float* sums, bool first_segment, Ahead ahead) {
  for (int column = 0; column < PANEL; column += GROUP * NATIVE) {
    vn acc[R][GROUP] = {};
    auto step = [&](int k) __attribute__((always_inline)) {
      vn weights[GROUP];
      for (int g = 0; g < GROUP; ++g) weights[g] = nload(w + k * PANEL + column + g * NATIVE);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vn input = nset(x[r * ROW_STRIDE + k]);
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; ++g) acc[r][g] = nfma(input, weights[g], acc[r][g]);
      }
    };
    int k = 0;
    for (; k + BLOCK <= length; k += BLOCK) {
      if (ahead.from) fetch(ahead, k);
#pragma GCC unroll 4
      for (int i = 0; i < BLOCK; ++i) step(k + i);
    }
    for (; k < length; ++k) step(k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < GROUP; ++g) {
        float* sum = sums + r * PANEL + column + g * NATIVE;
        nstore(sum, first_segment ? acc[r][g] : nload(sum) + acc[r][g]);
      }
    ahead.from = nullptr;  // all is fetched in the first columns' turn
  }
}

using TileFunction = void (*)(const float*, const float*, int, float*, bool, Ahead);
constexpr TileFunction TILES[] = {
    nullptr, tile<1>, tile<2>, tile<3>, tile<4>,
#if MAX_TILE_ROWS > 4
    tile<5>, tile<6>,
#endif
#if MAX_TILE_ROWS > 6
    tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>,
#endif
};

// to[c * to_stride + r] = from[r * from_stride + c] for a block of NATIVE x NATIVE, in registers: in round H, neighbours
// H rows apart swap their off-diagonal squares of H x H.
#if defined(ZK_ISA_avx512) || defined(ZK_ISA_avx2)
typedef int32_t ni __attribute__((vector_size(4 * NATIVE)));

template <int H>
inline void swap_squares(vn (&rows)[NATIVE]) {
  ni upper, lower;  // element numbers in the pair (a, b): b's start at NATIVE
  for (int i = 0; i < NATIVE; ++i) {
    const bool second = (i & H) != 0;
    upper[i] = second ? NATIVE + i - H : i;
    lower[i] = second ? NATIVE + i : i + H;
  }
#pragma GCC unroll 16
  for (int r = 0; r < NATIVE; ++r) {
    if (r & H) continue;
    const vn a = rows[r], b = rows[r + H];
    rows[r] = __builtin_shuffle(a, b, upper);
    rows[r + H] = __builtin_shuffle(a, b, lower);
  }
}

// rows[r][c] = rows[c][r]
inline void turn_square(vn (&rows)[NATIVE]) {
  if constexpr (NATIVE == 16) swap_squares<8>(rows);
  swap_squares<4>(rows);
  swap_squares<2>(rows);
  swap_squares<1>(rows);
}
#else
inline void turn_square(vn (&rows)[NATIVE]) {
  for (int r = 0; r < NATIVE; ++r)
    for (int c = 0; c < r; ++c) {
      const float low = rows[r][c];
      rows[r][c] = rows[c][r];
      rows[c][r] = low;
    }
}
#endif

inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  vn rows[NATIVE];
#pragma GCC unroll 16
  for (int r = 0; r < NATIVE; ++r) rows[r] = nload(from + r * from_stride);
  turn_square(rows);
#pragma GCC unroll 16
  for (int r = 0; r < NATIVE; ++r) nstore(to + r * to_stride, rows[r]);
}

// to[c * to_stride + r] = from[r * from_stride + c] for any rows x columns.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  const int64_t whole_rows = rows / NATIVE * NATIVE, whole_columns = columns / NATIVE * NATIVE;
  for (int64_t r = 0; r < whole_rows; r += NATIVE)
    for (int64_t c = 0; c < whole_columns; c += NATIVE)
      transpose_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace
