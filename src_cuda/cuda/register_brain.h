// What the host plans of the brain launches that keep weights in registers (register_brain.cuh).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "neurogen/spec.h"

namespace neurogen::cuda {

// How many terms of each kind (gates, drives, delayed) a tile may have.
constexpr int kRegisterSlots[3] = {2, 3, 3};
// Bytes of shared memory of a warp: its tables.
constexpr size_t kRegisterTableBytes = 6 * kBlock * 4 + (8 + 4 + 5) * 8 + 6 * 4;
// What a warp keeps of v and w; columns: streams that a lane has.
constexpr size_t register_state_bytes(int columns) { return size_t{2} * columns * 32 * 16; }
// That of few streams (register_brain.cu): warps of a block of threads, streams of a warp at most, and the blocks of a
// kind that are in registers; the others are in shared memory.
constexpr int kRegisterWarps = 12, kRegisterStreams = 8;
__host__ __device__ constexpr int register_held(int kind) { return kind == 2 ? 2 : 1; }
__host__ __device__ constexpr int register_near(const int32_t (&terms)[4]) {  // of a tile
  int near = 0;
  for (int kind = 0; kind < 3; ++kind) {
    const int beyond = terms[kind + 1] - terms[kind] - register_held(kind);
    near += beyond > 0 ? beyond : 0;
  }
  return near;
}
// That of many (wide_brain.cu): streams of a warp at a time, of a lane, and what one term says to them.
constexpr int kWideWarps = 10, kWideStreams = 16, kWideColumns = 4;
constexpr size_t kWideRingBytes = 2 * 32 * 16;
// A tile's second gate has no place in registers: its block is in shared memory.
constexpr size_t kWideFarBytes = sizeof(uint16_t) * kBlock * kBlock;
__host__ __device__ constexpr bool wide_far(const int32_t (&terms)[4]) { return terms[1] - terms[0] > 1; }

// group = 0: it is not for this connectome.
struct RegisterShape {
  int group, copies, chunks;  // streams at a time; warps of a tile; what a warp takes one after the other
  bool wide;
  int grid;
  size_t shared_bytes;
};

// Signs of the spikes of rows up to `end` from the one before on (hush.cu).
enum class SpikeSign { positive, negative, unknown };
struct SignedRows {
  int64_t end;
  SpikeSign sign;
};

}  // namespace neurogen::cuda
