// Sums over a row of logits in the fixed partition: what sampling, scoring and the trainer's gradient share.
//
// A row is cut into chunks of PARTITION entries. Inside a chunk sums run in 16 float32 lanes (lane = index mod 16) that a
// fixed tree folds; chunk sums are added in order in float64. Masses are integers, so their sums have no order at all.
#pragma once

#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t PARTITION = 1024;

inline float scaled(float x, float temperature) { return temperature == 1.0f ? x : x / temperature; }
inline vf scaled(vf x, float temperature) { return temperature == 1.0f ? x : x / vset(temperature); }

// Entries i .. i + 15 of a row of n; what lies past the end is -inf, which weighs nothing.
inline vf load_row(const float* row, int64_t i, int64_t n) {
  return i + LANES <= n ? vload(row + i) : vload_part(row + i, static_cast<int>(n - i), -__builtin_inff());
}

// Largest scaled logit. False if the row has no distribution: a NaN, +inf, or no finite entry at all.
inline bool row_max(const float* row, int64_t n, float temperature, float* max) {
  const vf infinity = vset(__builtin_inff());
  vf m0 = -infinity, m1 = -infinity;
  vi proper0 = vequal(infinity, infinity), proper1 = proper0;
  for (int64_t i = 0; i < n; i += 2 * LANES) {
    const vf a = load_row(row, i, n);
    const vf b = i + LANES < n ? load_row(row, i + LANES, n) : -infinity;
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
    proper0 &= vless(a, infinity);
    proper1 &= vless(b, infinity);
  }
  proper0 &= proper1;
  for (int lane = 0; lane < LANES; ++lane)
    if (!proper0[lane]) return false;
  // Division by a positive number keeps order, so the largest quotient is the quotient of the largest.
  *max = scaled(reduce_max(vmax(m0, m1)), temperature);
  return __builtin_isfinite(*max);
}

// floor(e * 2^40) for e in [0, 1], exact: as high * 2^20 + low with both in int32 lanes, because no instruction set below
// AVX-512 converts to 64-bit integers. A lane can add up 2^11 of them.
struct MassLanes {
  vi high{}, low{};

  void add(vf e) {
    const vf half = vset(0x1p20f), big = e * half;
    const vi whole = __builtin_convertvector(big, vi);
    high += whole;
    low += __builtin_convertvector((big - __builtin_convertvector(whole, vf)) * half, vi);
  }

  uint64_t total() const {
    uint64_t h = 0, l = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      h += static_cast<uint32_t>(high[lane]);
      l += static_cast<uint32_t>(low[lane]);
    }
    return (h << 20) + l;
  }
};
inline uint64_t mass_of(float e) { return static_cast<uint64_t>(static_cast<int64_t>(e * 0x1p40f)); }

struct Terms {
  vf e;  // e^d, or 0 for entries that are left out
  vf d;  // scaled logit minus the row's maximum
};

struct RowSums {
  float max = 0.0f;
  double sum = 0.0;       // of e
  double weighted = 0.0;  // of e * d
  uint64_t mass = 0;
  double log_sum() const { return __builtin_log(sum); }
  float logprob(float x) const { return static_cast<float>(static_cast<double>(x - max) - log_sum()); }
  float entropy() const { return static_cast<float>(log_sum() - weighted / sum); }
};

// terms(i) gives entries i .. i + 15. chunk_mass, if not null, takes the mass of each chunk.
template <class TermsAt>
inline RowSums row_sums(int64_t n, float max, uint64_t* chunk_mass, TermsAt terms) {
  RowSums sums;
  sums.max = max;
  for (int64_t start = 0; start < n; start += PARTITION) {
    const int64_t end = start + PARTITION < n ? start + PARTITION : n;
    vf sum = vset(0.0f), weighted = vset(0.0f);
    MassLanes mass;
    for (int64_t i = start; i < end; i += LANES) {
      const Terms t = terms(i);
      sum += t.e;
      weighted = vfma(t.e, vmax(t.d, vset(-88.0f)), weighted);  // e is 0 there; -inf * 0 would be NaN
      if (chunk_mass) mass.add(t.e);
    }
    sums.sum += static_cast<double>(reduce_sum(sum));
    sums.weighted += static_cast<double>(reduce_sum(weighted));
    if (chunk_mass) sums.mass += chunk_mass[start / PARTITION] = mass.total();
  }
  return sums;
}

inline Terms terms_at(const float* row, int64_t i, int64_t n, float temperature, float max) {
  const vf d = scaled(load_row(row, i, n), temperature) - vset(max);
  return {vexp(d), d};
}

}  // namespace
