// Vectors of the instruction set this file is compiled for, through the compiler's vector extensions.
// Only for kernels.cpp: everything here is in an unnamed namespace, because the same text is compiled several
// times with different flags and no copy may win over another at link time.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define NG_LANES 16
#elif defined(__AVX2__)
#define NG_LANES 8
#else
#define NG_LANES 4
#endif

namespace {

constexpr int kLanes = NG_LANES;
constexpr int kVectors = 32 / kLanes;  // vectors of one tile of 32

typedef float vec __attribute__((vector_size(4 * NG_LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * NG_LANES)));
typedef float uvec __attribute__((vector_size(4 * NG_LANES), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const uvec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<uvec*>(p) = x; }
inline vec splat(float x) { return x - vec{}; }

inline vec max(vec x, vec y) { return x > y ? x : y; }
inline vec min(vec x, vec y) { return x < y ? x : y; }
inline vec abs(vec x) { return x < 0 ? -x : x; }

inline float sum(vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// Bit j set where x[j] != 0, j < 32.
inline uint32_t nonzero(const float* x) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  for (int c = 0; c < 32; c += 16) {
    const __mmask16 set = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + c), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    bits |= static_cast<uint32_t>(set) << c;
  }
#elif defined(__AVX2__)
  for (int c = 0; c < 32; c += 8) {
    const __m256 set = _mm256_cmp_ps(_mm256_loadu_ps(x + c), _mm256_setzero_ps(), _CMP_NEQ_UQ);
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(set)) << c;
  }
#else
  for (int c = 0; c < 32; c += 4) {
    const __m128 set = _mm_cmpneq_ps(_mm_loadu_ps(x + c), _mm_setzero_ps());
    bits |= static_cast<uint32_t>(_mm_movemask_ps(set)) << c;
  }
#endif
  return bits;
}

// e^x: 2^k times a polynomial on [-ln2/2, ln2/2]; relative error below 2e-7 for x in [-87, 88], clamped outside.
// NaN stays NaN.
inline vec exp(vec x) {
  const vec clamped = min(max(x, splat(-87.0f)), splat(88.0f));
  const vec shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const vec k = shifted - 12582912.0f;
  const vec r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const ivec bits = (__builtin_convertvector(k, ivec) + 127) << 23;
  vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x == x ? p * scale : x;
}

}  // namespace
