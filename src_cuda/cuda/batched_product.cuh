// Products of all rows of a call with lists of blocks: out[receiver, row] = sum over the receiver's terms of
// block * source. A warp takes 32 receivers x 32 rows at a time and goes on with the rows kProductRows further down;
// what happens to the sums is the caller's: finish.open(receiver, first of the lane's four neurons in the tile) gives
// what is called with (row, float4 of sums), so that pointers are looked up once.
//
// Few rows leave a block of threads one warp with work, which would wait for its terms one after the other: there a
// warp has kRows rows and several terms on their way. The order of a sum is the same.
//
// Quartets, four receivers that hear the same sources (all projections are dense), are multiplied together by a block
// of threads: 128 neurons x kQuartetRows rows, so that each source is read once for four receivers and each weight
// block once for all those rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "block_product.cuh"
#include "dense_product.cuh"
#include "model.h"

namespace neurogen::cuda {

constexpr int kProductWarps = 8;
constexpr int kProductSteps = 4;                                     // of kRows rows
constexpr int kProductRows = kProductWarps * kProductSteps * kRows;  // of a block of threads at a time
constexpr int kProductRounds = 8;                                    // at most
constexpr int kFewRows = 256;                                        // at most, for multiply_few_kernel
constexpr int kFewWarps = 4;
constexpr int kQuartetRows = kRight * kBlock;
static_assert(kQuartet == kLeft, "a quartet's blocks are the left operand");

// store4() that the compiler does not take apart, as it does between the branches of an unrolled finish.
__device__ inline void store_sums(float* to, float4 sums) { store4(to, sums); }
__device__ inline void store_sums(bf16* to, float4 sums) {
  const uint2 raw = pack<bf16>(sums).raw;
  *reinterpret_cast<uint64_t*>(to) = uint64_t{raw.y} << 32 | raw.x;
}

template <class Real, class Finish>
__global__ void __launch_bounds__(kProductWarps * 32)
    multiply_blocks_kernel(TermList list, const int32_t* soloists, const Real* weights, int64_t rows,
                           int first_receiver, Finish finish) {
  const int receiver = soloists ? soloists[blockIdx.x] : first_receiver + blockIdx.x;
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

// blockIdx.y: rows, kRows a warp.
template <class Real, class Finish>
__global__ void __launch_bounds__(kFewWarps * 32)
    multiply_few_kernel(TermList list, const int32_t* soloists, const Real* weights, int64_t rows, int first_receiver,
                        Finish finish) {
  constexpr int kAhead =
      sizeof(Real) == sizeof(bf16) ? 8 : 1;  // terms on their way; floats are read where they are used
  const int lane = threadIdx.x % 32;
  const int64_t first = (int64_t{blockIdx.y} * (blockDim.x / 32) + threadIdx.x / 32) * kRows;
  if (first >= rows) return;
  const int count = static_cast<int>(min(rows - first, int64_t{kRows}));
  const int receiver = soloists ? soloists[blockIdx.x] : first_receiver + blockIdx.x;
  const int32_t begin = list.begin[receiver], end = list.begin[receiver + 1];
  BlockWeights<Real> block[kAhead];
  Sources<Real> sources[kAhead];
  // What the terms say: a lane has one of 32, and gives it to all.
  uint64_t source_of = 0;
  int32_t block_of = 0, next = begin;
  const auto fetch = [&](int slot) {
    if (next >= end) return;
    const int from = (next - begin) % 32;
    if (from == 0 && next + lane < end) {
      const Term& term = list.terms[next + lane];
      source_of = reinterpret_cast<uint64_t>(term.source);
      block_of = term.block;
    }
    const auto* source = reinterpret_cast<const Real*>(__shfl_sync(0xffffffffu, source_of, from));
    block[slot].load(weights + int64_t{__shfl_sync(0xffffffffu, block_of, from)} * kBlockArea);
    sources[slot].load(source + first * kBlock, count);
    ++next;
  };
#pragma unroll
  for (int j = 0; j < kAhead; ++j) fetch(j);
  const auto put = finish.open(receiver, lane_receiver());
  Sums sums;
  zero(sums);
  for (int32_t at = begin; at < end; at += kAhead) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (at + j >= end) break;
      multiply_add(sums, block[j], sources[j]);
      fetch(j);
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float (&x)[4][2] = sums.x;
    if (lane_row() + c < count) put(first + lane_row() + c, float4{x[0][c], x[1][c], x[2][c], x[3][c]});
  }
}

// A block of threads takes tiles (a quartet, kQuartetRows rows) in turn, neighbouring blocks the same rows of
// neighbouring quartets. It is three terms ahead with fetching, also across tiles.
template <class Finish>
__global__ void __launch_bounds__(kRingThreads, 1)
    multiply_quartets_kernel(const Term* terms, const Quartet* quartets, int count, const bf16* weights, int rows,
                             Finish finish) {
  extern __shared__ __align__(128) uint4 ring[];
  const int tiles = (rows + kQuartetRows - 1) / kQuartetRows * count, place = fill_row() * kBlock + fill_part() * 8;
  // The thread's next fetch: its tile, its term, and what that term says of its squares.
  int tile = blockIdx.x, at = 0, row = 0;
  Quartet ahead{};
  const bf16* source = nullptr;
  int32_t block[kLeft / kSquaresAtOnce] = {};
  const auto look = [&] {
    if (tile >= tiles) return;
    if (at == 0) ahead = quartets[tile % count], row = (tile / count * kRight + fill_square()) * kBlock + fill_row();
    const Term* term = terms + ahead.begin + at;
    source = static_cast<const bf16*>(term->source);
#pragma unroll
    for (int i = 0; i < kLeft / kSquaresAtOnce; ++i) {
      block[i] = term[(i * kSquaresAtOnce + fill_square()) * ahead.terms].block;
    }
  };
  const auto fetch = [&](unsigned to) {
    if (tile >= tiles) return;
#pragma unroll
    for (int i = 0; i < kLeft / kSquaresAtOnce; ++i) {
      fill(to + i * kFillStep, weights + int64_t{block[i]} * kBlockArea + place, true);
    }
    const bf16* from = source + int64_t{row} * kBlock + fill_part() * 8;
#pragma unroll
    for (int i = 0; i < kRight / kSquaresAtOnce; ++i) {
      constexpr int kRowStep = kSquaresAtOnce * kBlock;
      fill(to + kLeft * kSquareBytes + i * kFillStep, from + i * kRowStep * kBlock, row + i * kRowStep < rows);
    }
    if (++at == ahead.terms) at = 0, tile += gridDim.x;
    look();
  };
  look();
  DenseProduct<false> product(ring);
  product.begin(fetch);
  for (int mine = blockIdx.x; mine < tiles; mine += gridDim.x) {
    const Quartet quartet = quartets[mine % count];
    product.clear();
    for (int i = 0; i < quartet.terms; ++i) product.step(fetch);
    const int first = mine / count * kQuartetRows + product.first_right() + lane_row();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto put = finish.open(quartet.receiver + product.first_left() / kBlock + i, lane_receiver());
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = first + j * kRows + c;
          const float (&even)[4] = product.sum[2 * i][j], (&odd)[4] = product.sum[2 * i + 1][j];
          if (row < rows) put(row, float4{even[c], even[2 + c], odd[c], odd[2 + c]});
        }
      }
    }
  }
}

