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
  int table_bytes;   // of shared memory before the resident blocks; 0 = tables are read from global memory
  int slots;         // resident blocks of a share at most
  bool local_state;  // v, w and spike counts live in shared memory, after the resident blocks
  bool graded;
  float max_spike;
  Dropout dropout;
};

// What a warp needs of its block of threads.
template <class Real>
struct BrainTables {
  const RegionView* regions;
  const StateView* states;
  const Term* terms;     // of this share
  const Real* resident;  // shared memory
};

// v and w of a lane's neurons in shared memory, in the lane's own order, and how often they spoke.
template <int Steps>
struct LocalState {
  float4 v[Steps][2][32], w[Steps][2][32];
  int4 count[32];
};

__device__ inline float emit(float u, const BrainCall& call) {
  if (!(u > 0)) return 0.0f;
  return call.graded ? fminf(1.0f + u, call.max_spike) : 1.0f;
}

// Four spikes for others to read. Never reordered behind a later wait, and never the bits that mean "not yet": no
// arithmetic gives them.
__device__ inline void speak4(bf16* to, float4 x) {
  uint2 raw;
  store4(reinterpret_cast<bf16*>(&raw), x);
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(raw.x), "r"(raw.y));
}
__device__ inline void speak4(float* to, float4 x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w));
}

template <class Real, int Steps>
__device__ void run_tile(const BrainCall& call, const BrainTables<Real>& tables, const BrainTile& tile, int token,
                         int stream0, int left, LocalState<Steps>* local) {
  constexpr int kAhead = Steps == 1   ? 8
                         : Steps == 2 ? 4
                                      : 1;  // terms whose spikes are asked for before the first is used
  const RegionView& region = tables.regions[tile.region];
  const StateView& state = tables.states[tile.region];
  const int lane = threadIdx.x % 32, n = region.n, neuron = tile.offset + lane_receiver();
  const int64_t row0 = int64_t{token} * call.streams + stream0;
  const bool last = token == call.tokens - 1, gated = region.gated;
  // Calls body(step, column of Sums, row of the call, stream) for the lane's rows.
  const auto for_rows = [&](auto body) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int own = i * kRows + lane_row() + c;
        if (own < left) body(i, c, row0 + own, stream0 + own);
      }
    }
  };
  const auto take4 = [&](Sums(&sums)[Steps], int i, int c, float4 x) {
    sums[i].x[0][c] = x.x, sums[i].x[1][c] = x.y, sums[i].x[2][c] = x.z, sums[i].x[3][c] = x.w;
  };
  const auto give4 = [&](const Sums(&sums)[Steps], int i, int c) {
    return float4{sums[i].x[0][c], sums[i].x[1][c], sums[i].x[2][c], sums[i].x[3][c]};
  };
  const auto cell_of = [&](void* array, int64_t row) { return static_cast<Real*>(array) + row * n + neuron; };

  Sums sums[Steps];           // first of the gates, then of the drives, then I
  Four<Real> kept[Steps][2];  // meanwhile: the embedding's share of the drive, then G
