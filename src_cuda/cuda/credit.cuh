// Credit of a level in one kernel, for many streams: the learning signal L of a token is computed where it is used and
// never goes to memory. A warp takes a tile of 32 neurons and eight streams from the last token to the first, in the
// layout of block_product.cuh: a lane has four neighbouring neurons of two streams. The tile's transposed blocks stay
// in shared memory for the whole walk. What a token reads (u, drive, gate, and eight rows of each panel of errors that
// the blocks are multiplied with) passes through a ring of the warp's own there, some tokens ahead.
// Where the GPU has room for twice the warps, a warp takes four streams, and a lane one: every other column of a
// product is the same as the one before and is thrown away, but a token is half the cells, and it is their chain of
// instructions that a lonely warp waits for: `base`, two small levels of 64 x 512 0.91 -> 0.75 ms, all six of 16 x 512
// 2.5 -> 2.2.
// bf16 only, and for tiles whose blocks fit: else multiply_blocks brings L and scan_adjoint_kernel walks (backward.cu).
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>
#include <type_traits>

#include "credit_step.cuh"

namespace neurogen::cuda {

constexpr int kCreditStreams = 8;        // so many streams at least: below, it takes more warps to fill the GPU
constexpr int kCreditWarps = 4;          // of a block of threads, at most
constexpr int kCrowded = 5, kRoomy = 3;  // resident blocks of threads that registers are meant for: many, few
constexpr int kCrowdedTokens = 3, kRoomyTokens = 6;                // in a warp's ring
constexpr int kRowPieces = kBlock * sizeof(bf16) / sizeof(uint4);  // of 16 bytes

// Where a piece of a slot's rows lies there, so that neither the lanes that bring pieces (one each, in order) nor
// those that read four neurons of row 2t or 2t+1 meet in a bank.
__device__ constexpr int swizzled(int piece) { return piece ^ piece / 8 * 2; }

// Together: tokens of a stage of the ring, worked on side by side. Columns: streams of a lane.
template <int Together, int Stages, int Columns, bool Resets>
__global__ void __launch_bounds__(kCreditWarps * 32, Together == 1 ? kCrowded : kRoomy)
    credit_kernel(const __grid_constant__ Credit p) {
  constexpr int kOwn = kRows / 2 * Columns, kPieces = kOwn * kRowPieces;  // a warp's streams; pieces of a slot
  constexpr int kSlots = 32 / kPieces;                                    // that the lanes bring at once
  extern __shared__ uint4 dynamic[];  // [room] blocks, then [warps][Stages][Together][own + room][kPieces]
  alignas(16) __shared__ CreditConstants constants;
  __shared__ const bf16* sources[3 + kCreditTerms];
  const int warp = threadIdx.x / 32, tile = p.scan.first_tile + blockIdx.x;
  const TileName name = p.scan.tiles[tile];
  const RegionView& region = p.scan.regions[name.region];
  const int32_t begin = p.list.begin[tile], terms = p.list.begin[tile + 1] - begin;
  const OwnPanels own = own_panels(region, name.offset);
  const int own_slots = own.gated ? 3 : 1, slots = own_slots + terms;
  keep_blocks(dynamic, p, begin, terms);
  if (warp == 0) {
    const int lane = threadIdx.x;
    fetch_constants(constants, p.scan, region, name.offset);
    if (lane < own_slots) sources[lane] = lane == kMembrane ? own.u : lane == kDrive ? own.d : own.g;
    if (lane < terms) sources[own_slots + lane] = static_cast<const bf16*>(p.list.terms[begin + lane].source);
  }
  __syncthreads();
  const int streams = p.scan.streams, first_stream = (blockIdx.y * (blockDim.x / 32) + warp) * kOwn;
  if (first_stream >= streams) return;

  const int step = streams * kBlock, token_pieces = (p.own + p.room) * kPieces;
  const int lane = held(static_cast<int>(threadIdx.x % 32)), piece = lane % kPieces, put = held(swizzled(piece));
  uint4* const ring = dynamic + p.room * kBlockPieces + warp * (Stages * Together * token_pieces);
  const int receiver = lane_receiver(), row = lane_row() / 2 * Columns;
  // The piece that the lane multiplies with: of the stream of its column lane / 4, or of every other column.
  const int hear = held(lane / 4 * Columns / 2 * kRowPieces + lane % 4);
  // Where the lane's four values of its rows lie in a slot, in units of them.
  int get[Columns];
#pragma unroll
  for (int c = 0; c < Columns; ++c) {
    get[c] = held(swizzled((row + c) * kRowPieces + receiver / 8) * 2 + receiver / 4 % 2);
  }

  // Asks for a stage's tokens, `last` and those before it. Rows of streams that are not there belong to the next token
  // or are spare: what they give stays in their lanes.
  const auto fetch = [&](int stage, int last) {
#pragma unroll
    for (int i = 0; i < Together; ++i) {
      if (last - i < 0) break;
      const int from = (last - i) * step + first_stream * kBlock + piece * 8;
      uint4* const to = ring + (stage * Together + i) * token_pieces;
#pragma unroll Together == 1 ? 1 : 4
      for (int slot = lane / kPieces; slot < slots; slot += kSlots) {
        const int place = slot < own_slots ? put : piece;
        __pipeline_memcpy_async(to + slot * kPieces + place, sources[slot] + from, sizeof(uint4));
      }
    }
    __pipeline_commit();
  };

  CreditCells<Columns> cells{};
  int stream[Columns];
  bool there[Columns];
#pragma unroll
  for (int c = 0; c < Columns; ++c) stream[c] = first_stream + row + c, there[c] = stream[c] < streams;
#pragma unroll 1
  for (int stage = 0; stage < Stages; ++stage) fetch(stage, p.scan.tokens - 1 - stage * Together);
  int stage = 0;
  for (int last = p.scan.tokens - 1; last >= 0; last -= Together) {
    bool cut[Together][Columns];
#pragma unroll
    for (int i = 0; i < Together; ++i) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) {
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
        multiply_add(signal[i], block, in[i * token_pieces + (own_slots + k) * kPieces + hear]);
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
  for (int c = 0; c < Columns; ++c) {
    const float (&sum)[4] = cells.dbias[c];
    float* const to = region.dbias_part + int64_t{stream[c]} * region.n + name.offset + receiver;
    if (there[c]) store4(to, float4{sum[0], sum[1], sum[2], sum[3]});
  }
}

// How a level is launched. Roomy: with the registers and the shared memory for two tokens at a time and four more on
// their way. Whatever has a place on the GPU for every block of threads at once is taken, roomy ones first, and those
// of one column before those of two.
struct CreditShape {
  int columns, warps, rounds;  // streams of a lane; warps of a block of threads; blocks of threads of a tile
  bool roomy;
  size_t bytes;  // of dynamic shared memory
  bool fits;
};

inline CreditShape credit_shape(const Credit& p, int tiles, int processors, size_t shared_limit) {
  CreditShape shape{};
  for (const bool roomy : {true, false}) {
    for (const int columns : {1, 2}) {
      const int own = kRows / 2 * columns, chunks = (p.scan.streams + own - 1) / own;
      shape.columns = columns, shape.roomy = roomy;
      shape.rounds = (chunks + kCreditWarps - 1) / kCreditWarps;
      shape.warps = (chunks + shape.rounds - 1) / shape.rounds;
      shape.bytes = p.room * kBlockArea * sizeof(bf16) + shape.warps * (roomy ? kRoomyTokens : kCrowdedTokens) *
                                                             (p.own + p.room) * own * kRowPieces * sizeof(uint4);
      shape.fits = p.room <= kCreditTerms && shape.bytes + kCreditReserve <= shared_limit;
      const auto resident = static_cast<int64_t>(shared_limit / (shape.bytes + kCreditReserve));
      const int64_t places = processors * std::min<int64_t>(resident, roomy ? kRoomy : kCrowded);
      if (shape.fits && int64_t{tiles} * shape.rounds <= places) return shape;
    }
  }
  return shape;  // of two columns, some blocks of threads after others
}

inline void launch_credit(cudaStream_t stream, const Credit& p, int tiles, const CreditShape& shape) {
  const auto launch = [&](auto kernel) {
    NG_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.bytes)));
    NG_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    kernel<<<dim3(tiles, shape.rounds), shape.warps * 32, shape.bytes, stream>>>(p);
  };
  const auto launch_of = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value, kRoomyStages = kRoomyTokens / 2;
    if (shape.roomy) {
      p.scan.resets ? launch(credit_kernel<2, kRoomyStages, kColumns, true>)
                    : launch(credit_kernel<2, kRoomyStages, kColumns, false>);
    } else {
      p.scan.resets ? launch(credit_kernel<1, kCrowdedTokens, kColumns, true>)
                    : launch(credit_kernel<1, kCrowdedTokens, kColumns, false>);
    }
  };
  if (shape.columns == 1) {
    launch_of(std::integral_constant<int, 1>{});
  } else {
    launch_of(std::integral_constant<int, 2>{});
  }
}

}  // namespace neurogen::cuda
