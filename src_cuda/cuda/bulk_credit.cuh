// Credit of many streams where one instruction copies kilobytes (compute capability 9.0): the walk of credit.cuh, but
// what a token reads comes for all warps of a block of threads at once: of u, drive, gate and each panel of errors 32
// streams, 2 KB that lie together, through one ring whose stages are a token each.
//
// Cost: a block's warps walk within a ring of each other, with a barrier to wait for and one to arrive at a token.
//
// The gain: four levels of `base`, 64 x 512, on an H200: 5.9 -> 5.0 ms, L2 at 84 to 86 %, memory at 78 to 81 %. 414
// instead of 543 instructions a token with five terms; and with two or three tokens in a ring five blocks of threads
// fit a multiprocessor, three or four before, so that all of a level is on the GPU at once instead of 1.2 or 1.6 times
// what it holds.
#pragma once

#include <algorithm>

#include "bulk_copy.cuh"
#include "credit_step.cuh"

namespace neurogen::cuda {

constexpr int kBulkWarps = 4;                                   // of a block of threads
constexpr int kBulkGroups = 1;                                  // of eight streams, of a warp
constexpr int kBulkResident = 5;                                // blocks of threads that registers are meant for
constexpr int kBulkStages = 8;                                  // of a ring, at most
constexpr int kBulkStreams = kBulkWarps * kBulkGroups * kRows;  // of a block of threads; a call for it has so many
constexpr int kSystemBytes = 1024;  // of shared memory, of a block of threads: within kCreditReserve, beyond the limit

// Row of the eight that a column of a product stands for. A lane has columns 2t and 2t + 1, and its stores of either
// are, with its neighbours', of four rows in a row: whole lines. Rows of both parities are in either column and in
// every pair of columns: as few loads of a linear piece meet in a bank as can be.
__host__ __device__ constexpr int column_row(int column) {
  return column % 2 ? kRows / 2 + (column / 2 ^ 1) : column / 2;
}

// Plain: without resets and without dropout.
template <int Warps, int Groups, bool Plain>
__global__ void __launch_bounds__(Warps * 32, kBulkResident)
    bulk_credit_kernel(const __grid_constant__ Credit p, int stages) {
#if __CUDA_ARCH__ >= 900
  constexpr int kStreams = Warps * Groups * kRows, kRowBytes = kBlock * sizeof(bf16);
  constexpr int kRowPieces = kRowBytes / sizeof(uint4), kSlot = kStreams * kRowPieces;
  extern __shared__ uint4 dynamic[];  // [room] blocks, then [stages][own + room][kSlot]
  alignas(16) __shared__ CreditConstants constants;
  __shared__ uint64_t full[2 * kBulkStages];  // a stage is there; and the same number again: all have read it
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int tile = p.scan.first_tile + blockIdx.x;
  const TileName name = p.scan.tiles[tile];
  const RegionView& region = p.scan.regions[name.region];
  const int32_t begin = p.list.begin[tile], terms = p.list.begin[tile + 1] - begin;
  const int streams = p.scan.streams, most = blockDim.x / 32 * Groups * kRows;  // ... of this block of threads
  const int first = blockIdx.y * most, rows = min(streams - first, most);
  const int walkers = (rows + Groups * kRows - 1) / (Groups * kRows);  // warps that have streams

  const OwnPanels own = own_panels(region, name.offset);
  const int own_slots = own.gated ? 3 : 1, slots = own_slots + terms, step = streams * kBlock;
  uint4* const ring = dynamic + p.room * kBlockPieces;
  const int stage_pieces = (p.own + p.room) * kSlot;
  // Lane i brings slot i.
  const bf16* from = lane == kMembrane ? own.u : lane == kDrive ? own.d : own.g;
  if (lane >= own_slots && lane < slots) {
    from = static_cast<const bf16*>(p.list.terms[begin + lane - own_slots].source);
  }
  from = held_global(from + first * kBlock);
  // Rows of streams that are not there are not copied: what the ring has in their place stays in their lanes. Of d and
  // g a later token's rows have been overwritten by then, never those that are asked for; errors are of earlier
  // launches.
  const auto fetch = [&](uint4* stage, uint64_t* barrier, int token) {
    if (lane == 0) arrive_for(barrier, slots * rows * kRowBytes);
    __syncwarp();
    if (lane < slots) bring(stage + lane * kSlot, from + int64_t{token} * step, rows * kRowBytes, barrier);
    __syncwarp();
  };
  if (warp == 0) {
    if (lane < stages) {
      begin_turns(full + lane, 1);
      begin_turns(full + kBulkStages + lane, walkers);
      turns_begun();
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < min(stages, p.scan.tokens); ++i) {
      fetch(ring + i * stage_pieces, full + i, p.scan.tokens - 1 - i);
    }
    fetch_constants(constants, p.scan, region, name.offset);
  }
  keep_blocks(dynamic, p, begin, terms);
  __syncthreads();
  if (warp >= walkers) return;

  const int receiver = lane_receiver(), row[2] = {column_row(lane_row()), column_row(lane_row() + 1)};
  int stream[Groups][2], at[Groups][2], present = 0;
#pragma unroll
  for (int i = 0; i < Groups; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      stream[i][c] = first + (warp * Groups + i) * kRows + row[c];
      present |= (stream[i][c] < streams) << (2 * i + c);
      at[i][c] = (p.scan.tokens - 1) * step + stream[i][c] * kBlock + receiver;
    }
  }
  const int there = held(present);
  // The lane's places in the first stage: what it multiplies with of the first term, and u of its rows.
  uint4* const own_rows = ring + warp * Groups * kRows * kRowPieces;
  const uint4* const heard = held_shared(own_rows + own_slots * kSlot + column_row(lane / 4) * kRowPieces + lane % 4);
  const auto place = [&](int row) {
    return held_shared(reinterpret_cast<uint2*>(own_rows + row * kRowPieces) + receiver / 4);
  };
  const uint2* const left[2] = {place(row[0]), place(row[1])};
  const uint4* const blocks = held_shared(dynamic + lane);
  const float* const constant = held_shared(constants[0] + receiver);
  uint64_t* const barriers = held_shared(full);

