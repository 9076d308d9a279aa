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

#include <cuda_pipeline.h>

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
  int longest_delay;  // of a projection
  int table_bytes;    // of shared memory before the resident blocks
  bool near;          // constants of the share's neurons are among them
  int slots;          // resident blocks of a share at most
  bool local_state;   // past, w and spike counts stay in shared memory, after the resident blocks; else there is room
                      // for what a warp works on, v and w are in global memory, and count_spikes_kernel counts
  bool prefetch;      // weights that are not resident do not stay in the L2 cache either
  bool embedded;      // d and g hold the embedding's share; else its blocks are among the terms
  float max_spike;    // 1 where spikes are binary
  uint32_t sign;      // of every spike of the call (wide_brain.cu): 0, or the sign bits of two bf16
  Dropout dropout;
};

// A term in shared memory.
struct NearTerm {
  const void* source;  // row 0 of a panel
  int32_t where;       // of its block: bytes from the first resident one, or ~number where it is streamed
  int32_t delay;
};

// What a warp needs of its block of threads, all in shared memory but `far`.
template <class Real>
struct BrainTables {
  const RegionView* regions;
  const StateView* states;
  const BrainTile* tiles;
  const NearTerm* terms;  // of this share
  const char* resident;   // blocks; bf16: as KeptBlock has them
  const Term* far;        // the same terms
};

// sums += a term's block * sources. Two ways, so that resident blocks reach the tensor core without register moves.
template <int Steps>
__device__ inline void multiply_term(Sums (&sums)[Steps], int where, const BrainTables<bf16>& tables,
                                     const void* weights, const Sources<bf16> (&sources)[Steps]) {
  if (where >= 0) {
    KeptBlock block;
    block.load(tables.resident + where);
#pragma unroll
    for (int i = 0; i < Steps; ++i) multiply_add(sums[i], block, sources[i]);
  } else {
    BlockWeights<bf16> block;
    block.load(static_cast<const bf16*>(weights) + int64_t{~where} * kBlockArea);
#pragma unroll
    for (int i = 0; i < Steps; ++i) multiply_add(sums[i], block, sources[i]);
  }
}
template <int Steps>
__device__ inline void multiply_term(Sums (&sums)[Steps], int where, const BrainTables<float>& tables,
                                     const void* weights, const Sources<float> (&sources)[Steps]) {
  BlockWeights<float> block;
  block.load(where < 0 ? static_cast<const float*>(weights) + int64_t{~where} * kBlockArea
                       : reinterpret_cast<const float*>(tables.resident + where));
#pragma unroll
  for (int i = 0; i < Steps; ++i) multiply_add(sums[i], block, sources[i]);
}

// past and w of a lane's neurons in shared memory, in the lane's own order, and how often they spoke.
template <int Cells>
struct LocalState {
  float4 past[Cells][32], w[Cells][32];
  int4 count[32];
  int turn, unused[3];  // tokens that are done, see pass_on(); the rest of 16 bytes
};

// Of v = 1 + u; min(v, 1) = 1 for u > 0, a binary spike. A selection, where the compiler would make branches.
__device__ inline float emit(float v, float max_spike) {
  float out;
  asm("{.reg .pred above; setp.gt.f32 above, %1, 0f3F800000; selp.f32 %0, %2, 0f00000000, above;}"
      : "=f"(out)
      : "f"(v), "f"(fminf(v, max_spike)));
  return out;
}

__device__ inline float past_of(float v, float w, float s, float alpha) {
  return fmaf(alpha - 1.0f, w, fmaf(alpha, v, -s));
}

// 2 sigmoid(x) = 1 + tanh(x / 2). The fast form is good to 2^-11, an eighth of a bf16 gate's rounding.
__device__ inline float gate_of(float x, bf16) {
  float out;
  asm("tanh.approx.f32 %0, %1;" : "=f"(out) : "f"(0.5f * x));
  return 1.0f + out;
}
__device__ inline float gate_of(float x, float) { return 2.0f / (1.0f + expf(-x)); }

