// Credit of a level in one kernel, for many streams: the learning signal L of a token is computed where it is used and
// never goes to memory. A warp takes a tile of 32 neurons and eight streams from the last token to the first, in the
// layout of block_product.cuh: a lane has four neighbouring neurons of two streams. The tile's transposed blocks stay
// in shared memory for the whole walk. What a token reads (u, drive, gate, and eight rows of each panel of errors that
// the blocks are multiplied with) passes through a ring of the warp's own there, some tokens ahead.
// bf16 only, and for tiles whose blocks fit: else multiply_blocks brings L and scan_adjoint_kernel walks (backward.cu).
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>

#include "adjoint.cuh"
#include "block_product.cuh"
#include "dropout.cuh"

namespace neurogen::cuda {

constexpr int kCreditStreams = 8;     // so many streams at least: below, it takes more warps to fill the GPU
constexpr int kCreditTerms = 12;      // of a tile, at most
constexpr int kCreditWarps = 4;       // of a block of threads, at most
constexpr int kCreditReserve = 2048;  // bytes of shared memory of a block of threads that are not its blocks and rings
constexpr int kCrowded = 5, kRoomy = 3;  // resident blocks of threads that registers are meant for: many, few
constexpr int kCrowdedTokens = 3, kRoomyTokens = 6;                  // in a warp's ring
constexpr int kPieces = kStepValues * sizeof(bf16) / sizeof(uint4);  // eight rows of a panel: one of each lane
constexpr int kBlockPieces = kBlockArea * sizeof(bf16) / sizeof(uint4);
static_assert(kPieces == 32, "a lane brings one piece of 16 bytes");

struct Credit {
  Scan scan;
  TermList list;
  const bf16* weights;  // transposed blocks
  Dropout dropout;
  int room;  // terms of a tile of this level, at most
  int own;   // slots of a token in the ring that are the tile's own: u, and d and g where a region is gated
};

// Where a piece of eight rows lies in its slot, so that neither the lanes that bring pieces (one each, in order) nor
// those that read four neurons of row 2t or 2t+1 meet in a bank.
__device__ constexpr int swizzled(int piece) { return piece ^ piece / 8 * 2; }

__device__ inline void spread(float4 x, float (&out)[4]) { out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w; }

// x of this lane, in a register: what comes out of a shuffle is not computed again wherever it is used.
template <class T>
__device__ inline T held(T x) {
  return __shfl_sync(0xffffffffu, x, threadIdx.x % 32);
}
__device__ inline bf16* held(bf16* x) {
  return static_cast<bf16*>(__cvta_global_to_generic(held(__cvta_generic_to_global(x))));
}

// Together: tokens of a stage of the ring, worked on side by side.
template <int Together, int Stages, bool Resets>
__global__ void __launch_bounds__(kCreditWarps * 32, Together == 1 ? kCrowded : kRoomy)
    credit_kernel(const __grid_constant__ Credit p) {
  extern __shared__ uint4 dynamic[];  // [room] blocks, then [warps][Stages][Together][own + room][kPieces]
  __shared__ float constants[7][kBlock];
  __shared__ const bf16* sources[kCreditTerms];
  const int warp = threadIdx.x / 32, tile = p.scan.first_tile + blockIdx.x;
  const TileName name = p.scan.tiles[tile];
  const RegionView& region = p.scan.regions[name.region];
  const int32_t begin = p.list.begin[tile], terms = p.list.begin[tile + 1] - begin;
  for (int i = threadIdx.x; i < terms * kKeepParts; i += blockDim.x) {
    const int k = i / kKeepParts;
    const uint4* block =
        reinterpret_cast<const uint4*>(p.weights) + int64_t{p.list.terms[begin + k].block} * kBlockPieces;
    keep_block(dynamic + k * kBlockPieces, block, i % kKeepParts);
  }
  if (warp == 0) {
    const int lane = threadIdx.x;
    for (int k = 0; k < 5; ++k) constants[k][lane] = region.constants[name.offset * 5 + k * kBlock + lane];
    constants[5][lane] = constants[0][lane] - 1.0f;
    constants[6][lane] = rate_error(p.scan, region, name.offset + lane);
    if (lane < terms) sources[lane] = static_cast<const bf16*>(p.list.terms[begin + lane].source);
  }
  __syncthreads();
  const int streams = p.scan.streams, first_stream = (blockIdx.y * (blockDim.x / 32) + warp) * kRows;
  if (first_stream >= streams) return;

  const int64_t panel = name.offset / kBlock * region.stride;
  bf16* const u = held(in_global<bf16>(region.u) + panel);
  bf16* const delta = held(in_global<bf16>(region.delta) + panel);
  bf16* const d = held(in_global<bf16>(region.d) + panel);
  bf16* const g = held(in_global<bf16>(region.g) + panel);
  const bool gated = region.gated, keep_delta = !region.gated || region.hears_delayed;
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
      __pipeline_memcpy_async(to + put, u + from, sizeof(uint4));
      if (gated) {
        __pipeline_memcpy_async(to + put + kPieces, d + from, sizeof(uint4));
        __pipeline_memcpy_async(to + put + 2 * kPieces, g + from, sizeof(uint4));
      }
      uint4* const heard = to + p.own * kPieces + lane;
#pragma unroll 1
      for (int k = 0; k < terms; ++k) __pipeline_memcpy_async(heard + k * kPieces, sources[k] + from, sizeof(uint4));
    }
    __pipeline_commit();
  };

  float lv[2][4] = {}, lw[2][4] = {}, dbias[2][4] = {};
  const int stream = first_stream + row;  // of c = 0
  const bool there[2] = {stream < streams, stream + 1 < streams};