  CreditCells<2> cells[Groups] = {};
  int stage = 0, in = 0, turn = warp;
  unsigned round = 0;
#pragma unroll 1
  for (int token = p.scan.tokens - 1; token >= 0; --token) {
    bool cut[Groups][2] = {};
    if (!Plain && p.scan.resets) {
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) cut[i][c] = p.scan.resets[token * streams + min(stream[i][c], streams - 1)];
      }
    }
    uint64_t* const barrier = barriers + stage;
    await_turn(barrier, round);
    uint2 raw[3][Groups][2];
#pragma unroll
    for (int slot = 0; slot < 3; ++slot) {
      if (slot > 0 && !own.gated) break;
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) raw[slot][i][c] = left[c][(in + slot * kSlot + i * kRows * kRowPieces) * 2];
      }
    }
    Sums signal[Groups];
#pragma unroll
    for (int i = 0; i < Groups; ++i) zero(signal[i]);
    const uint4 *source = heard + in, *weights = blocks;
#pragma unroll 2
    for (int k = 0; k < terms; ++k, source += kSlot, weights += kBlockPieces) {
      KeptBlock block;
#pragma unroll
      for (int j = 0; j < 4; ++j) block.operand[j] = weights[j * 32];
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
        const uint4 eight = source[i * kRows * kRowPieces];
        multiply_add(signal[i], block, eight);
      }
    }
    __syncwarp();  // all lanes have read the stage
    if (lane == 0) arrive(barrier + kBulkStages);
