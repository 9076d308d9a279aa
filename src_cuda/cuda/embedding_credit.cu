// dE/dx of every row and the gradients of the blocks that hear the embedding, both from one reading of the errors.
// Apart (multiply_blocks, multiply_errors_kernel) each reads the same panels: `base` has 2,272 such blocks, 4.9 GB at
// 64 x 512. The gain there: 0.6 ms, 1.6 instead of 2.2.
//
// A block of threads has 32 values of x, all blocks that hear them, and some of the rows. Warps work in pairs: a pair
// has every fourth of the blocks, a warp of it half of their 32 neurons, with those gradients in its registers and the
// weights in shared memory. Rows come kRowsAtOnce at a time: each warp adds what its halves give to dE/dx, and all add
// up the warps' parts. Cost: a multiprocessor has one such block of threads; gradients of a range of rows go through
// memory, which is that of logits at other times, and are added up in order by a second launch.
//
// At 3.1 TB/s it is bound by its warps' latencies, two to a scheduler: of a warp's time a third goes to waiting for
// shared memory, mostly before products with weights, for which the compiler has no registers left to read ahead.
#include <cuda_pipeline.h>

#include "dense_product.cuh"
#include "model.h"

namespace neurogen::cuda {
namespace {

constexpr int kWarps = 8, kPairs = kWarps / 2, kEach = 13, kMost = kPairs * kEach;  // kEach, kMost: blocks
constexpr int kRowsAtOnce = 16, kTogether = 2;   // kTogether: in shared memory at a time
constexpr int kParts = kRowsAtOnce * 4;          // of 16 bytes, of 32 columns
constexpr int kSquare = kParts * sizeof(uint4);  // bytes: 32 columns of a piece
constexpr int kHalfBlock = kBlockArea * sizeof(bf16) / sizeof(uint4) / 2;
static_assert(kHalfBlock == kParts);
constexpr int kLeastRows = 2048;  // of a call; below, it takes more blocks of threads
constexpr int kMostRanges = 16;   // of rows

struct EmbeddingCredit {
  const Term* terms;
  const int32_t* begin;
  const bf16 *x, *weights;  // panels; transposed blocks
  float *dx, *part;         // [M, D]; [ranges, terms, 32, 32]
  int64_t rows, dim, stride;
  int total;  // terms
};

struct alignas(16) Room {
  uint4 weights[kMost][2][kHalfBlock];  // [.][neurons 16h .. 16h+15][rows of matrices]
  uint4 errors[kTogether][kMost][kParts], x[kTogether][kParts];
  float4 sums[kWarps][kRowsAtOnce][kBlock / 4];  // dE/dx
  const bf16* sources[kPairs][kEach + 1];        // errors, row 0; two in 16 bytes
};

__global__ void __launch_bounds__(kWarps * 32, 1) credit_embedding_kernel(const __grid_constant__ EmbeddingCredit p) {
  extern __shared__ uint4 dynamic[];
  Room& room = *reinterpret_cast<Room*>(dynamic);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = warp / 2, half = warp % 2;
  const int32_t begin = p.begin[blockIdx.x], terms = p.begin[blockIdx.x + 1] - begin;
  const int mine = max((terms - pair + kPairs - 1) / kPairs, 0);  // blocks pair, pair + kPairs, ...
  for (int i = threadIdx.x; i < terms * 2 * kHalfBlock; i += blockDim.x) {
    const int at = i / (2 * kHalfBlock), which = i / kHalfBlock % 2, part = i % kHalfBlock;
    const int odd = part / 8 % 2, right = part / 16 % 2;  // of the four matrices of 8 x 8 values that a product takes
    const Term& term = p.terms[begin + at];
    const auto* const block = reinterpret_cast<const uint4*>(p.weights + int64_t{term.block} * kBlockArea);
    room.weights[at][which][part] = block[(part / 32 * 2 + odd) * 32 + part % 8 * 4 + which * 2 + right];
    if (which == 0 && part == 0) room.sources[at % kPairs][at / kPairs] = static_cast<const bf16*>(term.source);
  }
  // Blocks that are not there are zeros: with a branch a block the compiler lets each wait for the one before.
  for (int i = terms * kParts + threadIdx.x; i < kMost * kParts; i += blockDim.x) {
    for (auto& errors : room.errors) errors[i / kParts][i % kParts] = {};
    for (auto& weights : room.weights[i / kParts]) weights[i % kHalfBlock] = {};
  }
  __syncthreads();
  const int pieces = static_cast<int>((p.rows + kRowsAtOnce - 1) / kRowsAtOnce);
  const int first = static_cast<int>(int64_t{pieces} * blockIdx.y / gridDim.y),
            end = static_cast<int>(int64_t{pieces} * (blockIdx.y + 1) / gridDim.y);
  const bf16* const x = p.x + blockIdx.x * p.stride;
  // Rows beyond the last come as zeros.
  const auto fetch_x = [&](int piece) {
    if (piece < end && threadIdx.x < kParts) {
      const int64_t row = int64_t{piece} * kRowsAtOnce + threadIdx.x / 4;
      fill(shared_address(room.x[piece % kTogether] + slot64(threadIdx.x / 4, threadIdx.x % 4)),
           x + row * kBlock + threadIdx.x % 4 * 8, row < p.rows);
    }
    __pipeline_commit();
  };
  // A warp brings what it reads itself, and nobody else does.
  const int own_part = half * 2 + lane % 2;
  const unsigned own = shared_address(room.errors[0][pair] + slot64(lane / 2, own_part));
  const auto fetch_errors = [&](int piece) {
    if (piece < end) {
      const int64_t row = int64_t{piece} * kRowsAtOnce + lane / 2, from = row * kBlock + own_part * 8;
      const unsigned to = own + piece % kTogether * static_cast<int>(sizeof(room.errors[0]));
      const bool counts = row < p.rows;
#pragma unroll
      for (int i = 0; i < kEach; i += 2) {
        const ulonglong2 both = *reinterpret_cast<const ulonglong2*>(&room.sources[pair][i]);
        const auto bring = [&](int which, uint64_t panel) {
          if (which < mine) fill(to + which * kPairs * kSquare, reinterpret_cast<const bf16*>(panel) + from, counts);
        };
        bring(i, both.x);
        if (i + 1 < kEach) bring(i + 1, both.y);
      }
    }
    __pipeline_commit();
  };
  // dE/dx of a piece from the warps' parts.
  const auto add_up = [&](int piece) {
    static_assert(kWarps * 32 == kRowsAtOnce * kBlock / 2, "a thread has two sums");
    const int row = threadIdx.x / (kBlock / 2), two = threadIdx.x % (kBlock / 2);
    const int64_t to = int64_t{piece} * kRowsAtOnce + row;
    float2 sum = {0, 0};
#pragma unroll
    for (int from = 0; from < kWarps; ++from) {
      const auto* const parts = reinterpret_cast<const float2*>(room.sums[from][row]);
      const float2 some = parts[two ^ row % kRows / 2 * 4];
      sum = {sum.x + some.x, sum.y + some.y};
    }
    if (to < p.rows) *reinterpret_cast<float2*>(p.dx + to * p.dim + blockIdx.x * kBlock + two * 2) = sum;
  };

  float gradient[kEach][4][4] = {};  // [8 values of x][values of a lane]
  fetch_x(first), fetch_errors(first), fetch_errors(first + 1);
#pragma unroll 1
  for (int piece = first; piece < end; ++piece) {
    __pipeline_wait_prior(1);
    __syncthreads();
    if (piece > first) add_up(piece - 1);
    fetch_x(piece + 1);
    // The lane's row of the four matrices of 16 rows and 16 neurons, transposed for the gradient and not for dE/dx.
    const unsigned errors = shared_address(room.errors[piece % kTogether][pair] +
                                           slot64(lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
    {
      unsigned heard[2][4];
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        load_matrices<true>(heard[right], shared_address(room.x[piece % kTogether] +
                                                         slot64(lane / 8 % 2 * 8 + lane % 8, right * 2 + lane / 16)));
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        unsigned error[4];
        load_matrices<true>(error, errors + i * kPairs * kSquare);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float (&c)[4] = gradient[i][j];
          tensor_product(c[0], c[1], c[2], c[3], error[0], error[1], error[2], error[3], heard[j / 2][j % 2 * 2],
                         heard[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    __syncthreads();  // all have read the sums of the piece before
    {
      Sums sums[kRowsAtOnce / kRows];
      for (Sums& some : sums) zero(some);
      const unsigned weights = shared_address(room.weights[pair][half] + lane);
      unsigned error[2][4], weight[2][4];  // error: two words of rows 0-7, two of rows 8-15
      const auto load_error = [&](int i) { load_matrices<false>(error[i % 2], errors + i * kPairs * kSquare); };
      const auto load_weight = [&](int i, int j) {
        load_matrices<false>(weight[j], weights + i * kPairs * 2 * kSquare + j * kSquare / 2);
      };
      load_error(0), load_weight(0, 0);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // the next is on its way meanwhile
          if (j == 0) load_weight(i, 1);
          if (j == 1 && i + 1 < kEach) load_error(i + 1), load_weight(i + 1, 0);
          const unsigned (&w)[4] = weight[j];
#pragma unroll
          for (int step = 0; step < kRowsAtOnce / kRows; ++step) {
            float (&x)[4][2] = sums[step].x;
            tensor_product(x[j * 2][0], x[j * 2][1], x[j * 2 + 1][0], x[j * 2 + 1][1], w[0], w[1], w[2], w[3],
                           error[i % 2][step * 2], error[i % 2][step * 2 + 1]);
          }
        }
      }
      // Fours of neighbouring rows are swapped so that they meet in no bank.
#pragma unroll
      for (int step = 0; step < kRowsAtOnce / kRows; ++step) {
        const float (&s)[4][2] = sums[step].x;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          room.sums[warp][step * kRows + lane_row() + c][lane / 4 ^ lane_row()] = {s[0][c], s[1][c], s[2][c], s[3][c]};
        }
      }
    }
    __syncwarp();
    fetch_errors(piece + 2);
  }
  __syncthreads();
  if (first < end) add_up(end - 1);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i >= mine) break;
    float* const out = p.part + (int64_t{blockIdx.y} * p.total + begin + i * kPairs + pair) * kBlockArea +
                       (half * 16 + lane / 4) * kBlock + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float (&c)[4] = gradient[i][j];
      *reinterpret_cast<float2*>(out + j * 8) = {c[0], c[1]};
      *reinterpret_cast<float2*>(out + kRows * kBlock + j * 8) = {c[2], c[3]};
    }
  }
}

// A block of weights: its gradient from those of the ranges, in their order.
__global__ void __launch_bounds__(kBlockArea / 4)
    add_ranges_kernel(const Term* terms, const float* part, int total, int ranges, float* gradients, bool accumulate) {
  float* const to = gradients + int64_t{terms[blockIdx.x].block} * kBlockArea + threadIdx.x * 4;
  float4 sum = accumulate ? load4(to) : float4{0, 0, 0, 0};
  for (int range = 0; range < ranges; ++range) {
    const float4 some = load4(part + (int64_t{range} * total + blockIdx.x) * kBlockArea + threadIdx.x * 4);
    sum = {sum.x + some.x, sum.y + some.y, sum.z + some.z, sum.w + some.w};
  }
  store4(to, sum);
}

}  // namespace

