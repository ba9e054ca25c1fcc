// Philox4x32-10, a counter-based generator: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// A draw is a pure function of (key, counter), so it needs no state and no order of calls (docs/numerics.md, Sampling).
#pragma once

#include <cstdint>

namespace {

struct PhiloxWords {
  uint32_t word[4];
};

inline PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t* c = counter.word;
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The 64 random bits of the token at `position` of sample `sample_index` of the request with this seed.
inline uint64_t token_bits(uint64_t seed, uint32_t sample_index, uint32_t position) {
  const PhiloxWords out = philox4x32({{position, sample_index, 0, 0}}, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return out.word[0] | static_cast<uint64_t>(out.word[1]) << 32;
}

}  // namespace
