// Matrix products with a fixed order of summation (docs/numerics.md, rule 1): one table per instruction set.
//
// out[i, j] = sum over segments of LINEAR_K_SEGMENT inner indices, in order, of (sum inside the segment: one fused
// multiply-add at a time from 0, in order). Nothing else about a product, neither its number of rows nor the layout of
// its operands nor the number of threads, changes a bit of it.
#pragma once

#include <cstdint>

namespace zk {

constexpr int64_t LINEAR_K_SEGMENT = 256;
constexpr int64_t PANEL = 32;  // columns of a panel of packed weights

enum class Right { panels, rows, columns };               // [ceil(N / 32), K, 32], [N, K], [K, N]
enum class Finish { store, add, swiglu };                 // out = , out += , out = silu(gate columns) * up columns

struct Product {
  const float* left;       // [M, K], or [K, M] if left_transposed
  bool left_transposed;
  const float* right;
  Right right_layout;
  const float* bias;       // [N] or null; added last
  float* out;              // [M, width]
  int64_t m, n, k;
  int64_t width;           // n, or for swiglu the number of gates: each panel holds 16 gate and 16 up columns
  Finish finish;
};

struct LinearKernels {
  void (*multiply)(const Product& product);
  // Several products, of at least one row each, in one run of the pool; the same bits as one by one.
  void (*multiply_groups)(const Product* products, int64_t count);
  // panels[ceil(n / PANEL), k, PANEL], zero-padded, from weights[n, k], float32 or bfloat16 patterns; whether no value
  // is a NaN or an infinity. Without `pool` on the calling thread alone.
  bool (*pack)(const float* weights, int64_t n, int64_t k, float* panels, bool pool);
  bool (*pack_bfloat16)(const uint16_t* weights, int64_t n, int64_t k, float* panels, bool pool);
  // The same to panels[ceil(f / 16), k, PANEL] from gate[f, k] and up[f, k].
  bool (*pack_gate_up)(const float* gate, const float* up, int64_t f, int64_t k, float* panels, bool pool);
  bool (*pack_gate_up_bfloat16)(const uint16_t* gate, const uint16_t* up, int64_t f, int64_t k, float* panels,
                                bool pool);
  // `rounds` times FMA_PER_ROUND independent fused multiply-adds in registers; returns something that depends on all.
  float (*fma_burst)(int64_t rounds);
  // Read `floats` numbers once; returns something that depends on all.
  float (*read)(const float* data, int64_t floats);
};
constexpr int64_t FMA_PER_ROUND = 12 * 16;

extern const LinearKernels linear_generic, linear_avx2, linear_avx512;

}  // namespace zk
