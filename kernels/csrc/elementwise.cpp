#include "elementwise.h"

#include "row_parallel.h"
#include "simd.h"

namespace {

constexpr int64_t SLICE = 64;  // columns per task where rows are summed: whole cache lines, one owner each
constexpr int64_t PARTIAL = 256;  // rows per partial sum, for accuracy; fixed, so results do not depend on threads

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// -- gathers ----------------------------------------------------------------------------------------------------------

void gather_rows(const float* x, const int32_t* rows, int64_t count, int64_t width, float* out) {
  for_rows(count, width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      std::memcpy(out + r * width, x + rows[r] * width, sizeof(float) * static_cast<size_t>(width));
  });
}

void gather_from_panels(const float* panels, const int32_t* rows, int64_t count, int64_t width, float* out) {
  constexpr int64_t PANEL = 32;
  for_rows(count, width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* column = panels + rows[r] / PANEL * width * PANEL + rows[r] % PANEL;
      for (int64_t i = 0; i < width; ++i) out[r * width + i] = column[i * PANEL];
    }
  });
}

void embedding_backward(const int32_t* ids, const float* dout, int64_t count, int64_t width, float* dtable) {
  zk::parallel_for((width + SLICE - 1) / SLICE, [&](int64_t slice) {
    const int64_t first = slice * SLICE, last = min64(first + SLICE, width);
    for (int64_t t = 0; t < count; ++t) {
      float* row = dtable + ids[t] * width;
      for (int64_t i = first; i < last; ++i) row[i] = row[i] + dout[t * width + i];
    }
  });
}

// -- norms ------------------------------------------------------------------------------------------------------------

inline float inverse_rms(const float* x, int64_t n, float eps) {
  vf sum = vset(0.0f);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vf v = vload(x + i);
    sum = vfma(v, v, sum);
  }
  if (i < n) {
    const vf v = vload_part(x + i, static_cast<int>(n - i), 0.0f);
    sum = vfma(v, v, sum);
  }
  return 1.0f / __builtin_sqrtf(reduce_sum(sum) / static_cast<float>(n) + eps);
}

inline float norm_row(const float* x, const float* w, float eps, int64_t n, float* out) {
  const float inv = inverse_rms(x, n, eps);
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] * inv) * w[i];
  return inv;
}

void rms_norm(const float* x, const float* w, float eps, int64_t rows, int64_t width, float* out, float* inv) {
  for_rows(rows, width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float scale = norm_row(x + r * width, w, eps, width, out + r * width);
      if (inv) inv[r] = scale;
    }
  });
}

void add_rms_norm(const float* residual, const float* delta, const float* w, float eps, int64_t rows, int64_t width,
                  float* sum, float* out, float* inv) {
  for_rows(rows, width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      float* row = sum + r * width;
      for (int64_t i = 0; i < width; ++i) row[i] = residual[r * width + i] + delta[r * width + i];
      const float scale = norm_row(row, w, eps, width, out + r * width);
      if (inv) inv[r] = scale;
    }
  });
}

// dx = inv * (g - x * inv^2 * mean(g x)), g = dy w
void norm_input_gradient(const float* dy, const float* x, const float* w, float inv, int64_t n, float* dx) {
  vf sum = vset(0.0f);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum = vfma(vload(dy + i) * vload(w + i), vload(x + i), sum);
  if (i < n) {
    const int part = static_cast<int>(n - i);
    sum = vfma(vload_part(dy + i, part, 0.0f) * vload_part(w + i, part, 0.0f), vload_part(x + i, part, 0.0f), sum);
  }
  const float pull = (reduce_sum(sum) / static_cast<float>(n)) * (inv * inv);
  for (i = 0; i < n; ++i) dx[i] = inv * (dy[i] * w[i] - x[i] * pull);
}

