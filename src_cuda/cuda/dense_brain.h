// The brain launch of dense connectomes: what the host plans (dense_plan.cpp) and the kernel reads (dense_brain.cuh).
#pragma once

#include <cstddef>
#include <cstdint>

#include "neurogen/spec.h"

namespace neurogen::cuda {

constexpr int kDenseBands = 4;   // of streams, that a block of threads works on at a time
constexpr int kDenseHalves = 2;  // warps of a band: they divide the sources of a tile
constexpr int kDenseWarps = kDenseBands * kDenseHalves, kDenseThreads = 32 * kDenseWarps;
constexpr int kDenseRing = 4;  // streamed blocks of a half that are on their way or in use
constexpr size_t kDenseBlockBytes = kBlockArea * 2;

constexpr int kTileConstants = 5 * kBlock;

enum DenseKind { kGateSum, kDriveSum, kDelayedSum, kSums };

// How blocks of weights that do not stay in shared memory pass through it, once for all bands. Numbers count those of a
// half since the launch began; number p lies in place p % kDenseRing.
struct DenseConveyor {
  uint64_t there[kDenseHalves][kDenseRing];  // barriers: turn over when a place is filled
  int32_t asked[kDenseHalves];               // the next number to bring
  int32_t used[kDenseHalves][kDenseBands];   // how many a band has done with
  uint64_t unused;                           // the rest of 16 bytes
};

// Of shared memory whatever the share: what streams, what warps exchange, the conveyor.
constexpr size_t kDenseRingBytes = kDenseHalves * kDenseRing * kDenseBlockBytes;
constexpr size_t kDenseExchangeBytes = kDenseWarps * kSums * 32 * 16;
constexpr size_t kDenseFixedBytes = kDenseRingBytes + kDenseExchangeBytes + sizeof(DenseConveyor);

// 32 sources that a tile hears at one delay: they are read once for all sums that they enter.
struct DenseSource {
  const void* panel;             // row 0
  int32_t delay, region, index;  // of the panel in its region
  int32_t place[kSums];          // of the sum's block of weights among those of the share, -1 = not in this sum
};

// Half h sums over sources h, h + 2, ... of its tile: an order that the connectome alone decides.
struct DenseTile {
  void *u, *s, *emitted, *d, *g;  // row 0 of its panels
  const float* constants;         // [5][32]
  int32_t region, offset, rank, gated;
  int32_t source_begin, sources;     // counted in the share
  int32_t list_begin[kDenseHalves];  // room for the numbers of streamed blocks of each half, counted in the share
};

// What one block of threads owns. Of its blocks of weights, listed from block_begin on, as many stay in shared memory
// as there is room for: the first of the list, which are spread evenly over the order of use.
struct DenseShare {
  int32_t tile_begin, tiles, source_begin, sources, block_begin, blocks;
  int32_t table_bytes;  // of shared memory, before everything else
  int32_t reserved;
};

// group = 0: the connectome, the call or the device is not one for this launch.
struct DenseShape {
  int group, steps;  // streams at a time, of a band in units of kRows
  int grid;
  size_t shared_bytes;
};

// Of past, w and spike counts of one tile.
constexpr size_t dense_state_bytes(int steps) { return kDenseWarps * 32 * 16 * (2 * static_cast<size_t>(steps) + 1); }

}  // namespace neurogen::cuda
