// Real, the type of saved activations and of the operands of products: float (precision "fp32") or __nv_bfloat16
// (precision "bf16"). Everything else, sums above all, is float.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace neurogen::cuda {

using bf16 = __nv_bfloat16;

// Calls body(Real{}) for the precision of a model.
template <class Body>
void with_real(bool is_bf16, Body body) {
  if (is_bf16) {
    body(bf16{});
  } else {
    body(float{});
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

template <class Real>
__device__ inline Real from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// x as a saved activation will read back.
template <class Real>
__device__ inline float rounded(float x) {
  return to_float(from_float<Real>(x));
}

// A pointer that came out of a table, known again to point into device memory.
template <class T>
__device__ inline T* in_global(void* p) {
  __builtin_assume(__isGlobal(p));
  return static_cast<T*>(p);
}

// 1 / x to the last bit or two; x normal.
__device__ inline float reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Two bf16: each is the upper half of a float.
__device__ inline float2 as_floats(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

constexpr uint32_t kTwoSigns = 0x80008000u;  // sign bits of two bf16

// Four neighbouring values, aligned to four.
__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline float4 load4(const bf16* p) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  const float2 lo = as_floats(raw.x), hi = as_floats(raw.y);
  return {lo.x, lo.y, hi.x, hi.y};
}
__device__ inline void store4(float* p, float4 x) { *reinterpret_cast<float4*>(p) = x; }
__device__ inline void store4(bf16* p, float4 x) {
  uint2 raw;
  reinterpret_cast<__nv_bfloat162&>(raw.x) = __floats2bfloat162_rn(x.x, x.y);
  reinterpret_cast<__nv_bfloat162&>(raw.y) = __floats2bfloat162_rn(x.z, x.w);
  *reinterpret_cast<uint2*>(p) = raw;
}

// Four neighbouring values as they are stored.
template <class Real>
struct Four;
template <>
struct Four<float> {
  float4 raw;
};
template <>
struct Four<bf16> {
  uint2 raw;
};
template <class Real>
__device__ inline Four<Real> fetch4(const Real* p) {
  return *reinterpret_cast<const Four<Real>*>(p);
}
template <class Real>
__device__ inline void put4(Real* p, const Four<Real>& x) {
  *reinterpret_cast<Four<Real>*>(p) = x;
}
template <class Real>
__device__ inline float4 unpack(const Four<Real>& x) {
  return load4(reinterpret_cast<const Real*>(&x));
}
template <class Real>
__device__ inline Four<Real> pack(float4 x) {
  Four<Real> out;
  store4(reinterpret_cast<Real*>(&out), x);
  return out;
}

// Rows of D values (a multiple of 32) that are gone through twice, a block of threads a row: a thread keeps kHeldFours
// fours of its row between the two, so that it is read once (D <= 4,096); the rest of a longer row is read again.
constexpr int kHeldFours = 4;
inline int row_threads(int dim) {
  const int threads = (dim + 4 * 32 * kHeldFours - 1) / (4 * 32 * kHeldFours) * 32;
  return threads < 256 ? threads : 256;
}

// N neighbouring values as they are stored, aligned to N.
template <class Real, int N>
struct alignas(N * sizeof(Real)) Few {
  Real x[N];
  __device__ float get(int j) const { return to_float(x[j]); }
  __device__ void set(const float (&from)[N]) {
    for (int j = 0; j < N; ++j) x[j] = from_float<Real>(from[j]);
  }
};
// One register, not two.
template <>
struct Few<bf16, 2> {
  uint32_t raw;
  __device__ float get(int j) const { return __uint_as_float(j ? raw & 0xffff0000u : raw << 16); }
  __device__ void set(const float (&from)[2]) {
    reinterpret_cast<__nv_bfloat162&>(raw) = __floats2bfloat162_rn(from[0], from[1]);
  }
};
template <int N, class Real>
__device__ inline Few<Real, N> fetch_few(const Real* p) {
  return *reinterpret_cast<const Few<Real, N>*>(p);
}
template <int N, class Real>
__device__ inline void store_few(Real* p, const Few<Real, N>& x) {
  *reinterpret_cast<Few<Real, N>*>(p) = x;
}

// Sums over a warp, in one order; every lane gets the result.
template <class T>
__device__ inline T warp_sum(T x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Sum over a block of threads in one order; `room`: shared memory of 32 values; every thread gets the result.
template <class T>
__device__ inline T block_sum(T x, T* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) room[warp] = x;
  __syncthreads();
  T total{};
  for (int i = 0; i < warps; ++i) total += room[i];
  return total;
}

}  // namespace neurogen::cuda