#pragma unroll 1
  for (int stage = 0; stage < Stages; ++stage) fetch(stage, p.scan.tokens - 1 - stage * Together);
  int stage = 0;
  for (int last = p.scan.tokens - 1; last >= 0; last -= Together) {
    bool cut[Together][2];
#pragma unroll
    for (int i = 0; i < Together; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        cut[i][c] = Resets && p.scan.resets[max(last - i, 0) * streams + min(stream + c, streams - 1)];
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
    if (p.dropout.probability > 0) {  // what dropout silenced gets no credit
#pragma unroll
      for (int i = 0; i < Together; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float4 mask = dropout_mask(p.dropout, name.region, name.offset + receiver, last - i, stream + c);
          float (&x)[4][2] = signal[i].x;
          x[0][c] *= mask.x, x[1][c] *= mask.y, x[2][c] *= mask.z, x[3][c] *= mask.w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Together; ++i) {
      const int token = last - i;
      if (i > 0 && token < 0) break;
      const auto stored = [&](int slot, int c, float (&out)[4]) {
        const uint4* const at = in + i * token_pieces + slot * kPieces;
        spread(load4(reinterpret_cast<const bf16*>(reinterpret_cast<const uint2*>(at) + get[c])), out);
      };
      const int at = token * step + stream * kBlock + receiver;
      const auto store = [&](bf16* to, int c, const float (&values)[4]) {
        if (there[c]) store4(to + at + c * kBlock, float4{values[0], values[1], values[2], values[3]});
      };
      float errors[2][4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float membrane[4];
        stored(0, c, membrane);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto constant = [&](int which) { return constants[which][receiver + j]; };
          const OwnPart own = own_part(p.scan, membrane[j], signal[i].x[j][c], constant(6), constant(3), constant(4));
          step_back(own, constant(0), constant(5), constant(2), lv[c][j], lw[c][j]);
          errors[c][j] = constant(1) * lv[c][j];
          if (Resets && cut[i][c]) lv[c][j] = lw[c][j] = 0.0f;  // nothing flows to the token before a reset
        }
      }
      if (keep_delta) {
#pragma unroll
        for (int c = 0; c < 2; ++c) store(delta, c, errors[c]);
      }
      if (gated) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float drive[4], gate[4], gate_errors[4];
          stored(1, c, drive);
          stored(2, c, gate);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            errors[c][j] *= gate[j];
            gate_errors[j] = gate_error(errors[c][j], drive[j], gate[j]);
          }
          store(g, c, errors[c]);
          store(d, c, gate_errors);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int j = 0; j < 4; ++j) dbias[c][j] += errors[c][j];
      }
    }
    __syncwarp();  // all lanes have read the stage
    fetch(stage, last - Stages * Together);
    stage = stage + 1 == Stages ? 0 : stage + 1;
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float (&sum)[4] = dbias[c];
    float* const to = region.dbias_part + int64_t{stream + c} * region.n + name.offset + receiver;
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
