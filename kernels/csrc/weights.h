// Weights on their way between a trainer and the engine: copies that tell whether all values are finite, and bfloat16,
// rounded to nearest, ties to even; a NaN stays one. One table per instruction set. Moves and integers only.
#pragma once

#include <cstdint>

namespace zk {

struct WeightKernels {
  // out = in; whether no value is a NaN or an infinity.
  bool (*copy)(const float* in, int64_t count, float* out);
  // The values of bfloat16 patterns; whether no value is a NaN or an infinity.
  bool (*widen)(const uint16_t* in, int64_t count, float* out);
  // The patterns of the nearest bfloat16 values.
  void (*narrow)(const float* in, int64_t count, uint16_t* out);
  // The nearest bfloat16 values, as float32.
  void (*round)(const float* in, int64_t count, float* out);
  // out = in, or the patterns of the nearest bfloat16 values, past the caches where out lies on a cache line; the
  // xxh3_64 of the bytes written, of which there must be more than 240.
  uint64_t (*fill)(const float* in, int64_t count, float* out);
  uint64_t (*fill_bfloat16)(const float* in, int64_t count, uint16_t* out);
};

extern const WeightKernels weights_generic, weights_avx2, weights_avx512;

}  // namespace zk
