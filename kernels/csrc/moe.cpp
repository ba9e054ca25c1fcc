#include "moe.h"

#include "row_parallel.h"
#include "simd.h"

namespace {

inline vf load_row(const float* x, int64_t i, int64_t n) {
  return i + LANES <= n ? vload(x + i) : vload_part(x + i, static_cast<int>(n - i), -__builtin_inff());
}

// p[0, n) = softmax(x); p has room for whole vectors.
void softmax_row(const float* x, int64_t n, float* p) {
  vf top = vset(-__builtin_inff()), sum = vset(0.0f);
  for (int64_t i = 0; i < n; i += LANES) top = vmax(load_row(x, i, n), top);
  const vf max = vset(reduce_max(top));
  for (int64_t i = 0; i < n; i += LANES) {
    const vf e = vexp(load_row(x, i, n) - max);
    vstore(p + i, e);
    sum = sum + e;
  }
  const vf total = vset(reduce_sum(sum));
  for (int64_t i = 0; i < n; i += LANES) vstore(p + i, vload(p + i) / total);
}

// The top_k entries by (score descending, id ascending). Distinct even where scores are NaN, which are never larger.
void choose(const zk::Router& router, const float* p, float* score, int32_t* ids) {
  for (int64_t e = 0; e < router.experts; ++e) score[e] = router.correction ? p[e] + router.correction[e] : p[e];
  for (int64_t s = 0; s < router.top_k; ++s) {
    int64_t best = -1;
    for (int64_t e = 0; e < router.experts; ++e) {
      bool taken = false;
      for (int64_t before = 0; before < s; ++before) taken = taken || ids[before] == e;
      if (!taken && (best < 0 || score[e] > score[best])) best = e;
    }
    ids[s] = static_cast<int32_t>(best);
  }
}

void weigh(const zk::Router& router, const float* p, const int32_t* ids, float* weights) {
  float sum = 0.0f;
  for (int64_t s = 0; s < router.top_k; ++s) sum = sum + (weights[s] = p[ids[s]]);
  if (!router.normalise) return;
  const float divisor = sum > router.norm_min ? sum : router.norm_min;
  for (int64_t s = 0; s < router.top_k; ++s) weights[s] = weights[s] / divisor;
}

void route(const float* logits, int64_t tokens, const zk::Router& router, int32_t* ids, float* weights) {
  const int64_t experts = router.experts, slots = router.top_k, room = (experts + LANES - 1) / LANES * LANES;
  for_rows(tokens, experts * (slots + 4), [&](int64_t first, int64_t last) {
    float* p = zk::scratch(2 * room).data;
    for (int64_t t = first; t < last; ++t) {
      softmax_row(logits + t * experts, experts, p);
      if (!router.replay || ids[t * slots] < 0) choose(router, p, p + room, ids + t * slots);
      weigh(router, p, ids + t * slots, weights + t * slots);
    }
  });
}

inline vf load_columns(const float* x, int64_t count) {
  return count >= LANES ? vload(x) : vload_part(x, static_cast<int>(count), 0.0f);
}

void combine(const float* y, const int32_t* rows, const float* weights, const float* shared, int64_t tokens,
             int64_t slots, int64_t width, float* out) {
  for_rows(tokens, width * slots, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t i = 0; i < width; i += LANES) {
        const int64_t count = width - i;
        vf sum = vset(0.0f);
        for (int64_t s = t * slots; s < (t + 1) * slots; ++s)
          sum = vfma(vset(weights[s]), load_columns(y + rows[s] * width + i, count), sum);
        if (shared) sum = sum + load_columns(shared + t * width + i, count);
        if (count >= LANES)
          vstore(out + t * width + i, sum);
        else
          vstore_part(out + t * width + i, sum, static_cast<int>(count));
      }
  });
}

}  // namespace

namespace zk {
const MoeKernels ZK_CAT(moe_, ZK_ISA) = {route, combine};
}
