// Top-k, top-p and min-p as one cut through the order (logit descending, id ascending), found without sorting the row.
//
// Entries are counted into buckets by distance from the maximum, a monotone map, so only the bucket that holds the cut has
// to be sorted. The result does not depend on the buckets: all decisions are on exact keys and integer masses.
#pragma once

#include <cstdint>

#include "softmax.h"

namespace {

constexpr int BUCKETS = 2048;
constexpr float BUCKETS_PER_UNIT = 64.0f;  // 32 nats in all, beyond which masses are 0

// A row's entries: x scaled logits, e = exp(x - max), and space to work in.
struct TruncationRow {
  int64_t n;
  float max;
  float *x, *e;      // [n rounded up to 16], padded with -inf and 0
  int32_t* bucket;   // the same
  uint64_t *order, *spare;
  uint32_t* count;  // [BUCKETS]
  uint64_t* mass;   // [BUCKETS]
};

// Kept are the entries before and at (x, id) in the order, of these the ones with e >= least.
struct Cut {
  float x = -__builtin_inff();
  int32_t id = INT32_MAX;
  float least = 0.0f;

  bool keeps(float other, float e, int32_t other_id) const {
    return (other > x || (other == x && other_id <= id)) && e >= least;
  }
  vi keeps(vf other, vf e, int64_t first_id) const {
    const vi ids = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + static_cast<int32_t>(first_id);
    return (vless(vset(x), other) | (vequal(other, vset(x)) & (ids <= id))) & ~vless(e, vset(least));
  }
};

inline void fill_buckets(const TruncationRow& row) {
  for (int b = 0; b < BUCKETS; ++b) row.count[b] = 0, row.mass[b] = 0;
  const vf last = vset(static_cast<float>(BUCKETS - 1));
  for (int64_t i = 0; i < row.n; i += LANES) {
    const vf distance = (vset(row.max) - vload(row.x + i)) * vset(BUCKETS_PER_UNIT);
    const vi bucket = __builtin_convertvector(vselect(vless(distance, last), distance, last), vi);
    std::memcpy(row.bucket + i, &bucket, sizeof bucket);
  }
  for (int64_t i = 0; i < row.n; ++i) {
    row.count[row.bucket[i]] += 1;
    row.mass[row.bucket[i]] += mass_of(row.e[i]);
  }
}

// Ascending order of the result is (x descending, id ascending). Adding 0 makes -0 equal to +0, as comparison has it.
inline uint64_t order_key(float x, int64_t id) {
  uint32_t bits;
  const float plain = x + 0.0f;
  std::memcpy(&bits, &plain, sizeof bits);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint64_t>(id);
}

inline void insertion_sort(uint64_t* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// Keys come in ascending id, and the passes are stable, so only the upper halves need sorting. Returns the sorted array,
// which is one of the two.
inline uint64_t* radix_sort(uint64_t* keys, uint64_t* spare, int64_t n) {
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t place[256] = {};
    for (int64_t i = 0; i < n; ++i) place[keys[i] >> shift & 255] += 1;
    if (place[keys[0] >> shift & 255] == n) continue;
    for (int64_t digit = 0, start = 0; digit < 256; ++digit) {
      const int64_t size = place[digit];
      place[digit] = start;
      start += size;
    }
    for (int64_t i = 0; i < n; ++i) spare[place[keys[i] >> shift & 255]++] = keys[i];
    uint64_t* other = keys;
    keys = spare;
    spare = other;
  }
  return keys;
}

inline const uint64_t* sorted_bucket(const TruncationRow& row, int bucket) {
  constexpr int64_t BLOCK = 64;  // most blocks hold nothing of the bucket, which a vectorised test finds out
  int64_t size = 0;
  for (int64_t start = 0; start < row.n; start += BLOCK) {
    const int64_t end = start + BLOCK < row.n ? start + BLOCK : row.n;
    int hits = 0;
    for (int64_t i = start; i < end; ++i) hits += row.bucket[i] == bucket;
    if (!hits) continue;
    for (int64_t i = start; i < end; ++i)
      if (row.bucket[i] == bucket) row.order[size++] = order_key(row.x[i], i);
  }
  if (size > 32) return radix_sort(row.order, row.spare, size);
  insertion_sort(row.order, size);
  return row.order;
}

// Go down the order until `count` entries or `mass` are collected, at least one entry; returns the mass of those passed.
// The row holds that many entries or that much mass.
inline uint64_t walk(const TruncationRow& row, int64_t count, uint64_t mass, Cut* cut) {
  int64_t passed = 0;
  uint64_t collected = 0;
  int bucket = 0;
  while (passed + row.count[bucket] < count && collected + row.mass[bucket] < mass) {
    passed += row.count[bucket];
    collected += row.mass[bucket];
    ++bucket;
  }
  const uint64_t* order = sorted_bucket(row, bucket);
  for (int64_t j = 0;; ++j) {
    const auto id = static_cast<int32_t>(order[j] & 0xFFFFFFFFu);
    collected += mass_of(row.e[id]);
    if (++passed < count && collected < mass) continue;
    cut->x = row.x[id];
    cut->id = id;
    return collected;
  }
}

// The weight from which on masses reach floor(double(min_p) * 2^40). That number has at most 24 leading bits, as min_p has,
// so it is a float32 too, and comparing weights is comparing masses.
inline float least_weight(float min_p) {
  return static_cast<float>(static_cast<int64_t>(static_cast<double>(min_p) * 0x1p40)) * 0x1p-40f;
}

// total: mass of the whole row.
inline Cut find_cut(const TruncationRow& row, int32_t top_k, float top_p, float min_p, uint64_t total) {
  Cut cut;
  const bool by_rank = top_k > 0 && top_k < row.n, by_mass = top_p < 1.0f;
  if (by_rank || by_mass) fill_buckets(row);
  if (by_rank) total = walk(row, top_k, UINT64_MAX, &cut);
  if (by_mass) walk(row, INT64_MAX, static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(total)), &cut);
  cut.least = least_weight(min_p);
  return cut;
}

}  // namespace