// Four spikes for others to read, eight bytes at a time. Never reordered behind a later wait, and never the bits that
// mean "not yet": no arithmetic gives them.
__device__ inline void speak4(bf16* to, const Four<bf16>& x) {
  const uint64_t bits = uint64_t{x.raw.y} << 32 | x.raw.x;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits));
}
__device__ inline void speak4(float* to, const Four<float>& x) {
  const auto two = [](float low, float high) { return uint64_t{__float_as_uint(high)} << 32 | __float_as_uint(low); };
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1,%2};" ::"l"(to), "l"(two(x.raw.x, x.raw.y)),
               "l"(two(x.raw.z, x.raw.w)));
}

__device__ inline void as_array(float (&to)[4], float4 x) { to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w; }

// Waits until all that was asked for is there, asking for what is missing together; patient: leaves the memory to
// others between two looks. from: what this lane reads of step 0.
template <int Ahead, int Steps>
__device__ void settle(Sources<bf16> (&sources)[Ahead][Steps], const bf16* const (&from)[Ahead], int, bool patient) {
  const auto missing = [&] {  // one comparison for all: no other word is as large
    unsigned largest = 0;
#pragma unroll
    for (int j = 0; j < Ahead; ++j) {
#pragma unroll
      for (int i = 0; i < Steps; ++i) largest = max(largest, max(sources[j][i].raw.x, sources[j][i].raw.z));
    }
    return largest == ~0u;
  };
#pragma unroll 1
  while (__any_sync(0xffffffffu, missing())) {
    if (patient) __nanosleep(100);
#pragma unroll
    for (int j = 0; j < Ahead; ++j) {
#pragma unroll
      for (int i = 0; i < Steps; ++i) {
        if (absent(sources[j][i].raw)) sources[j][i].raw = peek(from[j] + i * kStepValues);
      }
    }
  }
}
template <int Ahead, int Steps>
__device__ void settle(Sources<float> (&sources)[Ahead][Steps], const float* const (&from)[Ahead], int count, bool) {
#pragma unroll
  for (int j = 0; j < Ahead; ++j) {
    for (int i = 0; i < Steps && j < count; ++i) sources[j][i].settle(from[j] + i * kStepValues);
  }
}

// Spikes of a lane's receivers, counted without a branch: two 16-bit counters a word.
struct Spoken {
  uint32_t pair[2] = {0, 0};
  __device__ void add(const Four<bf16>& s) {
    const auto two = [](uint32_t raw) {
      return __hne2_mask(reinterpret_cast<const __nv_bfloat162&>(raw), __float2bfloat162_rn(0.0f)) & 0x00010001u;
    };
    pair[0] += two(s.raw.x), pair[1] += two(s.raw.y);
  }
  __device__ void add(const Four<float>& s) {
    pair[0] += (s.raw.x > 0) + ((s.raw.y > 0) << 16), pair[1] += (s.raw.z > 0) + ((s.raw.w > 0) << 16);
  }
  __device__ int4 plus(int4 x) const {
    return {x.x + static_cast<int>(pair[0] & 0xffff), x.y + static_cast<int>(pair[0] >> 16),
            x.z + static_cast<int>(pair[1] & 0xffff), x.w + static_cast<int>(pair[1] >> 16)};
  }
};

// v and w of earlier tokens on their way from memory to where run_tile() keeps past and w.
template <int Steps, int Columns>
__device__ void recall(const BrainCall& call, const StateView& state, int64_t n, int neuron, int token, int stream0,
                       int left, LocalState<Steps * Columns>& local) {
  const int lane = threadIdx.x % 32;
  local.count[lane] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < Steps; ++i) {
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      const int stream = stream0 + min(i * kRows + lane_row() + c, left - 1), at = i * Columns + c;
      const int64_t cell = stream * n + neuron;
      __pipeline_memcpy_async(&local.past[at][lane], (token ? state.next_v : state.v) + cell, sizeof(float4));
      __pipeline_memcpy_async(&local.w[at][lane], (token ? state.next_w : state.w) + cell, sizeof(float4));
    }
  }
  __pipeline_commit();
}