// dw = sum over rows of dy x inv, rows in order, in partial sums of fixed length.
void norm_weight_gradient(const float* dy, const float* x, const float* inv, int64_t rows, int64_t width, int64_t first,
                          int64_t last, float* dw) {
  float total[SLICE] = {};
  for (int64_t start = 0; start < rows; start += PARTIAL) {
    float part[SLICE] = {};
    for (int64_t r = start; r < min64(start + PARTIAL, rows); ++r)
      for (int64_t i = first; i < last; ++i)
        part[i - first] = part[i - first] + dy[r * width + i] * (x[r * width + i] * inv[r]);
    for (int64_t i = 0; i < last - first; ++i) total[i] = total[i] + part[i];
  }
  for (int64_t i = first; i < last; ++i) dw[i] = total[i - first];
}

void rms_norm_backward(const float* dy, const float* x, const float* w, const float* inv, int64_t rows, int64_t width,
                       float* dx, float* dw) {
  for_rows(rows, width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      norm_input_gradient(dy + r * width, x + r * width, w, inv[r], width, dx + r * width);
  });
  zk::parallel_for((width + SLICE - 1) / SLICE, [&](int64_t slice) {
    norm_weight_gradient(dy, x, inv, rows, width, slice * SLICE, min64(slice * SLICE + SLICE, width), dw);
  });
}

// -- rotary embedding -------------------------------------------------------------------------------------------------

// (a, b) -> (a cos - b sin, b cos + a sin), one rounded product and one fused step each.
inline void rotate_halves(const float* x, const float* cosines, const float* sines, float sign, int64_t half,
                          float* out) {
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const vf a = vload(x + i), b = vload(x + half + i), c = vload(cosines + i), s = vload(sines + i) * vset(sign);
    vstore(out + i, vfma(-b, s, a * c));
    vstore(out + half + i, vfma(a, s, b * c));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i], c = cosines[i], s = sines[i] * sign;
    out[i] = sfma(-b, s, a * c);
    out[half + i] = sfma(a, s, b * c);
  }
}

inline void rotate_pairs(const float* x, const float* cosines, const float* sines, float sign, int64_t half,
                         float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], c = cosines[i], s = sines[i] * sign;
    out[2 * i] = sfma(-b, s, a * c);
    out[2 * i + 1] = sfma(a, s, b * c);
  }
}

inline void rotate_head(const float* x, const zk::Rotary& rotary, int64_t token, float* out) {
  const float* cosines = rotary.table + rotary.positions[token] * 2 * rotary.half;
  const float* sines = cosines + rotary.half;
  const float sign = rotary.inverse ? -1.0f : 1.0f;
  if (rotary.interleaved)
    rotate_pairs(x, cosines, sines, sign, rotary.half, out);
  else
    rotate_halves(x, cosines, sines, sign, rotary.half, out);
}

void rope(const float* x, int64_t tokens, int64_t heads, const zk::Rotary& rotary, float* out) {
  const int64_t dim = 2 * rotary.half;
  for_rows(tokens, heads * dim, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = t * heads; h < (t + 1) * heads; ++h) rotate_head(x + h * dim, rotary, t, out + h * dim);
  });
}

// -- SwiGLU -----------------------------------------------------------------------------------------------------------

inline vf swiglu_lanes(vf gate, vf up) {
  const vf s = gate / (vset(1.0f) + vexp(-gate));
  return s * up;
}

void swiglu(const float* gate, const float* up, int64_t count, float* out) {
  for_rows((count + LANES - 1) / LANES, LANES, [&](int64_t first, int64_t last) {
    for (int64_t i = first * LANES; i < last * LANES; i += LANES) {
      if (i + LANES <= count) {
        vstore(out + i, swiglu_lanes(vload(gate + i), vload(up + i)));
        continue;
      }
      const int part = static_cast<int>(count - i);
      vstore_part(out + i, swiglu_lanes(vload_part(gate + i, part, 0.0f), vload_part(up + i, part, 0.0f)), part);
    }
  });
}

