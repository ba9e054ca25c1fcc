// Ops that treat rows one by one: gathers, norms, rotary embedding, SwiGLU, and the way into the KV cache.
//
// All arrays are float32, C-contiguous. An output may be the very array of an input of its shape, except where noted.
#pragma once

#include <cstdint>

namespace zk {

constexpr int64_t MAX_HEAD_DIM = 256;  // bounds the kernels' stack buffers

struct Rotary {
  const float* table;  // [P, 2, half]: cosines, then sines
  const int32_t* positions;  // [T]
  int64_t half;  // D / 2
  bool interleaved;  // pairs (2i, 2i + 1) instead of (i, i + half)
  bool inverse;  // rotate back: the gradient of the rotation
};

struct KvCache {
  float* keys;  // [blocks, KV, D, B]: transposed inside a block, so that sixteen keys at one d are one vector
  float* values;  // [blocks, KV, B, D]
  int64_t kv_heads, head_dim, block_size;
};

struct QkvToCache {
  const float* qkv;  // [T, (H + 2 KV) D]
  int64_t tokens, heads;
  const float* q_norm;  // [D] or null
  const float* k_norm;  // [D] or null
  float eps;
  Rotary rotary;
  const int32_t* slots;  // [T], -1: not cached
  KvCache cache;
  float* q_out;  // [T, H, D]
};

struct ElementwiseKernels {
  // out[r] = x[rows[r]]; also the embedding look-up.
  void (*gather_rows)(const float* x, const int32_t* rows, int64_t count, int64_t width, float* out);
  // The same from panels[ceil(N / 32), width, 32] of packed rows: linear.h.
  void (*gather_from_panels)(const float* panels, const int32_t* rows, int64_t count, int64_t width, float* out);
  // dtable[ids[t]] += dout[t], in token order.
  void (*embedding_backward)(const int32_t* ids, const float* dout, int64_t count, int64_t width, float* dtable);
  // inv[r] = 1 / sqrt(mean(x[r]^2) + eps), out = (x * inv) * w; `inv` may be null.
  void (*rms_norm)(const float* x, const float* w, float eps, int64_t rows, int64_t width, float* out, float* inv);
  // sum = residual + delta, then rms_norm of sum; `out` must not be `sum`.
  void (*add_rms_norm)(const float* residual, const float* delta, const float* w, float eps, int64_t rows,
                       int64_t width, float* sum, float* out, float* inv);
  // x and inv as in the forward op. dw is overwritten; `dx` must be neither dy nor x.
  void (*rms_norm_backward)(const float* dy, const float* x, const float* w, const float* inv, int64_t rows,
                            int64_t width, float* dx, float* dw);
  void (*rope)(const float* x, int64_t tokens, int64_t heads, const Rotary& rotary, float* out);
  // out = silu(gate) * up over `count` elements.
  void (*swiglu)(const float* gate, const float* up, int64_t count, float* out);
  void (*swiglu_backward)(const float* dout, const float* gate, const float* up, int64_t count, float* dgate,
                          float* dup);
  void (*kv_write)(const float* k, const float* v, int64_t tokens, const int32_t* slots, const KvCache& cache);
  // Per-head norms, rotary embedding and kv_write in one pass; the same bits as the separate ops.
  void (*qkv_to_cache)(const QkvToCache& args);
};

extern const ElementwiseKernels elementwise_generic, elementwise_avx2, elementwise_avx512;

}  // namespace zk
