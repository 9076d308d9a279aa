// One tile of 32 neurons, one token, a chunk of streams: the work of a warp in the brain launch.
//
//   d = bias + sum of drives,  G = 2 sigmoid(sum of gates),  I = G d + delayed
//   v = alpha v - (1-alpha) w + sqrt(1-alpha^2) I - s,  u = v - 1
//   s = H(u) min(1+u, max_spike),  w = rho w + (1-rho)(a v + b s)
//
// Between two tokens a cell keeps past = alpha v - (1-alpha) w - s and w, so that v = past + sqrt(1-alpha^2) I.
//
// Spikes carry their own readiness. Before the launch every spike of the call is set to a NaN with all bits set;
// whoever needs one reads until it is something else, and each is written once. So no barrier orders the launch, nobody
// waits for what it does not need, and no fence holds up the other stores. Cost: 2 bytes a spike of memory set
// beforehand.
#pragma once

#include "block_product.cuh"
#include "dropout.cuh"
#include "model.h"

namespace neurogen::cuda {

constexpr float kLargestState = 1e19f;  // a larger v or w is not fit to be kept

struct BrainCall {
  const RegionView* regions;
  const StateView* states;
  const BrainTile* tiles;
  const Term* terms;
  const Share* shares;
  const int32_t* resident;  // blocks that stay in shared memory
  const void* weights;      // Real [blocks, 32, 32]
  const uint8_t* resets;    // null = none
  const int32_t* age;
  Verdict* verdict;
  int streams, tokens, levels, stream_group, region_count, base_grid;
  int table_bytes;   // of shared memory before the resident blocks
  int slots;         // resident blocks of a share at most
  bool local_state;  // past, w and spike counts live in shared memory, after the resident blocks
  float max_spike;   // 1 where spikes are binary
  Dropout dropout;
};

// What a warp needs of its block of threads, all in shared memory.
template <class Real>
struct BrainTables {
  const RegionView* regions;
  const StateView* states;
  const BrainTile* tiles;
  const Term* terms;     // of this share
  const Real* resident;  // blocks
};

// past and w of a lane's neurons in shared memory, in the lane's own order, and how often they spoke.
template <int Cells>
struct LocalState {
  float4 past[Cells][32], w[Cells][32];
  int4 count[32];
};

// min(1+u, 1) = 1 for u > 0: a binary spike.
__device__ inline float emit(float u, float max_spike) { return u > 0 ? fminf(1.0f + u, max_spike) : 0.0f; }

__device__ inline float past_of(float v, float w, float s, float alpha) {
  return fmaf(alpha, v, -s) - fmaf(-alpha, w, w);
}

// 2 sigmoid(x). The fast form is good to 1e-6, far below a bf16 gate's rounding.
__device__ inline float gate_of(float x, bf16) { return __fdividef(2.0f, 1.0f + __expf(-x)); }
__device__ inline float gate_of(float x, float) { return 2.0f / (1.0f + expf(-x)); }

// Four spikes for others to read, eight bytes at a time. Never reordered behind a later wait, and never the bits that
// mean "not yet": no arithmetic gives them.
__device__ inline void speak4(bf16* to, float4 x) {
  const Four<bf16> out = pack<bf16>(x);
  const uint64_t bits = uint64_t{out.raw.y} << 32 | out.raw.x;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits));
}
__device__ inline void speak4(float* to, float4 x) {
  const auto two = [](float low, float high) { return uint64_t{__float_as_uint(high)} << 32 | __float_as_uint(low); };
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1,%2};" ::"l"(to), "l"(two(x.x, x.y)), "l"(two(x.z, x.w)));
}

__device__ inline void as_array(float (&to)[4], float4 x) { to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w; }

