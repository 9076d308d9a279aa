// Credit of a level in one kernel, for many streams: the learning signal L of a token is computed where it is used and
// never goes to memory. A warp takes a tile of 32 neurons and eight streams from the last token to the first, in the
// layout of block_product.cuh: a lane has four neighbouring neurons of two streams. The tile's transposed blocks stay
// in shared memory for the whole walk. What a token reads (u, drive, gate, and eight rows of each panel of errors that
// the blocks are multiplied with) passes through a ring of the warp's own there, some tokens ahead.
// bf16 only, and for tiles whose blocks fit: else multiply_blocks brings L and scan_adjoint_kernel walks (backward.cu).
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>

#include "credit_step.cuh"

namespace neurogen::cuda {

constexpr int kCreditStreams = 8;        // so many streams at least: below, it takes more warps to fill the GPU
constexpr int kCreditWarps = 4;          // of a block of threads, at most
constexpr int kCrowded = 5, kRoomy = 3;  // resident blocks of threads that registers are meant for: many, few
constexpr int kCrowdedTokens = 3, kRoomyTokens = 6;                  // in a warp's ring
constexpr int kPieces = kStepValues * sizeof(bf16) / sizeof(uint4);  // eight rows of a panel: one of each lane
static_assert(kPieces == 32, "a lane brings one piece of 16 bytes");

// Where a piece of eight rows lies in its slot, so that neither the lanes that bring pieces (one each, in order) nor
// those that read four neurons of row 2t or 2t+1 meet in a bank.
__device__ constexpr int swizzled(int piece) { return piece ^ piece / 8 * 2; }

// Together: tokens of a stage of the ring, worked on side by side.
template <int Together, int Stages, bool Resets>
__global__ void __launch_bounds__(kCreditWarps * 32, Together == 1 ? kCrowded : kRoomy)
    credit_kernel(const __grid_constant__ Credit p) {
  extern __shared__ uint4 dynamic[];  // [room] blocks, then [warps][Stages][Together][own + room][kPieces]
  alignas(16) __shared__ CreditConstants constants;
  __shared__ const bf16* sources[kCreditTerms];
  const int warp = threadIdx.x / 32, tile = p.scan.first_tile + blockIdx.x;
  const TileName name = p.scan.tiles[tile];
  const RegionView& region = p.scan.regions[name.region];
  const int32_t begin = p.list.begin[tile], terms = p.list.begin[tile + 1] - begin;
  keep_blocks(dynamic, p, begin, terms);
  if (warp == 0) {
    const int lane = threadIdx.x;
    fetch_constants(constants, p.scan, region, name.offset);
    if (lane < terms) sources[lane] = static_cast<const bf16*>(p.list.terms[begin + lane].source);
  }
  __syncthreads();
  const int streams = p.scan.streams, first_stream = (blockIdx.y * (blockDim.x / 32) + warp) * kRows;
  if (first_stream >= streams) return;

  const OwnPanels own = own_panels(region, name.offset);
  const int step = streams * kBlock, token_pieces = (p.own + p.room) * kPieces;
  const int lane = held(static_cast<int>(threadIdx.x % 32)), put = held(swizzled(lane));
  uint4* const ring = dynamic + p.room * kBlockPieces + warp * (Stages * Together * token_pieces);
  const int receiver = lane_receiver(), row = lane_row();
  // Where the lane's four values of row 2t + c lie in a slot, in units of them.
  const int get[2] = {held(swizzled(row * 4 + receiver / 8) * 2 + receiver / 4 % 2),
                      held(swizzled(row * 4 + 4 + receiver / 8) * 2 + receiver / 4 % 2)};

  // Asks for a stage's tokens, `last` and those before it. Rows of streams that are not there belong to the next token
  // or are spare: what they give stays in their lanes.
  const auto fetch = [&](int stage, int last) {
#pragma unroll
    for (int i = 0; i < Together; ++i) {
      if (last - i < 0) break;
      const int from = (last - i) * step + first_stream * kBlock + lane * 8;
      uint4* const to = ring + (stage * Together + i) * token_pieces;
      __pipeline_memcpy_async(to + put, own.u + from, sizeof(uint4));
      if (own.gated) {
        __pipeline_memcpy_async(to + put + kPieces, own.d + from, sizeof(uint4));
        __pipeline_memcpy_async(to + put + 2 * kPieces, own.g + from, sizeof(uint4));
      }
      uint4* const heard = to + p.own * kPieces + lane;
#pragma unroll 1
      for (int k = 0; k < terms; ++k) __pipeline_memcpy_async(heard + k * kPieces, sources[k] + from, sizeof(uint4));
    }
    __pipeline_commit();
  };

  CreditCells cells{};
  const int stream[2] = {first_stream + row, first_stream + row + 1};
  const bool there[2] = {stream[0] < streams, stream[1] < streams};
#pragma unroll 1
  for (int stage = 0; stage < Stages; ++stage) fetch(stage, p.scan.tokens - 1 - stage * Together);
  int stage = 0;
  for (int last = p.scan.tokens - 1; last >= 0; last -= Together) {
    bool cut[Together][2];
#pragma unroll
    for (int i = 0; i < Together; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        cut[i][c] = Resets && p.scan.resets[max(last - i, 0) * streams + min(stream[c], streams - 1)];
      }
    }
    __pipeline_wait_prior(Stages - 1);  // this lane's pieces are there,
    __syncwarp();                       // and those of the others
    const uint4* const in = ring + stage * (Together * token_pieces);
    Sums signal[Together];
#pragma unroll
    for (int i = 0; i < Together; ++i) zero(signal[i]);
#pragma unroll 2
    for (int k = 0; k < terms; ++k) {
      KeptBlock block;
      block.load(dynamic + k * kBlockPieces);
#pragma unroll
      for (int i = 0; i < Together; ++i) {
        multiply_add(signal[i], block, in[i * token_pieces + (p.own + k) * kPieces + lane]);
      }
    }
    if (p.dropout.probability > 0) {
#pragma unroll
      for (int i = 0; i < Together; ++i) {
        silence(signal[i], p.dropout, name.region, name.offset + receiver, last - i, stream);
      }
    }
#pragma unroll
    for (int i = 0; i < Together; ++i) {
      const int token = last - i;
      if (i > 0 && token < 0) break;
      const auto stored = [&](OwnSlot slot, int c, float (&out)[4]) {
        const uint4* const at = in + i * token_pieces + slot * kPieces;
        spread(load4(reinterpret_cast<const bf16*>(reinterpret_cast<const uint2*>(at) + get[c])), out);
      };
      const int at = token * step + stream[0] * kBlock + receiver;
      const auto store = [&](bf16* to, int c, const float (&values)[4]) {
        if (there[c]) store4(to + at + c * kBlock, float4{values[0], values[1], values[2], values[3]});
      };
      step_cells<Resets>(p.scan, constants[0] + receiver, own, signal[i], cut[i], cells, stored, store);
    }
    __syncwarp();  // all lanes have read the stage
    fetch(stage, last - Stages * Together);
    stage = stage + 1 == Stages ? 0 : stage + 1;
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float (&sum)[4] = cells.dbias[c];
    float* const to = region.dbias_part + int64_t{stream[c]} * region.n + name.offset + receiver;
    if (there[c]) store4(to, float4{sum[0], sum[1], sum[2], sum[3]});
  }
}

