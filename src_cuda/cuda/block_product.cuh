// A warp times one 32 x 32 block of weights: 32 receivers x 8 rows (streams or tokens) at a time.
//
// Lane (g, t) = (lane / 4, lane % 4) holds receivers 4g .. 4g+3 of rows 2t and 2t+1. That is how the tensor core's
// m16n8k16 product leaves its result, if row r of its 16-row tiles i = 0, 1 stands for receiver 4*(r % 8) + 2i + r / 8;
// the four receivers of a lane are then neighbours in memory. The order of the 32 sources inside a product is free as
// long as both operands agree on it: lane t reads sources 8t .. 8t+7 with one 16-byte load.
//
// Sources lie in panels: 32 columns, row after row, so eight rows are 512 contiguous bytes in bf16.
// bf16 blocks are stored with their rows in the order of these loads: row 8j + g of the stored block is receiver 4g +
// j, so a warp's load is 512 contiguous bytes. float blocks are stored plainly, [receiver][source].
#pragma once

#include "neurogen/spec.h"
#include "numbers.cuh"

namespace neurogen::cuda {

constexpr int kRows = 8;                     // rows of one step
constexpr int kStepValues = kRows * kBlock;  // of a panel

__device__ inline int lane_receiver() { return threadIdx.x % 32 / 4 * 4; }
__device__ inline int lane_row() { return threadIdx.x % 4 * 2; }

// Where receiver r of a block is stored.
template <class Real>
__host__ __device__ constexpr int stored_row(int r) {
  return sizeof(Real) == 2 ? r % 4 * 8 + r / 4 : r;
}

// Sums of one step: x[i][c] = receiver 4g+i of row 2t+c.
struct Sums {
  float x[4][2];
};

__device__ inline void zero(Sums& sums) {
  for (int i = 0; i < 4; ++i) sums.x[i][0] = sums.x[i][1] = 0.0f;
}

// The weights of one block as a lane needs them.
template <class Real>
struct BlockWeights;

template <>
struct BlockWeights<bf16> {
  uint4 row[4];
  __device__ void load(const void* block) {
    const uint4* from = static_cast<const uint4*>(block) + threadIdx.x % 32;
    for (int j = 0; j < 4; ++j) row[j] = from[j * 32];
  }
};

template <>
struct BlockWeights<float> {
  const float* at;
  __device__ void load(const void* block) { at = static_cast<const float*>(block) + lane_receiver() * 32; }
};

// Eight rows of 32 sources as a lane needs them. load() takes what is there; look() and what follows it read spikes
// that other blocks of threads may still have to write (brain.cuh).
template <class Real>
struct Sources;

// Not written yet: all bits set, NaNs that no arithmetic gives. Spikes are written and read eight bytes at a time
// (speak4, peek), so one word of the eight bytes tells.
__device__ inline bool absent(const uint4& raw) { return raw.x == ~0u || raw.z == ~0u; }

// 16 bytes as they are in the L2 cache at this moment.
__device__ inline uint4 peek(const void* from) {
  uint64_t low, high;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0,%1}, [%2];" : "=l"(low), "=l"(high) : "l"(from));
  return {static_cast<unsigned>(low), static_cast<unsigned>(low >> 32), static_cast<unsigned>(high),
          static_cast<unsigned>(high >> 32)};
}

template <>
struct Sources<bf16> {
  uint4 raw;  // sources 8t .. 8t+7 of row g
  static __device__ const bf16* own(const bf16* from) { return from + threadIdx.x % 32 * 8; }
  // from: row 0 of the eight; rows beyond `rows` count as zero.
  __device__ void load(const bf16* from, int rows) {
    raw = uint4{0, 0, 0, 0};
    if (static_cast<int>(threadIdx.x % 32 / 4) < rows) raw = __ldcg(reinterpret_cast<const uint4*>(own(from)));
  }
  __device__ void look(const bf16* from, int rows) {
    raw = uint4{0, 0, 0, 0};
    if (static_cast<int>(threadIdx.x % 32 / 4) < rows) raw = peek(own(from));
  }
  __device__ bool missing() const { return absent(raw); }
  __device__ void look_again(const bf16* from) {
    if (missing()) raw = peek(own(from));
  }
  // The same, from: own() of row 0. Where row g does not count, what is there stays.
  __device__ void ask(const bf16* from, bool counts) {
    if (counts) raw = peek(from);
  }
  // Silences row g where `keep` is false (each lane passes the flag of its own row g).
  __device__ void mask(bool keep) {
    if (!keep) raw = uint4{0, 0, 0, 0};
  }
};