// Rows beyond `left` are computed as well, from spare rows or those of the next token, and not written.
// Plain: neither resets nor dropout, whose code would crowd the instruction cache.
template <class Real, int Steps, int Columns, bool Plain>
__device__ void run_tile(const BrainCall& call, const BrainTables<Real>& tables, const BrainTile& tile, int token,
                         int stream0, int left, LocalState<Steps * Columns>* local) {
  constexpr int kAhead = Steps == 1 ? 6 : 3;  // terms whose spikes are asked for before the first is used
  const int lane = threadIdx.x % 32;
  const int64_t row0 = int64_t{token} * call.streams + stream0, first = (row0 + lane_row()) * kBlock + lane_receiver();
  const bool last = token == call.tokens - 1, gated = tile.gated;
  Real *const d = static_cast<Real*>(tile.d) + first, *const g = static_cast<Real*>(tile.g) + first;
  const auto own = [&](int i, int c) { return i * kRows + lane_row() + c < left; };
  // Calls body(step, column of Sums, offset from the lane's first row) for the lane's rows.
  const auto for_rows = [&](auto body) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) body(i, c, i * kStepValues + c * kBlock);
    }
  };

  Sums sums[Steps];                 // first of the gates, then of the drives, then I
  Four<Real> kept[Steps][Columns];  // meanwhile: the embedding's share of the drive, then G
  const auto take = [&](int i, int c, float4 x) {
    sums[i].x[0][c] = x.x, sums[i].x[1][c] = x.y, sums[i].x[2][c] = x.z, sums[i].x[3][c] = x.w;
  };
  const auto give = [&](int i, int c) {
    return float4{sums[i].x[0][c], sums[i].x[1][c], sums[i].x[2][c], sums[i].x[3][c]};
  };
#pragma unroll
  for (int i = 0; i < Steps; ++i) zero(sums[i]);
  for_rows([&](int i, int c, int offset) {
    take(i, c, load4((gated ? g : d) + offset));
    if (gated) kept[i][c] = fetch4(d + offset);
  });
  int age[Steps] = {};
  if (!Plain && call.resets) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const int row = i * kRows + lane / 4;
      if (row < left) age[i] = call.age[row0 + row];
    }
  }
  // The next token's drive and gate were written long ago: far away by now. 128 bytes a lane.
  constexpr int kLine = 128 / sizeof(Real), kLines = (Columns == 1 ? 1 : Steps * kRows) * kBlock / kLine;
  if (!last && lane < max(kLines, 1)) {
    const int64_t next = (row0 + call.streams) * kBlock + lane * kLine;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const Real*>(tile.d) + next));
    if (gated) asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const Real*>(tile.g) + next));
  }

  const auto close_gates = [&] {
    for_rows([&](int i, int c, int offset) {
      const float4 x = give(i, c);
      const Four<Real> gate =
          pack<Real>({gate_of(x.x, Real{}), gate_of(x.y, Real{}), gate_of(x.z, Real{}), gate_of(x.w, Real{})});
      take(i, c, unpack<Real>(kept[i][c]));
      kept[i][c] = gate;
      if (own(i, c)) *reinterpret_cast<Four<Real>*>(g + offset) = gate;
    });
  };
  const auto close_drives = [&] {
    for_rows([&](int i, int c, int offset) {
      const float4 x = give(i, c), gate = unpack<Real>(kept[i][c]);
      if (own(i, c)) store4(d + offset, x);
      take(i, c, {x.x * gate.x, x.y * gate.y, x.z * gate.z, x.w * gate.w});
    });
  };
  const auto source_of = [&](const Term& term) {
    int64_t row = int64_t{token - term.delay} * call.streams + stream0;
    const Real* base = static_cast<const Real*>(term.source);
    if (row < stream0) {  // spoken in an earlier call: [K, S] rows, newest first
      base = static_cast<const Real*>(tables.states[term.region].recent);
      row = (int64_t{term.panel} * tables.regions[term.region].history + (term.delay - 1 - token)) * call.streams +
            stream0;
    }
    return base + row * kBlock;
  };
  // Kinds in turn: gates, drives, delayed. One copy of the code, run three times.
