// What the kernels over rows of logits share (decoder.cu, walk_rows.cuh): their job, and eight neighbouring values at a
// time.
#pragma once

#include "model.h"
#include "numbers.cuh"

namespace neurogen::cuda {

constexpr int kPiece = 8;              // neighbouring logits that a thread takes at once: one 16-byte load in bf16
constexpr float kLog2E = 1.44269504f;  // exp(x) = 2^(x log2 e)

struct ScoreJob {
  int64_t ld;
  int vocab;
  bool want_gradient;
  const float* bias;       // [V], readable up to a whole piece (parameters are padded to kUnit)
  const int32_t* targets;  // [rows], inside 0 .. V-1
  const float* weights;    // [rows]
  float* losses;           // [rows]
  int32_t* best;           // [rows]
  Verdict* verdict;
  uint8_t* bytes = nullptr;   // [rows, ld] the errors times *up as e5m2, where they are not left in place of the logits
  const float* up = nullptr;  // null without bytes
};

__device__ inline void load_piece(const float* p, float (&x)[kPiece]) {
  const float4 lo = load4(p), hi = load4(p + 4);
  x[0] = lo.x, x[1] = lo.y, x[2] = lo.z, x[3] = lo.w;
  x[4] = hi.x, x[5] = hi.y, x[6] = hi.z, x[7] = hi.w;
}
__device__ inline void unpack(const uint4& raw, float (&x)[kPiece]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  for (int i = 0; i < 4; ++i) {
    const float2 pair = as_floats(words[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}
__device__ inline void load_piece(const bf16* p, float (&x)[kPiece]) { unpack(*reinterpret_cast<const uint4*>(p), x); }
__device__ inline void store_piece(float* p, const float (&x)[kPiece]) {
  store4(p, {x[0], x[1], x[2], x[3]});
  store4(p + 4, {x[4], x[5], x[6], x[7]});
}
__device__ inline uint4 pack_piece(const float (&x)[kPiece]) {
  uint4 raw;
  reinterpret_cast<__nv_bfloat162&>(raw.x) = __floats2bfloat162_rn(x[0], x[1]);
  reinterpret_cast<__nv_bfloat162&>(raw.y) = __floats2bfloat162_rn(x[2], x[3]);
  reinterpret_cast<__nv_bfloat162&>(raw.z) = __floats2bfloat162_rn(x[4], x[5]);
  reinterpret_cast<__nv_bfloat162&>(raw.w) = __floats2bfloat162_rn(x[6], x[7]);
  return raw;
}
__device__ inline void store_piece(bf16* p, const float (&x)[kPiece]) { *reinterpret_cast<uint4*>(p) = pack_piece(x); }

// Good to two bits of the last place; results below 2^-126 are 0. exp2f would take four instructions more to get those
// right, which as bf16 errors are 0 too.
__device__ inline float fast_exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

}  // namespace neurogen::cuda