template <>
struct Sources<float> {
  const float* at[2];  // rows 2t and 2t+1, null = zero
  bool mine;           // row g counts
  __device__ void load(const float* from, int rows) {
    for (int c = 0; c < 2; ++c) at[c] = lane_row() + c < rows ? from + (lane_row() + c) * kBlock : nullptr;
    mine = static_cast<int>(threadIdx.x % 32 / 4) < rows;
  }
  static __device__ const float* own(const float* from) { return from; }
  __device__ void ask(const float* from, bool counts) {
    for (int c = 0; c < 2; ++c) {  // whether rows 2t and 2t+1 count is known in the lanes of those rows
      const bool there = __shfl_sync(0xffffffffu, static_cast<int>(counts), (lane_row() + c) * 4);
      at[c] = there ? from + (lane_row() + c) * kBlock : nullptr;
    }
    mine = counts;
  }
  // The lanes of row g wait for it: 8t .. 8t+7 each.
  __device__ void settle(const float* from) {
    const float* own = from + threadIdx.x % 32 * 8;
    while (__any_sync(0xffffffffu, mine && (absent(peek(own)) || absent(peek(own + 4))))) {
    }
  }
  __device__ void mask(bool keep) {  // the flag of row g sits in lanes 4g .. 4g+3
    for (int c = 0; c < 2; ++c) {
      if (!__shfl_sync(0xffffffffu, static_cast<int>(keep), (lane_row() + c) * 4)) at[c] = nullptr;
    }
  }
};

__device__ inline void tensor_product(float& c0, float& c1, float& c2, float& c3, unsigned a0, unsigned a1, unsigned a2,
                                      unsigned a3, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A bf16 block as the four products of the tensor core need it, operand after operand: no register moves before a
// product, which is half the instructions of one. That is how blocks stay in shared memory.
struct KeptBlock {
  uint4 operand[4];
  __device__ void load(const void* block) {
    const uint4* from = static_cast<const uint4*>(block) + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[i] = from[i * 32];
  }
  KeptBlock() = default;
  __device__ explicit KeptBlock(const BlockWeights<bf16>& w) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 &even = w.row[2 * i], &odd = w.row[2 * i + 1];
      operand[i] = uint4{even.x, odd.x, even.y, odd.y}, operand[2 + i] = uint4{even.z, odd.z, even.w, odd.w};
    }
  }
};

// Part i of 0 .. 63 of keeping a block: to and block are aligned to 16 bytes.
constexpr int kKeepParts = 64;
__device__ inline void keep_block(uint4* to, const uint4* block, int i) {
  const int pair = i / 32, lane = i % 32;
  const uint4 even = block[pair * 64 + lane], odd = block[pair * 64 + 32 + lane];
  to[pair * 32 + lane] = uint4{even.x, odd.x, even.y, odd.y};
  to[64 + pair * 32 + lane] = uint4{even.z, odd.z, even.w, odd.w};
}

// Where word i (two values) of a kept block lies in the stored one.
__host__ __device__ constexpr int stored_word(int i) {
  const int operand = i / 128, lane = i / 4 % 32, part = i % 4;
  return ((operand % 2 * 2 + part % 2) * 32 + lane) * 4 + operand / 2 * 2 + part / 2;
}

// sums += block * sources (16 bytes a lane, as in Sources<bf16>).
__device__ inline void multiply_add(Sums& sums, const KeptBlock& block, const uint4& source) {
  float (&x)[4][2] = sums.x;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned low = half ? source.z : source.x, high = half ? source.w : source.y;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint4& part = block.operand[half * 2 + i / 2];
      tensor_product(x[i][0], x[i][1], x[i + 1][0], x[i + 1][1], part.x, part.y, part.z, part.w, low, high);
    }
  }
}

// sums += block * sources.
__device__ inline void multiply_add(Sums& sums, const KeptBlock& block, const Sources<bf16>& s) {
  multiply_add(sums, block, s.raw);
}
__device__ inline void multiply_add(Sums& sums, const BlockWeights<bf16>& w, const Sources<bf16>& s) {
  multiply_add(sums, KeptBlock(w), s.raw);
}

__device__ inline void multiply_add(Sums& sums, const BlockWeights<float>& w, const Sources<float>& s) {
  for (int c = 0; c < 2; ++c) {
    if (!s.at[c]) continue;
#pragma unroll
    for (int k = 0; k < 32; k += 4) {
      const float4 source = __ldcg(reinterpret_cast<const float4*>(s.at[c] + k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 weight = load4(w.at + i * 32 + k);
        float sum = sums.x[i][c];
        sum = fmaf(weight.x, source.x, sum);
        sum = fmaf(weight.y, source.y, sum);
        sum = fmaf(weight.z, source.z, sum);
        sums.x[i][c] = fmaf(weight.w, source.w, sum);
      }
    }
  }
}

}  // namespace neurogen::cuda
