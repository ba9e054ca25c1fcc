// Sixteen virtual float lanes on every instruction set, the one fused operation, and the library's own exp.
//
// Results are the same bits for generic, AVX2 and AVX-512 builds: lanes never interact except in reduce_*, whose tree is
// fixed, and a multiply-add is fused only through vfma (the build passes -ffp-contract=off). docs/numerics.md, rule 1.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(ZK_ISA_avx2) || defined(ZK_ISA_avx512)
#include <immintrin.h>
#endif

#define ZK_CAT2(a, b) a##b
#define ZK_CAT(a, b) ZK_CAT2(a, b)

// Everything below is internal to one translation unit: object files of different instruction sets must never share an
// inline function, or the linker could hand AVX-512 code to an older machine.
namespace {

constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64), aligned(64)));
typedef float vfu __attribute__((vector_size(64), aligned(4)));  // the same, at any address
typedef int32_t vi __attribute__((vector_size(64), aligned(64)));

inline vf vload(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline void vstore(float* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }
inline vf vset(float x) { return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// The first n lanes from memory, the rest `fill`; reads nothing past p + n.
inline vf vload_part(const float* p, int n, float fill) {
  vf v = vset(fill);
  std::memcpy(&v, p, sizeof(float) * static_cast<size_t>(n));
  return v;
}
inline void vstore_part(float* p, vf v, int n) { std::memcpy(p, &v, sizeof(float) * static_cast<size_t>(n)); }

// c + a * b, rounded once.
inline vf vfma(vf a, vf b, vf c) {
#if defined(ZK_ISA_avx512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(ZK_ISA_avx2)
  typedef float half __attribute__((vector_size(32)));
  struct Pair { half lo, hi; } x, y, z;
  std::memcpy(&x, &a, 64); std::memcpy(&y, &b, 64); std::memcpy(&z, &c, 64);
  z.lo = (half)_mm256_fmadd_ps((__m256)x.lo, (__m256)y.lo, (__m256)z.lo);
  z.hi = (half)_mm256_fmadd_ps((__m256)x.hi, (__m256)y.hi, (__m256)z.hi);
  std::memcpy(&c, &z, 64);
  return c;
#else
  for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}
inline float sfma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Comparisons (lanes of -1 or 0) and selection. GCC takes 64-byte ones apart into scalars where registers are narrower, so
// there they are done by register. As in vmax, NaN compares false.
#if defined(ZK_ISA_avx512)
inline vi vless(vf a, vf b) { return a < b; }
inline vi vequal(vf a, vf b) { return a == b; }
inline vf vselect(vi mask, vf a, vf b) { return mask ? a : b; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
#else
#if defined(ZK_ISA_avx2)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
typedef float rf __attribute__((vector_size(REGISTER)));
typedef int32_t ri __attribute__((vector_size(REGISTER)));

template <class Op>
inline vi by_register(vf a, vf b, Op op) {
  constexpr int COUNT = 64 / REGISTER;
  rf x[COUNT], y[COUNT];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  ri out[COUNT];
  for (int i = 0; i < COUNT; ++i) out[i] = op(x[i], y[i]);
  vi joined;
  std::memcpy(&joined, out, sizeof joined);
  return joined;
}
inline vi vless(vf a, vf b) { return by_register(a, b, [](rf x, rf y) { return x < y; }); }
inline vi vequal(vf a, vf b) { return by_register(a, b, [](rf x, rf y) { return x == y; }); }
inline vf vselect(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
inline vf vmax(vf a, vf b) { return (vf)by_register(a, b, [](rf x, rf y) { return (ri)(x > y ? x : y); }); }
#endif

// Fixed tree over the lanes: halves are folded 8, 4, 2, 1. Written in halves that fit registers: an array of 16 costs ten
// times the instructions.
inline float reduce_sum(vf v) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 a, b;
  v4 c, d;
  std::memcpy(&a, &v, 32);
  std::memcpy(&b, reinterpret_cast<const char*>(&v) + 32, 32);
  a = a + b;
  std::memcpy(&c, &a, 16);
  std::memcpy(&d, reinterpret_cast<const char*>(&a) + 16, 16);
  c = c + d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}
inline float reduce_max(vf v) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 a, b;
  v4 c, d;
  std::memcpy(&a, &v, 32);
  std::memcpy(&b, reinterpret_cast<const char*>(&v) + 32, 32);
  a = a > b ? a : b;
  std::memcpy(&c, &a, 16);
  std::memcpy(&d, reinterpret_cast<const char*>(&a) + 16, 16);
  c = c > d ? c : d;
  const float x = c[0] > c[2] ? c[0] : c[2], y = c[1] > c[3] ? c[1] : c[3];
  return x > y ? x : y;
}

// e^x in float32: x = n ln2 + r, Cody-Waite reduction in two fused steps, then a degree-7 polynomial on r (minimax fit of
// Cephes' expf, S. Moshier), then 2^n in two exact factors. Below -87.3 the result is 0, above 88.72 infinity.
inline vf vexp(vf x) {
  const vf lo = vset(-87.3f), hi = vset(88.72f);
  const vi under = vless(x, lo), over = vless(hi, x);
  vf clamped = vselect(under, lo, vselect(over, hi, x));
  vf magic = vset(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  vf n = (vfma(clamped, vset(1.44269504088896341f), magic)) - magic;
  vf r = vfma(n, vset(-0.693359375f), clamped);
  r = vfma(n, vset(2.12194440e-4f), r);
  vf p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  vf r2 = r * r;
  p = vfma(p, r2, r) + vset(1.0f);
  vi e = __builtin_convertvector(n, vi);
  vi e1 = e >> 1, e2 = e - e1;  // 2^n as 2^e1 * 2^e2, so that n = 128 does not overflow early
  vf s1 = (vf)((e1 + 127) << 23), s2 = (vf)((e2 + 127) << 23);
  vf y = (p * s1) * s2;
  y = vselect(under, vset(0.0f), y);
  y = vselect(over, vset(__builtin_inff()), y);
  return vselect(vequal(x, x), y, x);
}
inline float sexp(float x) { return vexp(vset(x))[0]; }

}  // namespace