template <class Finish>
void multiply_quartets(cudaStream_t stream, const Term* terms, const Quartet* quartets, int count, const void* weights,
                       int64_t rows, Finish finish) {
  const auto kernel = multiply_quartets_kernel<Finish>;
  int device = 0, processors = 0;
  NG_CUDA(cudaGetDevice(&device));
  NG_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  NG_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDenseBytes));
  const int64_t tiles = (rows + kQuartetRows - 1) / kQuartetRows * count;
  kernel<<<static_cast<unsigned>(std::min<int64_t>(tiles, processors)), kRingThreads, kDenseBytes, stream>>>(
      terms, quartets, count, static_cast<const bf16*>(weights), static_cast<int>(rows), finish);
}

// receivers: how many, from first_receiver on; no quartet may lie across the range's ends. Returns how many launches it
// took.
template <class Real, class Finish>
int multiply_blocks(cudaStream_t stream, const ProductList& list, const void* weights, int64_t rows, int first_receiver,
                    int receivers, Finish finish) {
  const int before = list.quartets_before[first_receiver],
            quartets = list.quartets_before[first_receiver + receivers] - before;
  if constexpr (std::is_same_v<Real, bf16>) {
    if (quartets) multiply_quartets(stream, list.terms, list.quartets + before, quartets, weights, rows, finish);
  }
  receivers -= quartets * kQuartet;
  if (!receivers) return 1;
  const int32_t* soloists = quartets ? list.soloists + first_receiver - before * kQuartet : nullptr;
  if (rows <= kFewRows) {
    const int chunks = static_cast<int>((rows + kRows - 1) / kRows), warps = std::min(chunks, kFewWarps);
    const dim3 few(receivers, (chunks + warps - 1) / warps);
    multiply_few_kernel<Real><<<few, warps * 32, 0, stream>>>(list, soloists, static_cast<const Real*>(weights), rows,
                                                              first_receiver, finish);
    return quartets ? 2 : 1;
  }
  const int64_t pieces = (rows + kProductRows - 1) / kProductRows;
  // Enough blocks of threads for every multiprocessor before one of them works on several pieces.
  const int64_t rounds = std::clamp<int64_t>(pieces * receivers / 4096, 1, kProductRounds);
  const dim3 grid(receivers, static_cast<unsigned>((pieces + rounds - 1) / rounds));
  multiply_blocks_kernel<Real><<<grid, kProductWarps * 32, 0, stream>>>(
      list, soloists, static_cast<const Real*>(weights), rows, first_receiver, finish);
  return quartets ? 2 : 1;
}

}  // namespace neurogen::cuda
