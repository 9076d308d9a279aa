// Products of all rows of a call with lists of blocks: out[receiver, row] = sum over the receiver's terms of
// block * source. A block of threads takes a receiver and a piece of the rows at a time and goes on with pieces further
// down; what happens to the sums is the caller's: finish.open(receiver, first of the lane's four neurons in the tile)
// gives what is called with (row, float4 of sums), so that pointers are looked up once.
//
// Few rows leave a block of threads one warp with work, which would wait for its terms one after the other: there a
// warp has kRows rows and several terms on their way. Many rows of bf16 pass through a ring in shared memory, floats
// are read where they are used. The order of a sum is the same everywhere.
//
// Quartets, four receivers that hear the same sources (all projections are dense), are multiplied together by a block
// of threads: 128 neurons x kQuartetRows rows, so that each source is read once for four receivers and each weight
// block once for all those rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "block_product.cuh"
#include "dense_product.cuh"
#include "dependent.cuh"
#include "model.h"

namespace neurogen::cuda {

constexpr int kProductWarps = 8;
constexpr int kProductSteps = 4;                                     // of kRows rows of floats
constexpr int kProductRows = kProductWarps * kProductSteps * kRows;  // of a block of threads at a time
constexpr int kProductBlocks = 4096;                                 // of threads, before they take another piece each,
constexpr int kProductRounds = 8;                                    // pieces that one takes at most
constexpr int kFewRows = 256;                                        // at most, for multiply_few_kernel
constexpr int kFewWarps = 4;
constexpr int kQuartetRows = kRight * kBlock;
constexpr int kStripRows = kProductWarps * kRows;  // kRows of each warp
constexpr int kStrips = 6;                         // of a piece
constexpr int kPieceRows = kStrips * kStripRows;
constexpr int kTermsAhead = 3;    // on their way
constexpr int kManyResident = 2;  // blocks of threads that registers are meant for
constexpr int kManyBytes = kTermsAhead * kPieceRows * kBlock * sizeof(bf16) + (kTermsAhead + 1) * kSquareBytes;
static_assert(kManyBytes <= kDenseBytes, "what every GPU from 8.0 on has");
static_assert(kQuartet == kLeft, "a quartet's blocks are the left operand");

// store4() that the compiler does not take apart, as it does between the branches of an unrolled finish.
__device__ inline void store_sums(float* to, float4 sums) { store4(to, sums); }
__device__ inline void store_sums(bf16* to, float4 sums) {
  const uint2 raw = pack<bf16>(sums).raw;
  *reinterpret_cast<uint64_t*>(to) = uint64_t{raw.y} << 32 | raw.x;
}

// Floats. blockIdx.y: rows, kProductRows a block of threads.
template <class Finish>
__global__ void __launch_bounds__(kProductWarps * 32)
    multiply_blocks_kernel(TermList list, const int32_t* soloists, const float* weights, int64_t rows,
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
      const float* source = static_cast<const float*>(term.source) + first * kBlock;
      BlockWeights<float> block;
      block.load(weights + int64_t{term.block} * kBlockArea);
      Sources<float> sources[kProductSteps];
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

// Many rows, bf16; blockIdx.y: pieces. The sources bound it, which come from memory and are used once. So kTermsAhead
// terms are on their way all the time, also from piece to piece (24 KB each, for two blocks of threads on a
// multiprocessor), and a block of weights comes from L2 once a piece, not once a warp: 26 KB a term instead of 48. That
// costs a barrier a term. The gain: 3.1 -> 1.9 ms for 8.3 GB, the rate of a copy.
//
// A thread brings the 16 bytes of a strip that its own lane multiplies with: sources need no barrier, and their places
// are filled again as soon as they are read. Weights are put into the tensor core's order on the way, word by word.
// Rows beyond the last are not brought: what their lanes multiply instead ends in sums that nobody asks for.
template <class Finish>
__global__ void __launch_bounds__(kProductWarps * 32, kManyResident)
    multiply_many_kernel(TermList list, const int32_t* soloists, const bf16* weights, int rows, int first_receiver,
                         Finish finish) {
  constexpr int kThreads = kProductWarps * 32, kUnits = kSquareBytes / sizeof(uint4), kWords = kBlockArea / 2;
  static_assert(kWords == 2 * kThreads, "a thread brings two words of a block");
  extern __shared__ __align__(128) uint4 ring[];  // [kTermsAhead][kStrips][kThreads], [kTermsAhead + 1][kUnits] weights
  uint4* const sources = ring + threadIdx.x;
  uint4* const blocks = ring + kTermsAhead * kStrips * kThreads;
  const int receiver = soloists ? soloists[blockIdx.x] : first_receiver + blockIdx.x;
  const int32_t begin = list.begin[receiver], end = list.begin[receiver + 1];
  const int begin_row = blockIdx.y * kPieceRows, step = gridDim.y * kPieceRows;
  const int own_row = threadIdx.x / 4, own_part = threadIdx.x % 4 * 8, word = stored_word(threadIdx.x);
  // The next fetch: its term, the first row of its piece, and what the term says, which is looked up a term earlier.
  int32_t next = begin, block = 0;
  int ahead = begin < end ? begin_row : rows;
  const bf16* source = nullptr;
  const auto look = [&] {
    if (ahead >= rows) return;
    const Term& term = list.terms[next];
    source = static_cast<const bf16*>(term.source), block = term.block;
  };
  const auto fetch_block = [&](int to) {
    if (ahead >= rows) return;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(weights) + int64_t{block} * kWords + word;
    uint32_t* const words = reinterpret_cast<uint32_t*>(blocks + to * kUnits) + threadIdx.x;
    __pipeline_memcpy_async(words, from, sizeof(uint32_t));
    __pipeline_memcpy_async(words + kThreads, from + stored_word(kThreads), sizeof(uint32_t));
  };
  const auto fetch_sources = [&](int to) {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const int row = ahead + own_row + i * kStripRows;
      if (row < rows) {
        __pipeline_memcpy_async(sources + (to * kStrips + i) * kThreads, source + (row * kBlock + own_part),
                                sizeof(uint4));
      }
    }
    __pipeline_commit();
    if (++next == end) next = begin, ahead += step;
    look();
  };
  look();
#pragma unroll 1
  for (int i = 0; i < kTermsAhead; ++i) fetch_block(i), fetch_sources(i);
  const auto put = finish.open(receiver, lane_receiver());
  int stage = 0, former = kTermsAhead;  // where the next sources are, and the weights before the next
  for (int first = begin_row; first < rows; first += step) {
    Sums sums[kStrips];
#pragma unroll
    for (int i = 0; i < kStrips; ++i) zero(sums[i]);
#pragma unroll 1
    for (int32_t at = begin; at < end; ++at) {
      __pipeline_wait_prior(kTermsAhead - 1);  // what this thread brought of the term is there,
      __syncthreads();                         // and what the others did; the weights before have been read by all
      fetch_block(former);
      former = former == kTermsAhead ? 0 : former + 1;
      KeptBlock weight;
      weight.load(blocks + former * kUnits);
      uint4 heard[kStrips];
#pragma unroll
      for (int i = 0; i < kStrips; ++i) heard[i] = sources[(stage * kStrips + i) * kThreads];
      fetch_sources(stage);
      stage = stage + 1 == kTermsAhead ? 0 : stage + 1;
#pragma unroll
      for (int i = 0; i < kStrips; ++i) multiply_add(sums[i], weight, heard[i]);
    }
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = first + i * kStripRows + threadIdx.x / 32 * kRows + lane_row() + c;
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
  let_later_start();
  const int lane = threadIdx.x % 32;
  const int64_t first = (int64_t{blockIdx.y} * (blockDim.x / 32) + threadIdx.x / 32) * kRows;
  if (first >= rows) return;  // the first warp of a block never does
  const int count = static_cast<int>(min(rows - first, int64_t{kRows}));
  const int receiver = soloists ? soloists[blockIdx.x] : first_receiver + blockIdx.x;
  const int32_t begin = list.begin[receiver], end = list.begin[receiver + 1];
  BlockWeights<Real> block[kAhead];
  Sources<Real> sources[kAhead];
  // What the terms say: a lane has one of 32, and gives it to all. Two lambdas: in one, the compiler had every fetch
  // but the first eight wait for all that was on its way.
  uint64_t source_of = 0;
  int32_t block_of = 0;
  const auto fetch_block = [&](int slot, int32_t at) {
    if (at >= end) return;
    const int from = (at - begin) % 32;
    if (from == 0 && at + lane < end) {
      const Term& term = list.terms[at + lane];
      source_of = reinterpret_cast<uint64_t>(term.source);
      block_of = term.block;
    }
    block[slot].load(weights + int64_t{__shfl_sync(0xffffffffu, block_of, from)} * kBlockArea);
  };
  const auto fetch_source = [&](int slot, int32_t at) {  // after its block
    if (at >= end) return;
    const auto* source = reinterpret_cast<const Real*>(__shfl_sync(0xffffffffu, source_of, (at - begin) % 32));
    sources[slot].load(source + first * kBlock, count);
  };
#pragma unroll
  for (int j = 0; j < kAhead; ++j) fetch_block(j, begin + j);
  wait_for_earlier();
#pragma unroll
  for (int j = 0; j < kAhead; ++j) fetch_source(j, begin + j);
  const auto put = finish.open(receiver, lane_receiver());
  Sums sums;
  zero(sums);
  for (int32_t at = begin; at < end; at += kAhead) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (at + j >= end) break;
      multiply_add(sums, block[j], sources[j]);
      fetch_block(j, at + j + kAhead);
      fetch_source(j, at + j + kAhead);
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

// A block of threads for each receiver and piece of the rows, as long as they are not too many.
inline dim3 product_grid(int receivers, int64_t rows, int piece) {
  const int64_t pieces = (rows + piece - 1) / piece;
  const int64_t rounds = std::clamp<int64_t>(pieces * receivers / kProductBlocks, 1, kProductRounds);
  return dim3(receivers, static_cast<unsigned>((pieces + rounds - 1) / rounds));
}

// receivers: how many, from first_receiver on; no quartet may lie across the range's ends. early: a launch of few rows
// starts early; nobody may be writing weights then. Returns how many launches it took.
template <class Real, class Finish>
int multiply_blocks(cudaStream_t stream, const ProductList& list, const void* weights, int64_t rows, int first_receiver,
                    int receivers, Finish finish, bool early = false) {
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
    launch_dependent(early, few, warps * 32, 0, stream, multiply_few_kernel<Real, Finish>, list, soloists,
                     static_cast<const Real*>(weights), rows, first_receiver, finish);
    return quartets ? 2 : 1;
  }
  if constexpr (std::is_same_v<Real, bf16>) {
    const auto kernel = multiply_many_kernel<Finish>;
    NG_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kManyBytes));
    NG_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    kernel<<<product_grid(receivers, rows, kPieceRows), kProductWarps * 32, kManyBytes, stream>>>(
        list, soloists, static_cast<const bf16*>(weights), static_cast<int>(rows), first_receiver, finish);
  } else {
    multiply_blocks_kernel<<<product_grid(receivers, rows, kProductRows), kProductWarps * 32, 0, stream>>>(
        list, soloists, static_cast<const float*>(weights), rows, first_receiver, finish);
  }
  return quartets ? 2 : 1;
}

}  // namespace neurogen::cuda
