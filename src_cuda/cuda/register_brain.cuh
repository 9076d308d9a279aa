// What the two brain launches have in common where every tile has a warp of its own, with its weights in registers:
// register_brain.cu for few streams, wide_brain.cu for many. A warp goes through the tokens of its tile and waits for
// the spikes it needs as in brain.cuh; it never holds up another tile.
//
// Every kind of term has places (slots), so that nothing has to find out which kind comes next. The order of every sum
// is that of run_tile(), which calls with dropout go to: the same to the last bit.
#pragma once

#include "brain.cuh"

namespace neurogen::cuda {

constexpr int kFirstDrive = kRegisterSlots[0], kFirstDelayed = kFirstDrive + kRegisterSlots[1],
              kSlots = kFirstDelayed + kRegisterSlots[2];
constexpr int kForever = 1 << 30;  // age of a row that is not there
constexpr unsigned kGated = 1u << 31, kEmbeddedGate = 1u << 30, kEmbeddedDrive = 1u << 29;

// A neuron's constants, for the lane's four.
struct Constants {
  float alpha[4], gain[4], rho[4], a[4], b[4];
  __device__ explicit Constants(const float* from) {  // [5][32] of a tile, the first of the four
    as_array(alpha, load4(from)), as_array(gain, load4(from + kBlock)), as_array(rho, load4(from + 2 * kBlock));
    as_array(a, load4(from + 3 * kBlock)), as_array(b, load4(from + 4 * kBlock));
  }
};

// Of a warp, in shared memory: what its tile is, and where.
struct WarpTables {
  float constants[6][kBlock];   // the sixth: biases
  const bf16* sources[kSlots];  // so that row r of the call is kBlock r values further
  bf16 *u, *s, *d, *g;          // row 0
  const float *v, *w;           // of earlier calls, the lane's neurons of stream 0 at lane_receiver()
  float *next_v, *next_w;       // for later ones
  int* counts;                  // of spikes
  int width;                    // of a row of v
  int delays[kSlots - kFirstDelayed];
  int unused[2];  // the rest of 16 bytes
};
static_assert(sizeof(WarpTables) == kRegisterTableBytes, "the host plans with it");
static_assert(sizeof(WarpTables) % sizeof(uint4) == 0, "states follow");

// A warp's tile: looked up again where that is rare, for registers are short.
struct Place {
  const BrainTile* tile;
  const Term* terms;  // of the share
  int own;            // number of the tile in the share
  __device__ explicit Place(const BrainCall& call) {
    const Share& share = call.shares[blockIdx.x % call.base_grid];
    // Warp w runs on scheduler w % 4. Those with one warp more get the lightest tiles, which are the share's first.
    const int warp = threadIdx.x / 32 % share.tiles, crowded = share.tiles % 4, scheduler = warp % 4, round = warp / 4;
    own = scheduler < crowded ? round * crowded + scheduler
                              : (share.tiles / 4 + 1) * crowded + round * (4 - crowded) + scheduler - crowded;
    tile = call.tiles + share.tile_begin + own;
    terms = call.terms + share.term_begin;
  }
  // Of a slot, null = it is empty.
  __device__ const Term* term(int slot) const {
    const int kind = slot < kFirstDrive ? 0 : slot < kFirstDelayed ? 1 : 2;
    const int at = tile->terms[kind] + slot - (kind == 0 ? 0 : kind == 1 ? kFirstDrive : kFirstDelayed);
    return at < tile->terms[kind + 1] ? terms + at : nullptr;
  }
};

// All but the sources. Returns kGated, and whether the first of its kind hears the embedding.
__device__ inline unsigned fill_tables(const BrainCall& call, const BrainTile& tile, WarpTables& tables) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 5; ++i) tables.constants[i][lane] = tile.constants[i * kBlock + lane];
  tables.constants[5][lane] = tile.bias[lane];
  if (lane == 0) {
    const StateView& state = call.states[tile.region];
    const RegionView& region = call.regions[tile.region];
    tables.u = static_cast<bf16*>(tile.u), tables.s = static_cast<bf16*>(tile.s);
    tables.d = static_cast<bf16*>(tile.d), tables.g = static_cast<bf16*>(tile.g);
    tables.v = state.v + tile.offset, tables.w = state.w + tile.offset;
    tables.next_v = state.next_v + tile.offset, tables.next_w = state.next_w + tile.offset;
    tables.counts = region.spike_count + tile.offset, tables.width = region.n;
  }
  return (tile.gated ? kGated : 0) | (tile.heard[0] ? kEmbeddedGate : 0) | (tile.heard[1] ? kEmbeddedDrive : 0);
}

// Where the spikes that each term needs for a token are: those of earlier calls are [K, S] rows, newest first.
__device__ inline void find_sources(const BrainCall& call, int token, WarpTables& tables) {
  const int lane = threadIdx.x % 32;
  const Term* const listed = lane < kSlots ? Place(call).term(lane) : nullptr;
  __syncwarp();
  if (listed) {
    const Term& term = *listed;
    const bf16* at = static_cast<const bf16*>(term.source) - int64_t{term.delay} * call.streams * kBlock;
    if (token < term.delay) {
      const int64_t newest = int64_t{term.panel} * call.regions[term.region].history + term.delay - 1 - token;
      at = static_cast<const bf16*>(call.states[term.region].recent) + (newest - token) * call.streams * kBlock;
    }
    tables.sources[lane] = at;
    if (lane >= kFirstDelayed) tables.delays[lane - kFirstDelayed] = term.delay;
  }
  __syncwarp();
}

// past and w of a stream, of the lane's four neurons, from v and w of earlier calls.
__device__ inline void recall(const WarpTables& tables, int stream, float max_spike, float4& past, float4& w) {
  const int64_t cell = int64_t{stream} * tables.width + lane_receiver();
  float v[4], adaptation[4];
  as_array(v, load4(in_global<const float>(const_cast<float*>(tables.v)) + cell));
  as_array(adaptation, load4(in_global<const float>(const_cast<float*>(tables.w)) + cell));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    v[j] = past_of(v[j], adaptation[j], rounded<bf16>(emit(v[j], max_spike)), tables.constants[0][lane_receiver() + j]);
  }
  past = {v[0], v[1], v[2], v[3]};
  w = {adaptation[0], adaptation[1], adaptation[2], adaptation[3]};
}

// v and w for later calls.
__device__ inline void remember(const WarpTables& tables, int stream, float4 v, float4 w, Verdict* verdict) {
  const int64_t cell = int64_t{stream} * tables.width + lane_receiver();
  store4(in_global<float>(tables.next_v) + cell, v);
  store4(in_global<float>(tables.next_w) + cell, w);
  const auto sound = [](float x) { return fabsf(x) <= kLargestState; };
  if (!(sound(v.x) && sound(v.y) && sound(v.z) && sound(v.w) && sound(w.x) && sound(w.y) && sound(w.z) && sound(w.w))) {
    atomicOr(&verdict->state_not_finite, 1);
  }
}

// Spikes of one of the lane's neurons, to memory: whole numbers, exact in any order.
__device__ inline void add_count(int* count, int spoken) {
  spoken += __shfl_xor_sync(0xffffffffu, spoken, 1);
  spoken += __shfl_xor_sync(0xffffffffu, spoken, 2);
  if (threadIdx.x % 4 == 0 && spoken) atomicAdd(count, spoken);
}

const void* wide_kernel(bool resets);  // wide_brain.cu

}  // namespace neurogen::cuda
