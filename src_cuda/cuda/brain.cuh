// One tile of 32 neurons, one token, a chunk of streams: the work of a warp in the brain launch.
//
//   d = bias + sum of drives,  G = 2 sigmoid(sum of gates),  I = G d + delayed
//   v = alpha v - (1-alpha) w + sqrt(1-alpha^2) I - s,  u = v - 1
//   s = H(u) min(1+u, max_spike),  w = rho w + (1-rho)(a v + b s)
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
  bool local_state;  // v, w and spike counts live in shared memory, after the resident blocks
  bool graded;
  float max_spike;
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

// v and w of a lane's neurons in shared memory, in the lane's own order, and how often they spoke.
template <int Steps>
struct LocalState {
  float4 v[Steps][2][32], w[Steps][2][32];
  int4 count[32];
};

__device__ inline float emit(float u, bool graded, float max_spike) {
  return u > 0 ? (graded ? fminf(1.0f + u, max_spike) : 1.0f) : 0.0f;
}

// 2 sigmoid(x). The fast form is good to 1e-6, far below a bf16 gate's rounding.
__device__ inline float gate_of(float x, bf16) { return __fdividef(2.0f, 1.0f + __expf(-x)); }
__device__ inline float gate_of(float x, float) { return 2.0f / (1.0f + expf(-x)); }

// Four spikes for others to read. Never reordered behind a later wait, and never the bits that mean "not yet": no
// arithmetic gives them.
__device__ inline void speak4(bf16* to, float4 x) {
  const Four<bf16> out = pack<bf16>(x);
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(out.raw.x), "r"(out.raw.y));
}
__device__ inline void speak4(float* to, float4 x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w));
}