// An item goes from warp to warp, a token each, so that all warps have the same share of the work: `turn` counts the
// tokens that are done, and the warp that has the next one waits for it.
__device__ inline void pass_on(int& turn, int next) {
  __syncwarp();
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(&turn));
  if (threadIdx.x % 32 == 0) asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(at), "r"(next) : "memory");
}
__device__ inline void take_over(const int& turn, int own) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(&turn));
  int now;
  do {
    asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(now) : "r"(at) : "memory");
  } while (now != own);
  __syncwarp();
}

// Brings all weights of a tile on their way at once, where they come from far away.
template <class Real>
__device__ void prefetch_weights(const BrainCall& call, const BrainTables<Real>& tables, const BrainTile& tile) {
  constexpr int kLines = kBlockArea * sizeof(Real) / 128;
  const int lane = threadIdx.x % 32;
  for (int i = tile.terms[0] * kLines + lane; i < tile.terms[3] * kLines; i += 32) {
    const int where = tables.terms[i / kLines].where;
    if (where >= 0) continue;
    const char* line = static_cast<const char*>(call.weights) + (int64_t{~where} * kLines + i % kLines) * 128;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
  }
}

// Rows beyond `left` are computed as well, from spare rows or those of the next token, and not written.
// Plain: neither resets nor dropout, whose code would crowd the instruction cache.
template <class Real, int Steps, int Columns, bool Plain>
__device__ void run_tile(const BrainCall& call, const BrainTables<Real>& tables, const BrainTile& tile, int token,
                         int stream0, int left, LocalState<Steps * Columns>& local) {
  constexpr int kAhead = Steps == 1 ? 6 : 3;  // terms whose spikes are asked for before the first is used
  const int lane = threadIdx.x % 32;
  const int row0 = token * call.streams + stream0, first = (row0 + lane_row()) * kBlock + lane_receiver();
  const bool last = token == call.tokens - 1, gated = tile.gated;
  Real *const d = in_global<Real>(tile.d) + first, *const g = in_global<Real>(tile.g) + first;
  bool own[Steps][Columns];
#pragma unroll
  for (int i = 0; i < Steps; ++i) {
#pragma unroll
    for (int c = 0; c < Columns; ++c) own[i][c] = i * kRows + lane_row() + c < left;
  }
  // Calls body(step, column of Sums, offset from the lane's first row) for the lane's rows.
  const auto for_rows = [&](auto body) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) body(i, c, i * kStepValues + c * kBlock);
    }
  };

  Sums sums[Steps];                 // first of the gates, then of the drives, then I
  Four<Real> kept[Steps][Columns];  // meanwhile: the embedding's share of the drive, if it is in d; then G
  const auto take = [&](int i, int c, float4 x) {
    sums[i].x[0][c] = x.x, sums[i].x[1][c] = x.y, sums[i].x[2][c] = x.z, sums[i].x[3][c] = x.w;
  };
  const auto give = [&](int i, int c) {
    return float4{sums[i].x[0][c], sums[i].x[1][c], sums[i].x[2][c], sums[i].x[3][c]};
  };
  const auto take_bias = [&] {
    const float4 bias = load4(tile.bias + lane_receiver());
    for_rows([&](int i, int c, int) { take(i, c, bias); });
  };
