// Mixture of experts: the router's choice, and the sum of what a token's experts gave (docs/numerics.md).
//
// All arrays are C-contiguous. A token's slots are its chosen experts, best first.
#pragma once

#include <cstdint>

namespace zk {

struct Router {
  int64_t experts, top_k;
  const float* correction;  // [experts], added to the probabilities for the choice alone, or null
  bool normalise;           // weights are divided by max(their sum, norm_min)
  float norm_min;
  bool replay;              // the choice is given in `ids`, but for rows of -1
};

struct MoeKernels {
  // ids and weights [T, top_k] from logits [T, experts].
  void (*route)(const float* logits, int64_t tokens, const Router& router, int32_t* ids, float* weights);
  // out[t] = sum over slots in order of weights[t, s] * y[rows[t, s]], by fma from 0; then + shared[t], if not null.
  void (*combine)(const float* y, const int32_t* rows, const float* weights, const float* shared, int64_t tokens,
                  int64_t slots, int64_t width, float* out);
};

extern const MoeKernels moe_generic, moe_avx2, moe_avx512;

}  // namespace zk