// 0: not at all. As many as fill the multiprocessors most evenly.
int CudaModel::embedding_ranges() const {
  if (!spec_.bf16 || rows_ < kLeastRows || most_embedded_ > kMost || embedded_in_rectangles_ || embedded_terms_ == 0 ||
      sizeof(Room) > shared_limit_) {
    return 0;
  }
  const int64_t tiles = spec_.dim / kBlock, bytes = logit_rows_ * logit_ld_ * static_cast<int64_t>(real_size()),
                room = bytes / (embedded_terms_ * kBlockArea * static_cast<int64_t>(sizeof(float)));
  int best = 0;
  double least = 0;
  for (int ranges = 1; ranges <= std::min<int64_t>(kMostRanges, room); ++ranges) {
    const double turns = static_cast<double>((tiles * ranges + processors_ - 1) / processors_) / ranges;
    if (best == 0 || turns < least) best = ranges, least = turns;
  }
  return best;
}

void CudaModel::credit_embedding(int ranges, bool accumulate) {
  float* const part = static_cast<float*>(logits_);
  const EmbeddingCredit job{embed_pull_.terms,
                            embed_pull_.begin,
                            static_cast<const bf16*>(x_),
                            static_cast<const bf16*>(transposed_blocks_),
                            dx_,
                            part,
                            rows_,
                            spec_.dim,
                            panel_values(),
                            static_cast<int>(embedded_terms_)};
  NG_CUDA(cudaFuncSetAttribute(credit_embedding_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(sizeof(Room))));
  credit_embedding_kernel<<<dim3(static_cast<unsigned>(spec_.dim / kBlock), ranges), kWarps * 32, sizeof(Room),
                            stream_.get()>>>(job);
  launched();
  add_ranges_kernel<<<static_cast<unsigned>(embedded_terms_), kBlockArea / 4, 0, stream_.get()>>>(
      embed_pull_.terms, part, static_cast<int>(embedded_terms_), ranges, gradients_, accumulate);
  launched();
}

}  // namespace neurogen::cuda