#pragma unroll
  for (int i = 0; i < Steps; ++i) zero(sums[i]);
  if (call.embedded) {
    for_rows([&](int i, int c, int offset) {
      take(i, c, load4(in_global<Real>(gated ? g : d) + offset));
      if (gated) kept[i][c] = fetch4(d + offset);
    });
  } else if (!gated) {
    take_bias();
  }
  int age[Steps] = {};
  if (!Plain && call.resets) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const int row = i * kRows + lane / 4;
      if (row < left) age[i] = call.age[row0 + row];
    }
  }
  // What the next token gets from the embedding was written long ago: far away by now. 128 bytes a lane.
  constexpr int kLine = 128 / sizeof(Real), kLines = (Columns == 1 ? 1 : Steps * kRows) * kBlock / kLine;
  if (!last && lane < max(kLines, 1)) {
    const int next = (row0 + call.streams) * kBlock + lane * kLine;
    const auto bring = [&](const void* row0) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const Real*>(row0) + next));
    };
    if (call.embedded) {
      bring(tile.d);
      if (gated) bring(tile.g);
    } else {
      if (tile.heard[0]) bring(tile.heard[0]);
      if (tile.heard[1]) bring(tile.heard[1]);
    }
  }

  const auto close_gates = [&] {
    for_rows([&](int i, int c, int offset) {
      const float4 x = give(i, c);
      const Four<Real> gate =
          pack<Real>({gate_of(x.x, Real{}), gate_of(x.y, Real{}), gate_of(x.z, Real{}), gate_of(x.w, Real{})});
      if (call.embedded) take(i, c, unpack<Real>(kept[i][c]));
      kept[i][c] = gate;
      if (own[i][c]) put4(g + offset, gate);
    });
    if (!call.embedded) take_bias();
  };
  const auto close_drives = [&] {
    for_rows([&](int i, int c, int offset) {
      const float4 x = give(i, c), gate = unpack<Real>(kept[i][c]);
      const Four<Real> drive = pack<Real>(x);
      if (own[i][c]) put4(d + offset, drive);
      take(i, c, {x.x * gate.x, x.y * gate.y, x.z * gate.z, x.w * gate.w});
    });
  };
  // Terms lie kind after kind: gates, drives, delayed. Those of all kinds are asked for at once, and used kind by kind.
  // What is not asked for (rows beyond `left`, fewer terms) keeps the zeros or the spikes that were there.
  Sources<Real> sources[kAhead][Steps] = {};
  const Real* from[kAhead] = {};
  bool mine[Steps];