#pragma unroll
  for (int i = 0; i < Steps; ++i) zero(sums[i]);
  for_rows([&](int i, int c, int64_t row, int) {
    take4(sums, i, c, load4(cell_of(gated ? region.g : region.d, row)));
    if (gated) kept[i][c] = fetch4(cell_of(region.d, row));
  });
  int age[Steps] = {};
  if (call.resets) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const int own = i * kRows + lane / 4;
      if (own < left) age[i] = call.age[row0 + own];
    }
  }
  if (!last && lane % 4 == 0) {  // the next token's drive and gate come from the embedding's products: far away by now
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const int64_t at = (row0 + call.streams + min(i * kRows + lane / 4, left - 1)) * n + tile.offset;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const Real*>(region.d) + at));
      if (gated) asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const Real*>(region.g) + at));
    }
  }

  const auto close_gates = [&] {
    if (!gated) return;
    for_rows([&](int i, int c, int64_t row, int) {
      const auto gate = [](float sum) { return 2.0f / (1.0f + expf(-sum)); };
      const float4 x = give4(sums, i, c);
      const Four<Real> g = pack<Real>({gate(x.x), gate(x.y), gate(x.z), gate(x.w)});
      take4(sums, i, c, unpack<Real>(kept[i][c]));
      kept[i][c] = g;
      *reinterpret_cast<Four<Real>*>(cell_of(region.g, row)) = g;
    });
  };
  const auto close_drives = [&] {
    if (!gated) return;
    for_rows([&](int i, int c, int64_t row, int) {
      const float4 d = give4(sums, i, c), g = unpack<Real>(kept[i][c]);
      store4(cell_of(region.d, row), d);
      take4(sums, i, c, {d.x * g.x, d.y * g.y, d.z * g.z, d.w * g.w});
    });
  };
  const int drives = tile.terms[1], delayed = tile.terms[2], end = tile.terms[3];
  int at = tile.terms[0];
  if (at == drives) close_gates();
  if (at == delayed) close_drives();
  const auto source_of = [&](const Term& term, int i) {
    return static_cast<const Real*>(term.source) +
           (int64_t{token - term.delay} * call.streams + stream0 + i * kRows) * term.ld;
  };
  for (; at < end; at += kAhead) {
    Sources<Real> sources[kAhead][Steps];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (at + j >= end) break;
      const Term& term = tables.terms[at + j];
      if (token < term.delay) {  // spoken in an earlier call
        const int64_t row = int64_t{term.delay - 1 - token} * call.streams + stream0;
        const float* from = tables.states[term.region].spikes + row * term.ld + term.column;
#pragma unroll
        for (int i = 0; i < Steps; ++i) {
          sources[j][i].load_carried(from + int64_t{i * kRows} * term.ld, term.ld, left - i * kRows);
        }
      } else {
#pragma unroll
        for (int i = 0; i < Steps; ++i) sources[j][i].look(source_of(term, i), term.ld, left - i * kRows);
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (at + j >= end) break;
      const Term& term = tables.terms[at + j];
      if (token >= term.delay) {
#pragma unroll
        for (int i = 0; i < Steps; ++i) sources[j][i].settle(source_of(term, i), term.ld);
      }
      BlockWeights<Real> block;
      if (term.slot >= 0 && term.slot < call.slots) {
        block.load(tables.resident + term.slot * kBlockArea);
      } else {
        block.load(static_cast<const Real*>(call.weights) + int64_t{term.block} * kBlockArea);
      }
#pragma unroll
      for (int i = 0; i < Steps; ++i) {
        if (call.resets && term.delay) sources[j][i].mask(age[i] >= term.delay);
        multiply_add(sums[i], block, sources[j][i]);
      }
      if (at + j + 1 == drives) close_gates();
      if (at + j + 1 == delayed) close_drives();
    }
  }

  const float4 alphas = load4(region.alpha + neuron), rhos = load4(region.rho + neuron);
  const float4 as = load4(region.a + neuron), bs = load4(region.b + neuron);
  const float alpha[4] = {alphas.x, alphas.y, alphas.z, alphas.w}, rho[4] = {rhos.x, rhos.y, rhos.z, rhos.w};
  const float a[4] = {as.x, as.y, as.z, as.w}, b[4] = {bs.x, bs.y, bs.z, bs.w};
  bool sound = true;
  int spoken[4] = {};
  for_rows([&](int i, int c, int64_t row, int stream) {
    const int64_t cell = int64_t{stream} * n + neuron;
    float4 vs = {0, 0, 0, 0}, ws = vs;
    if (!(call.resets && call.resets[row])) {
      if (token == 0) {
        vs = load4(state.v + cell), ws = load4(state.w + cell);
      } else if (local) {
        vs = local->v[i][c][lane], ws = local->w[i][c][lane];
      } else {
        vs = load4(state.next_v + cell), ws = load4(state.next_w + cell);
      }
    }
    float v[4] = {vs.x, vs.y, vs.z, vs.w}, w[4] = {ws.x, ws.y, ws.z, ws.w}, u[4], s[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float before = rounded<Real>(emit(v[j] - 1.0f, call));
      const float current = sqrtf(1.0f - alpha[j] * alpha[j]) * sums[i].x[j][c];
      v[j] = alpha[j] * v[j] - (1.0f - alpha[j]) * w[j] + current - before;
      u[j] = v[j] - 1.0f;
      s[j] = rounded<Real>(emit(u[j], call));
      w[j] = rho[j] * w[j] + (1.0f - rho[j]) * (a[j] * v[j] + b[j] * s[j]);
      sound = sound && fabsf(v[j]) <= kLargestState && fabsf(w[j]) <= kLargestState;
      spoken[j] += u[j] > 0;
    }
    const int64_t place = row * n + neuron;
    speak4(static_cast<Real*>(region.s) + place, {s[0], s[1], s[2], s[3]});
    if (region.emitted != region.s) {
      const float4 mask = dropout_mask(call.dropout, tile.region, neuron, token, stream);
      speak4(static_cast<Real*>(region.emitted) + place, {s[0] * mask.x, s[1] * mask.y, s[2] * mask.z, s[3] * mask.w});
    }
    store4(static_cast<Real*>(region.u) + place, {u[0], u[1], u[2], u[3]});
    vs = {v[0], v[1], v[2], v[3]}, ws = {w[0], w[1], w[2], w[3]};
    if (local && !last) {
      local->v[i][c][lane] = vs, local->w[i][c][lane] = ws;
    } else {
      store4(state.next_v + cell, vs);
      store4(state.next_w + cell, ws);
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
