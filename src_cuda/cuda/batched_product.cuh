// Products of all rows of a call with lists of blocks: out[receiver, row] = sum over the receiver's terms of
// block * source. A warp takes 32 receivers x 32 rows at a time and goes on with the rows kProductRows further down;
// what happens to the sums is the caller's: finish.open(receiver, first of the lane's four neurons in the tile) gives
// what is called with (row, float4 of sums), so that pointers are looked up once.
#pragma once

#include <algorithm>

#include "block_product.cuh"
#include "model.h"

namespace neurogen::cuda {

constexpr int kProductWarps = 8;
constexpr int kProductSteps = 4;                                     // of kRows rows
constexpr int kProductRows = kProductWarps * kProductSteps * kRows;  // of a block of threads at a time
constexpr int kProductRounds = 8;                                    // at most

template <class Real, class Finish>
__global__ void __launch_bounds__(kProductWarps * 32)
    multiply_blocks_kernel(TermList list, const Real* weights, int64_t rows, int first_receiver, Finish finish) {
  const int receiver = first_receiver + blockIdx.x;
  const int32_t begin = list.begin[receiver], end = list.begin[receiver + 1];
  const auto put = finish.open(receiver, lane_receiver());
  const int64_t step = int64_t{gridDim.y} * kProductRows;
  for (int64_t first = int64_t{blockIdx.y} * kProductRows + threadIdx.x / 32 * (kProductSteps * kRows); first < rows;
       first += step) {
    Sums sums[kProductSteps];
#pragma unroll
    for (int i = 0; i < kProductSteps; ++i) zero(sums[i]);
    for (int32_t at = begin; at < end; ++at) {
      const Term term = list.terms[at];
      const Real* source = static_cast<const Real*>(term.source) + first * kBlock;
      BlockWeights<Real> block;
      block.load(weights + int64_t{term.block} * kBlockArea);
      Sources<Real> sources[kProductSteps];
#pragma unroll
      for (int i = 0; i < kProductSteps; ++i) {
        const int64_t left = rows - first - i * kRows;
        sources[i].load(source + i * kStepValues, left < kRows ? static_cast<int>(left) : kRows);
      }
#pragma unroll
      for (int i = 0; i < kProductSteps; ++i) multiply_add(sums[i], block, sources[i]);
    }
#pragma unroll
    for (int i = 0; i < kProductSteps; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t row = first + i * kRows + lane_row() + c;
        const float (&x)[4][2] = sums[i].x;
        if (row < rows) put(row, float4{x[0][c], x[1][c], x[2][c], x[3][c]});
      }
    }
  }
}

// receivers: how many, from first_receiver on.
template <class Real, class Finish>
void multiply_blocks(cudaStream_t stream, const TermList& list, const void* weights, int64_t rows, int first_receiver,
                     int receivers, Finish finish) {
  const int64_t pieces = (rows + kProductRows - 1) / kProductRows;
  // Enough blocks of threads for every multiprocessor before one of them works on several pieces.
  const int64_t rounds = std::clamp<int64_t>(pieces * receivers / 4096, 1, kProductRounds);
  const dim3 grid(receivers, static_cast<unsigned>((pieces + rounds - 1) / rounds));
  multiply_blocks_kernel<Real>
      <<<grid, kProductWarps * 32, 0, stream>>>(list, static_cast<const Real*>(weights), rows, first_receiver, finish);
}

}  // namespace neurogen::cuda
