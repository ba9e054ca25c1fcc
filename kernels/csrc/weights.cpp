#include "weights.h"

#include "weight_bits.h"

namespace {

bool copy(const float* in, int64_t count, float* out) {
  const uint32_t joined = joined_overflow(in, count);
  int64_t i = 0;
  if (may_stream(out))
    for (; i + LANES <= count; i += LANES) vstream(out + i, vload(in + i));
  std::memcpy(out + i, in + i, sizeof(float) * static_cast<size_t>(count - i));
  end_stream();
  return is_finite(joined);
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
const WeightKernels ZK_CAT(weights_, ZK_ISA) = {copy, widen, narrow, round};
}
