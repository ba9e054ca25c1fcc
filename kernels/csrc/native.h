// Vectors of the machine's own width, for code that must live in registers: the 64-byte vectors of simd.h live in memory
// where registers are shorter. Included once per instruction set; internal to that translation unit, like simd.h.
#pragma once

#include "simd.h"

namespace {

#if defined(ZK_ISA_avx512)
constexpr int NATIVE = 16;
#elif defined(ZK_ISA_avx2)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif

typedef float vn __attribute__((vector_size(NATIVE * 4)));
typedef float vnu __attribute__((vector_size(NATIVE * 4), aligned(4)));

inline vn nload(const float* p) { return *reinterpret_cast<const vnu*>(p); }
inline void nstore(float* p, vn v) { *reinterpret_cast<vnu*>(p) = v; }
inline vn nset(float x) {
#if defined(ZK_ISA_avx512)
  return (vn)_mm512_set1_ps(x);
#elif defined(ZK_ISA_avx2)
  return (vn)_mm256_set1_ps(x);
#else
  return vn{x, x, x, x};
#endif
}
inline vn nfma(vn a, vn b, vn c) {
#if defined(ZK_ISA_avx512)
  return (vn)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(ZK_ISA_avx2)
  return (vn)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  vn sum;
  for (int i = 0; i < NATIVE; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#endif
}

}  // namespace
