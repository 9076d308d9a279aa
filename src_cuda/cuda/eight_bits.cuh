// Operands of the decoder's products in 8 bits (precision "fp8"): W and broca as e4m3 (4 significant bits), errors of
// logits as e5m2 (3, but 2^-16 to 57,344). A whole array has one scale, so that its largest number is near the top of
// the format; the library divides by it where it sums, in float.
//
// The tensor core multiplies 8-bit operands only where the summed index runs fastest in both. The three products sum
// over three different indices, so every operand is kept twice, as it is and turned.
//
// Cost: errors of logits are off by 2^-4 in the mean, W and broca by 2^-5; two bytes a logit more memory. The gain, on
// an H200: base, 64 x 512: the products 12.2 -> 6.7 ms with 0.75 for turning, the step 33.0 -> 28.0.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "numbers.cuh"

namespace neurogen::cuda {

constexpr int kTurn = 128;         // rows and columns of a tile that is turned
constexpr int kTurnThreads = 256;  // of a block
constexpr int kTurnUnit = 16;      // padded sizes are multiples of this, as the library wants them

// Four neighbouring numbers as bytes, the first lowest.
__device__ inline uint32_t bytes_of(const float* x, float up, __nv_fp8_interpretation_t format) {
  const auto pair = [&](float low, float high) {
    return uint32_t{__nv_cvt_float2_to_fp8x2({low * up, high * up}, __NV_SATFINITE, format)};
  };
  return pair(x[0], x[1]) | pair(x[2], x[3]) << 16;
}
__device__ inline uint32_t bytes_of(const bf16* p, float up, __nv_fp8_interpretation_t format) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  const float2 low = as_floats(raw.x), high = as_floats(raw.y);
  const float x[4] = {low.x, low.y, high.x, high.y};
  return bytes_of(x, up, format);
}
__device__ inline uint32_t bytes_of(const uint8_t* p, float, __nv_fp8_interpretation_t) {
  return *reinterpret_cast<const uint32_t*>(p);
}

template <class From>
struct TurnJob {
  const From* from;  // [rows, columns], columns a multiple of 4; bytes are what they shall be
  int64_t from_ld;
  int rows, columns;
  const float* up;  // the scale
  __nv_fp8_interpretation_t format;
  uint8_t* straight;  // [straight_rows, straight_ld]: zero beyond rows and columns; none of no rows
  int64_t straight_ld;
  int straight_rows;
  uint8_t* turned;  // [turned_rows, turned_ld]: turned[c, r] = from[r, c], zero likewise
  int64_t turned_ld;
  int turned_rows;
};

// One block a tile. A thread turns 4 x 4 bytes in registers; a row of the tile in shared memory is a column there, one
// word longer than it need be, so that the 32 words a warp writes lie in 32 banks.
template <class From>
__global__ void __launch_bounds__(kTurnThreads) turn_kernel(TurnJob<From> p) {
  __shared__ uint32_t tile[kTurn][kTurn / 4 + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.y * kTurn, first_column = blockIdx.x * kTurn;
  const float up = *p.up;
  // Step by step 16 rows x 32 columns a warp. All is asked for before anything is stored: a store between two loads,
  // which might be to the same place, makes the second wait.
  const int first_quad = warp * 4 + lane / 8, first_word = lane % 8;
  uint32_t words[4][4];
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int column = first_column + 4 * (first_word + step * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 4 * first_quad + i;
      const bool inside = row < p.rows && column < p.columns;
      words[step][i] = inside ? bytes_of(p.from + row * p.from_ld + column, up, p.format) : 0;
    }
  }
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int word = first_word + step * 8, column = first_column + 4 * word;
    const uint32_t (&row_of)[4] = words[step];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 4 * first_quad + i;
      if (row < p.straight_rows && column < p.straight_ld) {
        *reinterpret_cast<uint32_t*>(p.straight + row * p.straight_ld + column) = row_of[i];
      }
    }
    const uint32_t a = __byte_perm(row_of[0], row_of[1], 0x5140), b = __byte_perm(row_of[2], row_of[3], 0x5140);
    const uint32_t c = __byte_perm(row_of[0], row_of[1], 0x7362), d = __byte_perm(row_of[2], row_of[3], 0x7362);
    tile[4 * word][first_quad] = __byte_perm(a, b, 0x5410);
    tile[4 * word + 1][first_quad] = __byte_perm(a, b, 0x7632);
    tile[4 * word + 2][first_quad] = __byte_perm(c, d, 0x5410);
    tile[4 * word + 3][first_quad] = __byte_perm(c, d, 0x7632);
  }
  __syncthreads();
  const int row = first_row + 4 * lane;
#pragma unroll 4
  for (int i = 0; i < kTurn / 8; ++i) {
    const int column = warp * (kTurn / 8) + i;
    if (first_column + column < p.turned_rows && row < p.turned_ld) {
      *reinterpret_cast<uint32_t*>(p.turned + (first_column + column) * p.turned_ld + row) = tile[column][lane];
    }
  }
}

}  // namespace neurogen::cuda
