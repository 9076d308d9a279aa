// Softmax cross-entropy and its gradient, in place or as bytes elsewhere, of bf16 rows of 4,097 to 32,768 logits. The
// trick: a block of threads walks many rows and has the same columns of each, so that their biases stay in shared
// memory and the sums of dc in registers; the next row is on its way while one is worked on. The cost: all registers of
// a multiprocessor, and every exponential twice. The gain: 4V bytes of bias a row from L2 and another reading of the
// errors, 2.6 -> 1.4 ms for 32,768 rows of 32,000; with the next row in shared memory (Ahead) 1.2.
#pragma once

#include <cuda_pipeline.h>

#include <climits>
#include <cmath>

#include "eight_bits.cuh"
#include "logit_rows.cuh"

namespace neurogen::cuda {

constexpr int kSlots = 8;             // pieces a thread owns: 64 sums and 32 words of logits in registers
constexpr int kWalkThreads = 512;     // of a multiprocessor, 128 registers each: all it has
constexpr int kFewestWalk = 128;      // of a block, for rows of more than 4,096
constexpr int kMostProcessors = 160;  // multiprocessors that walk; there is room for the sums of so many
constexpr float kLn2 = 0.69314718f;
constexpr float kBelowAll = -2e38f;  // below every logit that counts; times log2 e still finite
constexpr unsigned kWarp = 0xffffffffu;
constexpr size_t kWalkRoom = 2048;  // its shared memory beside the biases, and what the system keeps of a block's

// What a thread, a warp or a block knows of its logits z: the highest, the sum of 2^(z log2 e - top log2 e), and where
// the first piece with the highest begins.
struct Softmax {
  float top, sum;
  int first;
};

// __fmul_rn: the same number wherever it is computed; contracted to an FMA it would be another.
__device__ inline float base_of(float top) { return __fmul_rn(top, kLog2E); }

// A warp's together, in one order. The lowest piece with the top is the one with the lowest id.
__device__ inline Softmax merge(const Softmax& own) {
  const float top = warp_max(own.top);
  const float sum = warp_sum(own.sum * fast_exp2(base_of(own.top) - base_of(top)));
  return {top, sum, __reduce_min_sync(kWarp, own.top == top ? own.first : INT_MAX)};
}

// The same by another instruction: the compiler would see the same floats, keep all 64 of them from the first pass to
// the second, and spill.
__device__ inline void unpack_again(const uint4& raw, float (&x)[kPiece]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(__byte_perm(words[i], 0, 0x1044));
    x[2 * i + 1] = __uint_as_float(__byte_perm(words[i], 0, 0x3244));
  }
}

// Rows blockIdx.x, blockIdx.x + gridDim.x, ... of a chunk. A thread has the same pieces of every row: threadIdx.x,
// threadIdx.x + Threads, ... It keeps their logits as they are stored and computes the exponentials twice, once for the
// sum, once for the errors: kept as floats they would leave no register for the sums of columns. As soon as a piece has
// been turned into errors, the next row's takes its registers, and has the rest of this row to arrive.
// Ahead: the next row waits in shared memory meanwhile, where it has had a whole row's time to arrive.
// Eight: errors go to p.bytes.
// part[block, v]: column sums of the block's errors before they are rounded, since the first chunk (go_on: not this
// one). What lies behind a row must be a number: its bias is -inf here, as that of slots without a piece.
template <int Threads, bool Ahead, bool Eight>
__global__ void __launch_bounds__(Threads, kWalkThreads / Threads)
    walk_rows_kernel(bf16* logits, int64_t rows, bool go_on, float* part, ScoreJob p) {
  constexpr int kNext = Threads * kPiece;  // from a thread's piece to its next
  extern __shared__ float4 biases[];  // two halves [kSlots, Threads]: neighbours read neighbouring banks; Ahead: a row
  __shared__ Softmax room[2][32];     // by turns, so that one barrier a row is enough
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, begin = threadIdx.x * kPiece;
  float4* const low = biases + threadIdx.x;
  float4* const high = low + kSlots * Threads;
  uint4* const waiting = reinterpret_cast<uint4*>(high + kSlots * Threads);    // this thread's pieces
  const int live = (static_cast<int>(p.ld) - begin + kNext - kPiece) / kNext;  // slots with a piece
  const int64_t leap = gridDim.x * p.ld;
  const float up = Eight ? *p.up : 1.0f;

  bf16* at = logits + blockIdx.x * p.ld + begin;  // this thread's first piece
  uint4 raw[kSlots] = {};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k >= live || blockIdx.x >= rows) continue;
    if (Ahead) {
      __pipeline_memcpy_async(waiting + k * Threads, at + k * kNext, sizeof(uint4));
    } else {
      raw[k] = *reinterpret_cast<const uint4*>(at + k * kNext);
    }
  }
