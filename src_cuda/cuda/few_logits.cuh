// Logits of up to eight rows in bf16: out[row, v] = sum over d of W[v, d] x[row, d], and + bias[v] where it is wanted.
// The time is that of reading W once. The trick: every warp always has 6 to 8 KB of W on their way to a ring of its own
// in shared memory, 100 KB or more a multiprocessor, by cp.async, which takes neither registers nor room in the L1
// cache; the tensor core multiplies by eight rows at once, 60 instructions for 2 KB. In the L2 cache W makes room
// first, so the brain's weights stay there. The cost: shared memory, and work for eight rows where there is one. The
// gain for V = 32,000 and D = 1,536 on an H200: 24.7 us (98 MB take 23 at the copy rate) instead of the 28 to 41 of
// cuBLASLt. Generation fills the rings, 17 MB, while the kernels before are still at work (dependent.cuh).
//
// A warp has 16 rows of W to itself and goes through them from the first d to the last, two sums by turns: the order
// of a logit's sum is D's alone.
#pragma once

#include <algorithm>

#include "dense_product.cuh"
#include "dependent.cuh"
#include "device.h"

namespace neurogen::cuda {

constexpr int kLogitTile = 16;                 // rows of W of a warp at a time: those of a product of the tensor core
constexpr int kLogitStep = 64;                 // of D at a time: a line of 128 bytes of each row
constexpr int kLogitStages = 4;                // in a warp's ring
constexpr int kLogitWarps = 16;                // of a block of threads, at most
constexpr int kLogitParts = kLogitStep / 8;    // of a row of a step: one of 16 bytes for each of eight lanes
constexpr int kRowsAtOnce = 32 / kLogitParts;  // that a warp brings
constexpr int kLineBytes = kLogitStep * sizeof(bf16), kLogitStageBytes = kLogitTile * kLineBytes;
constexpr int kLogitRingBytes = kLogitStages * kLogitStageBytes;
constexpr int kStepBytes = kRows * kLineBytes;  // of x

struct FewLogits {
  const bf16 *weights, *x;  // [V, D], [rows, D]
  const float* bias;        // [V]; null = none
  float* out;               // [rows, V]
  int vocab, dim, rows;
};

// Where 16 bytes of a 128-byte row lie, swapped so that eight rows of a matrix load meet different banks.
__device__ inline int place128(int row, int part) { return (row * kLogitParts + (part ^ row % 8)) * 16; }

// For what is read once and never again.
__device__ inline uint64_t leave_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// fill() by such a policy.
__device__ inline void fill(unsigned to, const bf16* from, bool counts, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(counts ? 16 : 0), "l"(policy)
               : "memory");
}