// Plain: neither resets nor dropout, whose code would crowd the instruction cache.
template <class Real, int Steps, bool Plain>
__device__ void run_tile(const BrainCall& call, const BrainTables<Real>& tables, const BrainTile& tile, int token,
                         int stream0, int left, LocalState<Steps>* local) {
  constexpr int kAhead = Steps == 1 ? 6 : 3;  // terms whose spikes are asked for before the first is used
  const RegionView& region = tables.regions[tile.region];
  const int lane = threadIdx.x % 32, n = region.n, neuron = tile.offset + lane_receiver();
  const int64_t row0 = int64_t{token} * call.streams + stream0, first = (row0 + lane_row()) * n + neuron;
  const bool last = token == call.tokens - 1, gated = region.gated;
  Real *const d = static_cast<Real*>(region.d) + first, *const g = static_cast<Real*>(region.g) + first;
  // Calls body(step, column of Sums, offset from the lane's first row) for the lane's rows.
  const auto for_rows = [&](auto body) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (i * kRows + lane_row() + c < left) body(i, c, (i * kRows + c) * n);
      }
    }
  };

  Sums sums[Steps];           // first of the gates, then of the drives, then I
  Four<Real> kept[Steps][2];  // meanwhile: the embedding's share of the drive, then G
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
    kept[i][c] = fetch4(d + offset);
  });
  int age[Steps] = {};
  if (!Plain && call.resets) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const int own = i * kRows + lane / 4;
      if (own < left) age[i] = call.age[row0 + own];
    }
  }
  if (!last && lane % 4 < 2) {  // the next token's drive and gate were written long ago: far away by now
    const int64_t next = int64_t{call.streams} * n;
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      if (i * kRows + lane_row() >= left) break;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(d + next + i * kRows * n));
      if (gated) asm volatile("prefetch.global.L2 [%0];" ::"l"(g + next + i * kRows * n));
    }
  }

  const auto close_gates = [&] {
    for_rows([&](int i, int c, int offset) {
      const float4 x = give(i, c);
      const Four<Real> own =
          pack<Real>({gate_of(x.x, Real{}), gate_of(x.y, Real{}), gate_of(x.z, Real{}), gate_of(x.w, Real{})});
      take(i, c, unpack<Real>(kept[i][c]));
      kept[i][c] = own;
      *reinterpret_cast<Four<Real>*>(g + offset) = own;
    });
  };
  const auto close_drives = [&] {
    for_rows([&](int i, int c, int offset) {
      const float4 x = give(i, c), own = unpack<Real>(kept[i][c]);
      store4(d + offset, x);
      take(i, c, {x.x * own.x, x.y * own.y, x.z * own.z, x.w * own.w});
    });
  };
  const auto source_of = [&](const Term& term) {
    const bool carried = token < term.delay;  // spoken in an earlier call
    const Real* base = carried ? static_cast<const Real*>(tables.states[term.region].recent) + term.column
                               : static_cast<const Real*>(term.source);
    const int back = carried ? term.delay - 1 - token : token - term.delay;
    return base + (int64_t{back} * call.streams + stream0) * term.ld;
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
        const Term& term = tables.terms[at + j];
        const Real* from = source_of(term);
#pragma unroll
        for (int i = 0; i < Steps; ++i) sources[j][i].look(from + i * kRows * term.ld, term.ld, left - i * kRows);
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
#pragma unroll
        for (int i = 0; i < Steps; ++i) {
          if (__any_sync(0xffffffffu, sources[j][i].missing())) {
            sources[j][i].settle(source_of(term) + i * kRows * term.ld, term.ld, Steps > 1);
          }
          if (!Plain && call.resets && term.delay) sources[j][i].mask(age[i] >= term.delay);
          multiply_add(sums[i], block, sources[j][i]);
        }
      }
    }
    if (!gated) continue;
    if (kind == 0) close_gates();
    if (kind == 1) close_drives();
  }

  const StateView& state = tables.states[tile.region];
  const float4 alphas = load4(region.alpha + neuron), gains = load4(region.gain + neuron);
  const float4 rhos = load4(region.rho + neuron), as = load4(region.scaled_a + neuron);
  const float4 bs = load4(region.scaled_b + neuron);
  const float alpha[4] = {alphas.x, alphas.y, alphas.z, alphas.w}, gain[4] = {gains.x, gains.y, gains.z, gains.w};
  const float rho[4] = {rhos.x, rhos.y, rhos.z, rhos.w}, a[4] = {as.x, as.y, as.z, as.w};
  const float b[4] = {bs.x, bs.y, bs.z, bs.w};
  const int64_t cell0 = int64_t{stream0 + lane_row()} * n + neuron;
  Real *const s_at = static_cast<Real*>(region.s) + first, *const u_at = static_cast<Real*>(region.u) + first;
  bool sound = true;
  int spoken[4] = {};
  for_rows([&](int i, int c, int offset) {
    float4 vs, ws;
    if (token == 0) {
      vs = load4(state.v + cell0 + offset), ws = load4(state.w + cell0 + offset);
    } else if (local) {
      vs = local->v[i][c][lane], ws = local->w[i][c][lane];
    } else {
      vs = load4(state.next_v + cell0 + offset), ws = load4(state.next_w + cell0 + offset);
    }
    if (!Plain && call.resets && call.resets[row0 + i * kRows + lane_row() + c]) vs = ws = float4{0, 0, 0, 0};
    float v[4] = {vs.x, vs.y, vs.z, vs.w}, w[4] = {ws.x, ws.y, ws.z, ws.w}, u[4], s[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float before = rounded<Real>(emit(v[j] - 1.0f, call.graded, call.max_spike));
      const float leak = w[j] - alpha[j] * w[j];
      v[j] = fmaf(alpha[j], v[j], fmaf(gain[j], sums[i].x[j][c], -leak)) - before;
      u[j] = v[j] - 1.0f;
      s[j] = rounded<Real>(emit(u[j], call.graded, call.max_spike));
      w[j] = fmaf(rho[j], w[j], fmaf(a[j], v[j], b[j] * s[j]));
      spoken[j] += u[j] > 0;
    }
    speak4(s_at + offset, {s[0], s[1], s[2], s[3]});
    if (!Plain && region.emitted != region.s) {
      const float4 mask = dropout_mask(call.dropout, tile.region, neuron, token, stream0 + i * kRows + lane_row() + c);
      speak4(static_cast<Real*>(region.emitted) + first + offset,
             {s[0] * mask.x, s[1] * mask.y, s[2] * mask.z, s[3] * mask.w});
    }
    store4(u_at + offset, {u[0], u[1], u[2], u[3]});
    vs = {v[0], v[1], v[2], v[3]}, ws = {w[0], w[1], w[2], w[3]};
    if (local && !last) {
      local->v[i][c][lane] = vs, local->w[i][c][lane] = ws;
    } else {
      store4(state.next_v + cell0 + offset, vs);
      store4(state.next_w + cell0 + offset, ws);
    }
    if (last) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(fabsf(v[j]) <= kLargestState && fabsf(w[j]) <= kLargestState)) sound = false;
      }
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
    if (lane % 4 == 0 && spoken[j]) atomicAdd(region.spike_count + neuron + j, spoken[j]);
  }
}

}  // namespace neurogen::cuda