#pragma unroll 2
  for (int k = 0; k < kSlots; ++k) {  // a thread reads no other's: no barrier
    float c[kPiece] = {};
    const int first = begin + k * kNext;
    if (k < live) load_piece(p.bias + first, c);
    for (int j = 0; j < kPiece; ++j) c[j] = first + j < p.vocab ? c[j] : -INFINITY;
    low[k * Threads] = {c[0], c[1], c[2], c[3]};
    high[k * Threads] = {c[4], c[5], c[6], c[7]};
  }
  const auto with_bias = [&](const float (&x)[kPiece], int k, float (&z)[kPiece]) {
    const float4 lo = low[k * Threads], hi = high[k * Threads];
    z[0] = x[0] + lo.x, z[1] = x[1] + lo.y, z[2] = x[2] + lo.z, z[3] = x[3] + lo.w;
    z[4] = x[4] + hi.x, z[5] = x[5] + hi.y, z[6] = x[6] + hi.z, z[7] = x[7] + hi.w;
  };
  float* const sums_at = part + blockIdx.x * p.ld + begin;
  float sums[kSlots][kPiece] = {};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (go_on && k < live) load_piece(sums_at + k * kNext, sums[k]);
  }

  const double divisor = p.verdict->divisor;
  const float share = divisor > 0 ? static_cast<float>(1.0 / divisor) : 0.0f;
  const int count = static_cast<int>(rows);
  int next_target = blockIdx.x < count ? p.targets[blockIdx.x] : 0;
  float next_weight = blockIdx.x < count ? p.weights[blockIdx.x] : 0.0f;
  for (int row = blockIdx.x, turn = 0; row < count; row += gridDim.x, at += leap, turn ^= 1) {
    const int target = next_target;
    const float weight = next_weight;
    float target_logit = 0.0f;  // of thread 0; it is asked for here, before any error can take its place
    if (threadIdx.x == 0) target_logit = to_float(at[target]) + p.bias[target];
    const bool more = row + gridDim.x < count;
    if (Ahead) __pipeline_wait_prior(0);
#pragma unroll
    for (int k = 0; k < kSlots && Ahead; ++k) {
      if (k >= live) continue;
      raw[k] = waiting[k * Threads];
      if (more) __pipeline_memcpy_async(waiting + k * Threads, at + leap + k * kNext, sizeof(uint4));
    }

    Softmax own{kBelowAll, 0.0f, begin};
    float base = base_of(kBelowAll);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      float z[kPiece];
      unpack(raw[k], z);
      with_bias(z, k, z);
      const float most =
          fmaxf(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), fmaxf(fmaxf(z[4], z[5]), fmaxf(z[6], z[7])));
      const float before = base;
      if (most > own.top) own.top = most, own.first = begin + k * kNext;
      base = base_of(own.top);
      own.sum *= fast_exp2(before - base);
      for (int j = 0; j < kPiece; ++j) own.sum += fast_exp2(fmaf(z[j], kLog2E, -base));
    }
    const Softmax of_warp = merge(own);
    if (lane == 0) room[turn][warp] = of_warp;
    if (more) next_target = p.targets[row + gridDim.x], next_weight = p.weights[row + gridDim.x];
    __syncthreads();
    const Softmax whole = merge(lane < Threads / 32 ? room[turn][lane] : Softmax{kBelowAll, 0.0f, INT_MAX});
    base = base_of(whole.top);

    if (own.first == whole.first) {  // one thread; a row of NaN has no best id, and gets the last
      uint4 words = raw[0];
      int slot = 0;
#pragma unroll
      for (int k = 1; k < kSlots; ++k) {
        if (own.first == begin + k * kNext) words = raw[k], slot = k;
      }
      float z[kPiece];
      unpack(words, z);
      with_bias(z, slot, z);
      int id = p.vocab - 1;
      for (int j = kPiece - 1; j >= 0; --j) id = z[j] == whole.top ? own.first + j : id;
      p.best[row] = id;
    }
    if (threadIdx.x == 0) {  // from the base that the sum counts from
      const float loss = logf(whole.sum) - kLn2 * fmaf(target_logit, kLog2E, -base);
      p.losses[row] = loss;
      if (weight != 0.0f && !isfinite(loss)) atomicOr(&p.verdict->loss_not_finite, 1);
    }

    const int coming = more && !Ahead ? live : 0;
    const auto bring = [&](int k) {
      if (k < coming) raw[k] = *reinterpret_cast<const uint4*>(at + leap + k * kNext);
    };
    const float scale = weight * share;
    uint2* const bytes = Eight ? reinterpret_cast<uint2*>(p.bytes + row * p.ld + begin) : nullptr;
    if (!p.want_gradient || scale == 0.0f) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        // A row without weight gets exact zeros, whatever its logits are.
        if (p.want_gradient && k < live) {
          if (Eight) {
            bytes[k * Threads] = {};
          } else {
            *reinterpret_cast<uint4*>(at + k * kNext) = {};
          }
        }
        bring(k);
      }
      continue;
    }
    const float factor = __fdividef(scale, whole.sum);  // the sum is at most V, or not finite
    const int ahead = target - begin;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      float e[kPiece];
      unpack_again(raw[k], e);
      with_bias(e, k, e);
      for (int j = 0; j < kPiece; ++j) e[j] = fast_exp2(fmaf(e[j], kLog2E, -base)) * factor;
      const int hit = ahead - k * kNext;
      if (0 <= hit && hit < kPiece) {
        for (int j = 0; j < kPiece; ++j) e[j] -= hit == j ? scale : 0.0f;
      }
      for (int j = 0; j < kPiece; ++j) sums[k][j] += e[j];
      if (Eight) {
        const uint2 errors = {bytes_of(e, up, __NV_E5M2), bytes_of(e + 4, up, __NV_E5M2)};
        if (k < live) bytes[k * Threads] = errors;
      } else {
        const uint4 errors = pack_piece(e);  // not where the store is, which would make a branch of it
        if (k < live) *reinterpret_cast<uint4*>(at + k * kNext) = errors;
      }
      bring(k);
    }
  }
  if (!p.want_gradient) return;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k < live) store_piece(sums_at + k * kNext, sums[k]);
  }
}

