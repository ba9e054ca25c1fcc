// Causal attention over a paged cache, and its backward pass over packed sequences.
//
// Keys are reduced in splits of KV_SPLIT, aligned to absolute positions; a split's result (maximum, sum, weighted
// values) is merged into the result of the splits before it. What a query gets depends on its own position and the keys
// up to it, so whole prefill, chunks, a cached prefix and decode agree bit for bit (docs/numerics.md, rule 2).
#pragma once

#include <cstdint>

#include "elementwise.h"

namespace zk {

constexpr int KV_SPLIT = 64;
constexpr int TILE_ROWS = 48;  // query rows that share one reading of a split; a multiple of 16

// A query row is a (token, head) pair; the heads of one KV head are neighbours: row = token * group + head.
// Tiles hold whole tokens wherever a group fits.
static constexpr int64_t rows_per_tile(int64_t group) {
  return group > TILE_ROWS ? TILE_ROWS : TILE_ROWS / group * group;
}

struct Attention {
  const float* q;  // [T, H, D]
  const float* keys;  // see KvCache
  const float* values;
  const int32_t* block_tables;  // [S, table_width]
  const int32_t* seq_starts;  // [S + 1]
  const int32_t* context_lens;  // [S]
  const int32_t* tile_starts;  // [S + 1]: tiles of sequences, summed up
  int64_t table_width, sequences, heads, kv_heads, head_dim, block_size;
  float scale;
  float* out;  // [T, H, D]
};

struct AttentionBackward {
  const float *dout, *q, *k, *v, *out;  // packed: [T, H, D] and, for k and v, [T, KV, D]
  const int32_t* seq_starts;  // [S + 1]
  int64_t sequences, heads, kv_heads, head_dim;
  float scale;
  float *row_max, *row_sum, *row_dot;  // working memory, T * H floats each
  float *dq, *dk, *dv;
};

struct AttentionKernels {
  void (*forward)(const Attention& args);
};
struct AttentionBackwardKernels {
  void (*backward)(const AttentionBackward& args);
};

extern const AttentionKernels attention_generic, attention_avx2, attention_avx512;
extern const AttentionBackwardKernels attention_backward_generic, attention_backward_avx2, attention_backward_avx512;

}  // namespace zk