#pragma unroll
    for (int i = 0; i < Groups; ++i) {
      if (!Plain && p.dropout.probability > 0) {
        silence(signal[i], p.dropout, name.region, name.offset + receiver, token, stream[i]);
      }
      const auto stored = [&](OwnSlot slot, int c, float (&out)[4]) {
        spread(load4(reinterpret_cast<const bf16*>(&raw[slot][i][c])), out);
      };
      const auto store = [&](bf16* to, int c, const float (&values)[4]) {
        if (there >> (2 * i + c) & 1) store4(to + at[i][c], float4{values[0], values[1], values[2], values[3]});
      };
      step_cells<!Plain>(p.scan, constant, own, signal[i], cut[i], cells[i], stored, store);
      at[i][0] -= step, at[i][1] -= step;
    }
    // The warps take turns in filling what they have read; by now the others mostly have, too. Nobody's loads can see
    // what the copy brings: a warp arrives when its loads have given their values, and the copy starts when all have
    // arrived. It needs no fence between the two kinds of access, for none of them has written there but the copies.
    if (turn == 0) {
      turn = walkers;
      if (token >= stages) {
        await_turn(barrier + kBulkStages, round);
        fetch(ring + in, barrier, token - stages);
      }
    }
    --turn, ++stage, in += stage_pieces;
    if (stage == stages) stage = in = 0, ++round;
  }
#pragma unroll
  for (int i = 0; i < Groups; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float (&sum)[4] = cells[i].dbias[c];
      float* const to = region.dbias_part + int64_t{stream[i][c]} * region.n + name.offset + receiver;
      if (stream[i][c] < streams) store4(to, float4{sum[0], sum[1], sum[2], sum[3]});
    }
  }
#endif
}

// How a level is launched: with as many blocks of threads on a multiprocessor as it takes for all to be there at once,
// as far as registers allow, and a ring as deep as shared memory then does. stages = 0: not at all.
struct BulkShape {
  int warps, rounds, stages;  // of a block of threads; blocks of threads of a tile; of a ring
  size_t bytes;               // of dynamic shared memory
};

inline BulkShape bulk_shape(const Credit& p, int tiles, int processors, size_t shared_limit) {
  constexpr size_t kSlotBytes = size_t{kBulkStreams} * kBlock * sizeof(bf16);
  constexpr int kOfWarp = kBulkGroups * kRows;
  const int chunks = (p.scan.streams + kOfWarp - 1) / kOfWarp, rounds = (chunks + kBulkWarps - 1) / kBulkWarps;
  const int warps = (chunks + rounds - 1) / rounds;
  const size_t weights = p.room * kBlockArea * sizeof(bf16), stage = (p.own + p.room) * kSlotBytes;
  const int64_t wanted = (int64_t{tiles} * rounds + processors - 1) / processors;
  if (p.room > kCreditTerms) return {};
  for (int64_t resident = std::min<int64_t>(wanted, kBulkResident); resident > 0; --resident) {
    const size_t room = (shared_limit + kSystemBytes) / resident, taken = weights + kCreditReserve;
    const int stages = room < taken ? 0 : static_cast<int>(std::min<size_t>((room - taken) / stage, kBulkStages));
    if (stages >= 2) return {warps, rounds, stages, weights + stages * stage};
  }
  return {};
}

inline void launch_bulk_credit(cudaStream_t stream, const Credit& p, int tiles, const BulkShape& shape) {
  const auto launch = [&](auto kernel) {
    NG_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.bytes)));
    NG_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    kernel<<<dim3(tiles, shape.rounds), shape.warps * 32, shape.bytes, stream>>>(p, shape.stages);
  };
  p.scan.resets || p.dropout.probability > 0 ? launch(bulk_credit_kernel<kBulkWarps, kBulkGroups, false>)
                                             : launch(bulk_credit_kernel<kBulkWarps, kBulkGroups, true>);
}

}  // namespace neurogen::cuda