// Threads of a block, by the length of a row; 0: rows are not for this kernel.
inline int threads_to_walk(int64_t ld) {
  const int64_t pieces = ld / kPiece;
  if (pieces <= kFewestWalk * kSlots / 2 || pieces > kWalkThreads * kSlots) return 0;
  int threads = kWalkThreads;
  while (threads > kFewestWalk && pieces <= threads / 2 * kSlots) threads /= 2;
  return threads;
}

// Of dynamic memory.
inline size_t walk_bytes(int threads, bool ahead) {
  return size_t{2} * kSlots * threads * sizeof(float4) + (ahead ? kSlots * threads * sizeof(uint4) : 0);
}

// The kernel for blocks of so many threads, ready to be launched.
template <bool Ahead, bool Eight>
auto walk_kernel_of(int threads) {
  return threads == 512   ? walk_rows_kernel<512, Ahead, Eight>
         : threads == 256 ? walk_rows_kernel<256, Ahead, Eight>
                          : walk_rows_kernel<128, Ahead, Eight>;
}
inline auto walk_kernel(int threads, bool ahead, bool eight) {
  const auto kernel = ahead   ? eight ? walk_kernel_of<true, true>(threads) : walk_kernel_of<true, false>(threads)
                      : eight ? walk_kernel_of<false, true>(threads)
                              : walk_kernel_of<false, false>(threads);
  const int bytes = static_cast<int>(walk_bytes(threads, ahead));
  NG_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  return kernel;
}

}  // namespace neurogen::cuda
