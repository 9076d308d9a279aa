// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): counter-based, so any
// backend and any order of work draws the same numbers. Keys and counters used by this library:
//   dropout   counter (neuron/4, token, stream, region)   key (seed low, seed high ^ training call)
//   sampling  counter (row, position low, position high, 'samp')   key (seed low, seed high)
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NG_HOST_DEVICE __host__ __device__
#else
#define NG_HOST_DEVICE
#endif

namespace neurogen {

struct Philox {
  uint32_t word[4];
};

NG_HOST_DEVICE inline Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in [0, 1) with 24 random bits.
NG_HOST_DEVICE inline float philox_uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

}  // namespace neurogen