#pragma unroll 1
  for (int kind = gated ? 0 : 1; kind < 3; ++kind) {
#pragma unroll 1
    for (int at = tile.terms[kind]; at < tile.terms[kind + 1]; at += kAhead) {
      const int count = min(kAhead, tile.terms[kind + 1] - at);
      Sources<Real> sources[kAhead][Steps];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (j >= count) break;
        const Real* from = source_of(tables.terms[at + j]);
#pragma unroll
        for (int i = 0; i < Steps; ++i) sources[j][i].look(from + i * kStepValues, left - i * kRows);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (j >= count) break;
        const Term& term = tables.terms[at + j];
        BlockWeights<Real> block;
        if (term.slot < call.slots) {
          block.load(tables.resident + term.slot * kBlockArea);
        } else {
          block.load(static_cast<const Real*>(call.weights) + int64_t{term.block} * kBlockArea);
        }
        bool missing = false;
#pragma unroll
        for (int i = 0; i < Steps; ++i) missing |= sources[j][i].missing();
        if (__any_sync(0xffffffffu, missing)) {
          const Real* from = source_of(term);
#pragma unroll
          for (int i = 0; i < Steps; ++i) sources[j][i].settle(from + i * kStepValues, Steps > 1);
        }
#pragma unroll
        for (int i = 0; i < Steps; ++i) {
          if (!Plain && call.resets && term.delay) sources[j][i].mask(age[i] >= term.delay);
          multiply_add(sums[i], block, sources[j][i]);
        }
      }
    }
    if (!gated) continue;
    if (kind == 0) close_gates();
    if (kind == 1) close_drives();
  }

  float alpha[4], gain[4], rho[4], a[4], b[4];
  const float* constants = tile.constants + lane_receiver();
  as_array(alpha, load4(constants)), as_array(gain, load4(constants + kBlock));
  as_array(rho, load4(constants + 2 * kBlock)), as_array(a, load4(constants + 3 * kBlock));
  as_array(b, load4(constants + 4 * kBlock));
  Real *const s_at = static_cast<Real*>(tile.s) + first, *const u_at = static_cast<Real*>(tile.u) + first;
  const auto spike_of = [&](float v) { return rounded<Real>(emit(v - 1.0f, call.max_spike)); };
  bool sound = true;
  int spoken[4] = {};
  for_rows([&](int i, int c, int offset) {
    float past[4], w[4], v[4], u[4], s[4];
    const StateView& state = tables.states[tile.region];
    const int stream = stream0 + min(i * kRows + lane_row() + c, left - 1), at = (i * Columns + c);
    const int64_t cell = int64_t{stream} * tables.regions[tile.region].n + tile.offset + lane_receiver();
    if (local && token) {
      as_array(past, local->past[at][lane]), as_array(w, local->w[at][lane]);
    } else {
      as_array(v, load4((token ? state.next_v : state.v) + cell));
      as_array(w, load4((token ? state.next_w : state.w) + cell));
#pragma unroll
      for (int j = 0; j < 4; ++j) past[j] = past_of(v[j], w[j], spike_of(v[j]), alpha[j]);
    }
    if (!Plain && call.resets && call.resets[int64_t{token} * call.streams + stream]) {
      as_array(past, float4{0, 0, 0, 0}), as_array(w, float4{0, 0, 0, 0});
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = fmaf(gain[j], sums[i].x[j][c], past[j]);
      u[j] = v[j] - 1.0f;
      s[j] = spike_of(v[j]);
      w[j] = fmaf(rho[j], w[j], fmaf(a[j], v[j], b[j] * s[j]));
      if (own(i, c)) spoken[j] += u[j] > 0;
    }
    if (own(i, c)) {
      speak4(s_at + offset, {s[0], s[1], s[2], s[3]});
      if (!Plain && tile.emitted != tile.s) {
        const float4 mask = dropout_mask(call.dropout, tile.region, tile.offset + lane_receiver(), token, stream);
        speak4(static_cast<Real*>(tile.emitted) + first + offset,
               {s[0] * mask.x, s[1] * mask.y, s[2] * mask.z, s[3] * mask.w});
      }
      store4(u_at + offset, {u[0], u[1], u[2], u[3]});
    }
    if (local && !last) {
#pragma unroll
      for (int j = 0; j < 4; ++j) past[j] = past_of(v[j], w[j], s[j], alpha[j]);
      local->past[at][lane] = {past[0], past[1], past[2], past[3]};
      local->w[at][lane] = {w[0], w[1], w[2], w[3]};
    } else if (own(i, c)) {
      store4(state.next_v + cell, {v[0], v[1], v[2], v[3]});
      store4(state.next_w + cell, {w[0], w[1], w[2], w[3]});
#pragma unroll
      for (int j = 0; j < 4; ++j) sound &= fabsf(v[j]) <= kLargestState && fabsf(w[j]) <= kLargestState;
    }
  });
  if (last && !sound) atomicOr(&call.verdict->state_not_finite, 1);
  if (!local) return;
  if (token) {
    const int4 before = local->count[lane];
    spoken[0] += before.x, spoken[1] += before.y, spoken[2] += before.z, spoken[3] += before.w;
  }
  local->count[lane] = {spoken[0], spoken[1], spoken[2], spoken[3]};
  if (!last) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // whole numbers: exact in any order
    spoken[j] += __shfl_xor_sync(0xffffffffu, spoken[j], 1);
    spoken[j] += __shfl_xor_sync(0xffffffffu, spoken[j], 2);
    if (lane % 4 == 0 && spoken[j])
      atomicAdd(tables.regions[tile.region].spike_count + tile.offset + lane_receiver() + j, spoken[j]);
  }
}

}  // namespace neurogen::cuda