inline void swiglu_gradient(vf dout, vf gate, vf up, vf* dgate, vf* dup) {
  const vf one = vset(1.0f), sigmoid = one / (one + vexp(-gate));
  *dup = dout * (gate * sigmoid);
  *dgate = (dout * up) * (sigmoid * (one + gate * (one - sigmoid)));
}

void swiglu_backward(const float* dout, const float* gate, const float* up, int64_t count, float* dgate, float* dup) {
  for_rows((count + LANES - 1) / LANES, LANES, [&](int64_t first, int64_t last) {
    for (int64_t i = first * LANES; i < last * LANES; i += LANES) {
      vf dg, du;
      if (i + LANES <= count) {
        swiglu_gradient(vload(dout + i), vload(gate + i), vload(up + i), &dg, &du);
        vstore(dgate + i, dg);
        vstore(dup + i, du);
        continue;
      }
      const int part = static_cast<int>(count - i);
      swiglu_gradient(vload_part(dout + i, part, 0.0f), vload_part(gate + i, part, 0.0f),
                      vload_part(up + i, part, 0.0f), &dg, &du);
      vstore_part(dgate + i, dg, part);
      vstore_part(dup + i, du, part);
    }
  });
}

// -- KV cache ---------------------------------------------------------------------------------------------------------

// Where head h of a slot starts; keys of one token lie block_size apart, its values side by side.
inline void write_head(const zk::KvCache& cache, int64_t slot, int64_t h, const float* k, const float* v) {
  const int64_t size = cache.block_size, dim = cache.head_dim, offset = slot % size;
  const int64_t base = ((slot / size) * cache.kv_heads + h) * dim * size;
  float* keys = cache.keys + base + offset;
  for (int64_t d = 0; d < dim; ++d) keys[d * size] = k[d];
  std::memcpy(cache.values + base + offset * dim, v, sizeof(float) * static_cast<size_t>(dim));
}

void kv_write(const float* k, const float* v, int64_t tokens, const int32_t* slots, const zk::KvCache& cache) {
  const int64_t dim = cache.head_dim, heads = cache.kv_heads;
  for_rows(tokens, 2 * heads * dim, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = 0; slots[t] >= 0 && h < heads; ++h)
        write_head(cache, slots[t], h, k + (t * heads + h) * dim, v + (t * heads + h) * dim);
  });
}

inline void norm_and_rotate(const float* x, const float* norm, const zk::QkvToCache& args, int64_t token, float* out) {
  if (norm) norm_row(x, norm, args.eps, args.cache.head_dim, out);
  rotate_head(norm ? out : x, args.rotary, token, out);
}

void token_to_cache(const zk::QkvToCache& args, int64_t t) {
  const int64_t dim = args.cache.head_dim, heads = args.heads, kv_heads = args.cache.kv_heads;
  const float* q = args.qkv + t * (heads + 2 * kv_heads) * dim;
  const float* k = q + heads * dim;
  const float* v = k + kv_heads * dim;
  for (int64_t h = 0; h < heads; ++h)
    norm_and_rotate(q + h * dim, args.q_norm, args, t, args.q_out + (t * heads + h) * dim);
  if (args.slots[t] < 0) return;
  alignas(64) float key[zk::MAX_HEAD_DIM];
  for (int64_t h = 0; h < kv_heads; ++h) {
    norm_and_rotate(k + h * dim, args.k_norm, args, t, key);
    write_head(args.cache, args.slots[t], h, key, v + h * dim);
  }
}

void qkv_to_cache(const zk::QkvToCache& args) {
  const int64_t width = (args.heads + 2 * args.cache.kv_heads) * args.cache.head_dim;
  for_rows(args.tokens, width, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) token_to_cache(args, t);
  });
}

}  // namespace

namespace zk {

const ElementwiseKernels ZK_CAT(elementwise_, ZK_ISA) = {
    gather_rows, gather_from_panels, embedding_backward, rms_norm, add_rms_norm, rms_norm_backward, rope,
    swiglu,      swiglu_backward,    kv_write, qkv_to_cache,
};

}  // namespace zk