#pragma unroll
  for (int i = 0; i < Steps; ++i) mine[i] = i * kRows + lane / 4 < left;
  int kind = gated ? 0 : 1, at = tile.terms[kind], used = at;
  const int end = tile.terms[3];
  do {
    const int count = min(kAhead, end - at);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (j >= count) continue;
      const NearTerm term = tables.terms[at + j];
      from[j] = Sources<Real>::own(static_cast<const Real*>(term.source) + (row0 - term.delay * call.streams) * kBlock);
    }
    if (token < tile.reach) {  // some were spoken in an earlier call: [K, S] rows, newest first
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (j >= count) continue;
        const Term& term = tables.far[at + j];
        if (token >= term.delay) continue;
        const int64_t row =
            (int64_t{term.panel} * tables.regions[term.region].history + (term.delay - 1 - token)) * call.streams +
            stream0;
        from[j] = Sources<Real>::own(static_cast<const Real*>(tables.states[term.region].recent) + row * kBlock);
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int i = 0; i < Steps; ++i) {
        if (j < count) sources[j][i].ask(in_global<const Real>(const_cast<Real*>(from[j])) + i * kStepValues, mine[i]);
      }
    }
    settle(sources, from, count, Steps > 1);
    for (;;) {
      const int stop = min(tile.terms[kind + 1], at + count);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (at + j < used || at + j >= stop) continue;
        const NearTerm term = tables.terms[at + j];
#pragma unroll
        for (int i = 0; i < Steps; ++i) {
          if (!Plain && call.resets && term.delay) sources[j][i].mask(age[i] >= term.delay);
        }
        multiply_term(sums, term.where, tables, call.weights, sources[j]);
      }
      used = stop;
      if (stop < tile.terms[kind + 1] || kind == 2) break;
      if (gated) {
        if (kind == 0) close_gates();
        if (kind == 1) close_drives();
      }
      ++kind;
    }
    at += count;
  } while (at < end);

  float alpha[4], gain[4], rho[4], a[4], b[4];
  const float* constants = tile.constants + lane_receiver();
  as_array(alpha, load4(constants)), as_array(gain, load4(constants + kBlock));
  as_array(rho, load4(constants + 2 * kBlock)), as_array(a, load4(constants + 3 * kBlock));
  as_array(b, load4(constants + 4 * kBlock));
  Real *const s_at = in_global<Real>(tile.s) + first, *const u_at = in_global<Real>(tile.u) + first;
  const bool remember = last || !call.local_state, recalled = token == 0 || !call.local_state;
  if (recalled) __pipeline_wait_prior(0);
  bool sound = true;
  Spoken spoken;
  for_rows([&](int i, int c, int offset) {
    const int at = i * Columns + c, stream = i * kRows + lane_row() + c;
    float past[4], w[4], v[4], u[4], s[4];
    as_array(past, local.past[at][lane]), as_array(w, local.w[at][lane]);
    if (recalled) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        past[j] = past_of(past[j], w[j], rounded<Real>(emit(past[j], call.max_spike)), alpha[j]);
      }
    }
    if (!Plain && call.resets && own[i][c] && call.resets[row0 + stream]) {
      as_array(past, float4{0, 0, 0, 0}), as_array(w, float4{0, 0, 0, 0});
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = fmaf(gain[j], sums[i].x[j][c], past[j]);
      u[j] = v[j] - 1.0f;
      s[j] = emit(v[j], call.max_spike);
    }
    const Four<Real> spikes = pack<Real>({s[0], s[1], s[2], s[3]}), distances = pack<Real>({u[0], u[1], u[2], u[3]});
    as_array(s, unpack<Real>(spikes));
    if (own[i][c]) {
      speak4(s_at + offset, spikes);
      put4(u_at + offset, distances);
      spoken.add(spikes);
    }
    if (!Plain && tile.emitted != tile.s && own[i][c]) {
      const float4 mask =
          dropout_mask(call.dropout, tile.region, tile.offset + lane_receiver(), token, stream0 + stream);
      speak4(static_cast<Real*>(tile.emitted) + first + offset,
             pack<Real>({s[0] * mask.x, s[1] * mask.y, s[2] * mask.z, s[3] * mask.w}));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w[j] = fmaf(rho[j], w[j], fmaf(a[j], v[j], b[j] * s[j]));
      past[j] = past_of(v[j], w[j], s[j], alpha[j]);
    }
    local.past[at][lane] = {past[0], past[1], past[2], past[3]};
    local.w[at][lane] = {w[0], w[1], w[2], w[3]};
    if (remember && own[i][c]) {
      const StateView& state = tables.states[tile.region];
      const int64_t cell = int64_t{stream0 + stream} * tables.regions[tile.region].n + tile.offset + lane_receiver();
      store4(state.next_v + cell, {v[0], v[1], v[2], v[3]});
      store4(state.next_w + cell, {w[0], w[1], w[2], w[3]});
#pragma unroll
      for (int j = 0; j < 4; ++j) sound &= fabsf(v[j]) <= kLargestState && fabsf(w[j]) <= kLargestState;
    }
  });
  const int4 count = spoken.plus(local.count[lane]);
  local.count[lane] = count;
  if (!last) return;
  if (!sound) atomicOr(&call.verdict->state_not_finite, 1);
  if (!call.local_state) return;
  int* counts = tables.regions[tile.region].spike_count + tile.offset + lane_receiver();
  const int own_counts[4] = {count.x, count.y, count.z, count.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // whole numbers: exact in any order
    int sum = own_counts[j] + __shfl_xor_sync(0xffffffffu, own_counts[j], 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0 && sum) atomicAdd(counts + j, sum);
  }
}

}  // namespace neurogen::cuda
