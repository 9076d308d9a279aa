// What a draw is made of, however the row is divided: keys and masses of tokens, uniforms, what becomes of the token.
// sampling.cu has the definition.
#pragma once

#include <cmath>

#include "gather.cuh"
#include "model.h"
#include "numbers.cuh"
#include "philox.h"

namespace neurogen::cuda {

constexpr uint32_t kSamplingTag = 0x73616d70u;  // as in common/sampling.cpp
constexpr unsigned kWholeWarp = 0xffffffffu;

// Inclusive sum over a warp.
__device__ inline uint64_t warp_scan(uint64_t x) {
  const int lane = threadIdx.x % 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t lower = __shfl_up_sync(kWholeWarp, x, offset);
    if (lane >= offset) x += lower;
  }
  return x;
}

// Counts upwards with the logit. NaN counts as impossible, -0 as 0.
__device__ inline uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(logit == logit ? logit + 0.0f : -INFINITY);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float logit_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// Masses of tokens, by key.
struct Mass {
  uint32_t best_key;
  double best, sharpness, unit;  // logit of the best; 1 / temperature; 2^k
  __device__ uint64_t operator()(uint32_t key) const {
    if (key == best_key) return static_cast<uint64_t>(unit);
    const double x = (logit_of(key) - best) * sharpness;
    return x <= 0.0 ? static_cast<uint64_t>(llrint(exp(x) * unit)) : 0;
  }
};

// floor(a * b / 2^shift), and whether anything was cut off.
__device__ inline uint64_t multiply_shift(uint64_t a, uint64_t b, int shift, bool* cut) {
  const uint64_t low = a * b;
  *cut = low << (64 - shift) != 0;
  return __umul64hi(a, b) << (64 - shift) | low >> shift;
}

// What becomes of a token of generation: draw number `kept` of drawn [.., streams], and the brain's input.
template <class Real>
struct Speech {
  const float *bias, *embedding;  // bias: of the logits, which lack it; null = they have it
  int64_t dim, stride, streams;
  int32_t* drawn;  // null = nothing is spoken
  Real* x;         // panels
  // By all threads of a block; row: of all streams.
  __device__ void say(int32_t id, int64_t row, int64_t kept) const {
    if (!drawn) return;
    if (threadIdx.x == 0) drawn[kept * streams + row] = id;
    gather_row<2>(embedding + id * dim, dim, row, stride, threadIdx.x, blockDim.x, x);
  }
};

__device__ inline Mass mass_of(const Sampling& how, uint32_t best_key, int32_t vocab) {
  const int bits = min(52, 31 + __clz(vocab - 1));  // 63 - ceil(log2(V))
  return {best_key, logit_of(best_key), 1.0 / how.temperature, static_cast<double>(uint64_t{1} << bits)};
}

// Of 2^53.
__device__ inline uint64_t uniform_of(const Sampling& how, int64_t row) {
  const Philox random =
      philox(static_cast<uint32_t>(row), static_cast<uint32_t>(how.position), static_cast<uint32_t>(how.position >> 32),
             kSamplingTag, static_cast<uint32_t>(how.seed), static_cast<uint32_t>(how.seed >> 32));
  return uint64_t{random.word[0] >> 5} << 26 | random.word[1] >> 6;
}

}  // namespace neurogen::cuda
