#include "weights.h"

#include "weight_bits.h"
#include "xxh3.h"

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

// 64 bytes of what is written, from their place in the source.
inline words line_of(const float* in, const float*) { return (words)vload(in); }
inline words line_of(const float* in, const uint16_t*) {
  typedef uint16_t patterns __attribute__((vector_size(64)));
  typedef uint16_t half __attribute__((vector_size(32)));
  union { half halves[2]; patterns whole; } line;
  for (int i = 0; i < 2; ++i) {
    const bits nearest = rounded_bits((bits)vload(in + i * LANES));
    line.halves[i] = __builtin_convertvector(nearest >> 16, half);
  }
  return (words)line.whole;
}

inline void rest_of(const float* in, int64_t count, float* out) {
  std::memcpy(out, in, sizeof(float) * static_cast<size_t>(count));
}
inline void rest_of(const float* in, int64_t count, uint16_t* out) { narrow(in, count, out); }

// Each line is written past the caches and hashed while it is in a register.
template <class Out>
uint64_t fill(const float* in, int64_t count, Out* out) {
  constexpr int64_t VALUES = STRIPE / static_cast<int64_t>(sizeof(Out)), PAGE = 4096;
  const int64_t length = count * static_cast<int64_t>(sizeof(Out)), stripes = (length - 1) / STRIPE;
  const bool streams = may_stream(reinterpret_cast<float*>(out));
  Xxh3 hash;
  for (int64_t s = 0; s < stripes; ++s) {
    // Streaming stores wait for the address of each new page; shared memory has small ones.
    if (s % (PAGE / STRIPE) == 0) __builtin_prefetch(reinterpret_cast<char*>(out + s * VALUES) + PAGE, 0, 0);
    const words line = line_of(in + s * VALUES, out);
    float* to = reinterpret_cast<float*>(out + s * VALUES);
    streams ? vstream(to, (vf)line) : vstore(to, (vf)line);
    const int place = static_cast<int>(s % STRIPES_PER_BLOCK);
    hash.stripe(line, place);
    if (place == STRIPES_PER_BLOCK - 1) hash.end_block();
  }
  rest_of(in + stripes * VALUES, count - stripes * VALUES, out + stripes * VALUES);
  end_stream();
  return hash.digest(line_of(in + count - VALUES, out), static_cast<uint64_t>(length));
}

}  // namespace

namespace zk {
const WeightKernels ZK_CAT(weights_, ZK_ISA) = {copy, widen, narrow, round, fill, fill};
}
