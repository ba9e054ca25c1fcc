// Tests and conversions of float32 bit patterns. Included once per instruction set; internal to that translation unit.
#pragma once

#include <cstdint>

#include "simd.h"

namespace {

typedef uint32_t __attribute__((may_alias)) bits32;

// Its highest bit is set for a NaN or an infinity, whose exponent is all ones.
inline uint32_t finite_overflow(uint32_t bits) { return (bits & 0x7F800000u) + 0x00800000u; }

// `finite_overflow` of all values, joined.
inline uint32_t joined_overflow(const float* values, int64_t count) {
  const bits32* bits = reinterpret_cast<const bits32*>(values);
  uint32_t joined = 0;
  for (int64_t i = 0; i < count; ++i) joined |= finite_overflow(bits[i]);
  return joined;
}
inline bool is_finite(uint32_t joined) { return !(joined >> 31); }

// The pattern of the nearest bfloat16 in the upper half; the lower half is noise. Of one value, or of each lane.
template <class Bits>
inline Bits rounded_bits(Bits bits) {
  const Bits nearest = bits + 0x7FFFu + (bits >> 16 & 1u);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x00400000u : nearest;
}
inline uint32_t rounded(uint32_t bits) { return rounded_bits(bits); }

// The values of bfloat16 patterns.
inline void widen_bits(const uint16_t* from, int64_t count, float* to) {
  bits32* bits = reinterpret_cast<bits32*>(to);
  for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
}

// One value as float32.
inline void widen_weight(float value, float* to) { *to = value; }
inline void widen_weight(uint16_t pattern, float* to) { widen_bits(&pattern, 1, to); }

// To memory that is not read soon, at a multiple of 64 bytes: without reading the line first.
inline void vstream(float* p, vf v) {
#if defined(ZK_ISA_avx512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(ZK_ISA_avx2)
  typedef float half __attribute__((vector_size(32)));
  struct Pair { half lo, hi; } pair;
  std::memcpy(&pair, &v, 64);
  _mm256_stream_ps(p, (__m256)pair.lo);
  _mm256_stream_ps(p + 8, (__m256)pair.hi);
#else
  vstore(p, v);
#endif
}

// After the last vstream, before another thread may read.
inline void end_stream() {
#if defined(ZK_ISA_avx2) || defined(ZK_ISA_avx512)
  _mm_sfence();
#endif
}

inline bool may_stream(const float* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

}  // namespace