// Half the registers are left, so that a draw's blocks of threads (sampling.cu) can come up beside those of its logits.
static __global__ void __launch_bounds__(kLogitWarps * 32, 2) few_logits_kernel(const __grid_constant__ FewLogits p) {
  let_later_start();
  extern __shared__ __align__(kLineBytes) uint4 room[];  // x [steps][kRows][kLogitParts], then the rings of the warps
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = (p.dim + kLogitStep - 1) / kLogitStep, tiles = (p.vocab + kLogitTile - 1) / kLogitTile;
  const int first = warp * gridDim.x + blockIdx.x, stride = blockDim.x / 32 * gridDim.x;
  const unsigned x = shared_address(room), ring = x + steps * kStepBytes + warp * kLogitRingBytes;

  // What lies beyond D comes as zeros, of both. Beyond V there is anything, for logits that nobody looks at.
  // The lane's part of the next fetch: how many rows of W there are from its first one on, which of D, and where.
  const int own_row = lane / kLogitParts, own_d = lane % kLogitParts * 8, width = steps * kLogitStep;
  int below = p.vocab - first * kLogitTile - own_row, d = own_d;
  const bf16* from = p.weights + (int64_t{first} * kLogitTile + own_row) * p.dim + d;
  const int64_t leap = int64_t{stride} * kLogitTile * p.dim - width;  // from the end of a tile to the warp's next
  // Out of a shuffle, so that it stays in a register and is not computed again for every fetch.
  const unsigned put = __shfl_sync(0xffffffffu, place128(own_row, own_d / 8), lane);
  const uint64_t policy = leave_first();
  const auto fetch = [&](unsigned stage) {
    if (below > 0) {
      const int rows = d < p.dim ? below : 0;
#pragma unroll
      for (int i = 0; i < kLogitTile; i += kRowsAtOnce) {
        fill(((stage + put) ^ (i % 8 * 16)) + i * kLineBytes, from + i * p.dim, i < rows, policy);
      }
      d += kLogitStep, from += kLogitStep;
      if (d >= width) d = own_d, from += leap, below -= stride * kLogitTile;
    }
    __pipeline_commit();  // where nothing is left too: those that wait count
  };
#pragma unroll 1
  for (int i = 0; i < kLogitStages; ++i) fetch(ring + i * kLogitStageBytes);
  // x comes from the kernel before, W does not. Through registers, for fetches of the ring are counted.
  wait_for_earlier();
  for (int part = threadIdx.x; part < steps * kLogitParts; part += blockDim.x) {
    uint4 held[kRows] = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row < p.rows && part * 8 < p.dim) held[row] = *reinterpret_cast<const uint4*>(p.x + row * p.dim + part * 8);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int to = part / kLogitParts * kStepBytes + place128(row, part % kLogitParts);
      if (row < p.rows) room[to / sizeof(uint4)] = held[row];
    }
  }
  __syncthreads();  // all of x is there

  // A lane's row of a matrix load; rows of x that are not there give columns that nobody looks at.
  const unsigned left = place128(lane % 16, lane / 16), right = place128(min(lane % 8, p.rows - 1), lane / 8);
  unsigned stage = ring;
  for (int tile = first; tile < tiles; tile += stride) {
    const int v = tile * kLogitTile + lane / 4;
    float bias[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (p.bias && v + 8 * i < p.vocab) bias[i] = p.bias[v + 8 * i];
    }
    float sum[2][4] = {};  // by turns: half the products wait for the one before
#pragma unroll 1
    for (unsigned x_at = x; x_at < x + steps * kStepBytes; x_at += kStepBytes) {
      __pipeline_wait_prior(kLogitStages - 1);  // this lane's parts are there,
      __syncwarp();                             // and those of the others
      unsigned weights[kLogitStep / 16][4], rows[kLogitStep / 32][4];
#pragma unroll
      for (int i = 0; i < kLogitStep / 16; ++i) load_matrices<false>(weights[i], (stage + left) ^ (i * 32));
#pragma unroll
      for (int i = 0; i < kLogitStep / 32; ++i) load_matrices<false>(rows[i], (x_at + right) ^ (i * 64));
      __syncwarp();  // all lanes have read the stage
      fetch(stage);
      stage = stage + kLogitStageBytes < ring + kLogitRingBytes ? stage + kLogitStageBytes : ring;
#pragma unroll
      for (int i = 0; i < kLogitStep / 16; ++i) {
        float (&c)[4] = sum[i % 2];
        const unsigned (&w)[4] = weights[i];
        const unsigned* const b = rows[i / 2] + i % 2 * 2;
        tensor_product(c[0], c[1], c[2], c[3], w[0], w[1], w[2], w[3], b[0], b[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane_row() + i % 2, at = v + i / 2 * 8;
      if (row < p.rows && at < p.vocab) {
        p.out[int64_t{row} * p.vocab + at] = sum[0][i] + sum[1][i] + bias[i / 2];
      }
    }
  }
}

// Of all eight rows: whether a model's logits are made here does not depend on how many there are.
inline size_t few_logits_bytes(int dim) { return size_t{kStepBytes} * ((dim + kLogitStep - 1) / kLogitStep); }
inline bool few_logits_fit(int dim, size_t shared_limit) {
  return few_logits_bytes(dim) + kLogitRingBytes <= shared_limit;
}

// As many warps on every multiprocessor as have a tile each, or the same number of tiles.
inline void launch_few_logits(cudaStream_t stream, const FewLogits& p, int processors, size_t shared_limit,
                              bool early) {
  const auto divide_up = [](int count, int by) { return (count + by - 1) / by; };
  const size_t fixed = few_logits_bytes(p.dim);
  const int most = static_cast<int>(std::min<size_t>((shared_limit - fixed) / kLogitRingBytes, kLogitWarps));
  const int tiles = divide_up(p.vocab, kLogitTile), each = divide_up(tiles, processors);
  const int warps = divide_up(each, divide_up(each, most));
  const int bytes = static_cast<int>(fixed) + warps * kLogitRingBytes;
  NG_CUDA(cudaFuncSetAttribute(few_logits_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  launch_dependent(early, dim3(std::min(tiles, processors)), warps * 32, bytes, stream, few_logits_kernel, p);
}

}  // namespace neurogen::cuda