// How a level is launched. Roomy: there is a place on the GPU for every block of threads at once, with the registers
// and the shared memory for two tokens at a time and four more on their way.
struct CreditShape {
  int warps, rounds;  // of a block of threads; blocks of threads of a tile
  bool roomy;
  size_t bytes;  // of dynamic shared memory
  bool fits;
};

inline CreditShape credit_shape(const Credit& p, int tiles, int processors, size_t shared_limit) {
  const int chunks = (p.scan.streams + kRows - 1) / kRows, rounds = (chunks + kCreditWarps - 1) / kCreditWarps;
  CreditShape shape{(chunks + rounds - 1) / rounds, rounds};
  const auto bytes = [&](int tokens) {
    return p.room * kBlockArea * sizeof(bf16) + shape.warps * tokens * (p.own + p.room) * kPieces * sizeof(uint4);
  };
  const size_t resident = shared_limit / (bytes(kRoomyTokens) + kCreditReserve);
  shape.roomy = int64_t{tiles} * rounds <= processors * std::min<int64_t>(resident, kRoomy);
  shape.bytes = bytes(shape.roomy ? kRoomyTokens : kCrowdedTokens);
  shape.fits = p.room <= kCreditTerms && shape.bytes + kCreditReserve <= shared_limit;
  return shape;
}

inline void launch_credit(cudaStream_t stream, const Credit& p, int tiles, const CreditShape& shape) {
  const auto launch = [&](auto kernel) {
    NG_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.bytes)));
    NG_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    kernel<<<dim3(tiles, shape.rounds), shape.warps * 32, shape.bytes, stream>>>(p);
  };
  if (shape.roomy) {
    p.scan.resets ? launch(credit_kernel<2, kRoomyTokens / 2, true>)
                  : launch(credit_kernel<2, kRoomyTokens / 2, false>);
  } else {
    p.scan.resets ? launch(credit_kernel<1, kCrowdedTokens, true>) : launch(credit_kernel<1, kCrowdedTokens, false>);
  }
}

}  // namespace neurogen::cuda
