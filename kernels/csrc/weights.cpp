#include "weights.h"

#include "weight_bits.h"

namespace {

typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

bool copy(const float* in, int64_t count, float* out) {
  uint32_t joined = 0;
  int64_t i = 0;
  if (may_stream(out)) {
    bits lanes = {};
    for (; i + LANES <= count; i += LANES) {
      const vf values = vload(in + i);
      lanes |= ((bits)values & 0x7F800000u) + 0x00800000u;
      vstream(out + i, values);
    }
    for (int lane = 0; lane < LANES; ++lane) joined |= lanes[lane];
  }
  joined |= joined_overflow(in + i, count - i);
  std::memcpy(out + i, in + i, sizeof(float) * static_cast<size_t>(count - i));
  end_stream();
  return is_finite(joined);
}

void stream(const uint8_t* in, int64_t count, uint8_t* out) {
  constexpr int64_t LINE = 64;
  int64_t i = 0;
  float* to = reinterpret_cast<float*>(out);
  if (may_stream(to))
    for (; i + LINE <= count; i += LINE, to += LANES) {
      vf values;
      std::memcpy(&values, in + i, LINE);
      vstream(to, values);
    }
  std::memcpy(out + i, in + i, static_cast<size_t>(count - i));
  end_stream();
}

bool widen(const uint16_t* in, int64_t count, float* out) {
  constexpr int64_t PIECE = 4096;  // looked at while it is in the cache
  uint32_t joined = 0;
  for (int64_t first = 0; first < count; first += PIECE) {
    const int64_t length = count - first < PIECE ? count - first : PIECE;
    widen_bits(in + first, length, out + first);
    joined |= joined_overflow(out + first, length);
  }
  return is_finite(joined);
}

void narrow(const float* in, int64_t count, uint16_t* out) {
  const bits32* bits = reinterpret_cast<const bits32*>(in);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(rounded(bits[i]) >> 16);
}

void round(const float* in, int64_t count, float* out) {
  const bits32* from = reinterpret_cast<const bits32*>(in);
  bits32* to = reinterpret_cast<bits32*>(out);
  for (int64_t i = 0; i < count; ++i) to[i] = rounded(from[i]) & 0xFFFF0000u;
}

}  // namespace

namespace zk {
const WeightKernels ZK_CAT(weights_, ZK_ISA) = {copy, widen, narrow, round, stream};
}
