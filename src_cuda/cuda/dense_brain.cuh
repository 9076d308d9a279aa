// The brain of a dense connectome: one tile of 32 neurons, one token, a band of up to 32 streams, by two warps.
//
// Tricks, against brain.cuh's warp of 8 or 16 streams with all of a tile's blocks:
//   - a warp holds the three sums of 32 streams in registers (96) and reads half the sources: a block of weights is
//     loaded once for 32 streams, and sources that both gate and drive once for both. Cost: 8 warps of up to 255
//     registers instead of 16. Gain for `small`: 4.4 -> 1.1 MB of weights a multiprocessor and tick out of shared
//     memory, 109 -> 84 MB of spikes out of the L2 cache.
//   - each warp has kDepth sources on their way at any time, the longest written first, instead of batches: 64 KB a
//     multiprocessor. Cost: 64 registers a thread. Gain: one latency of L2 a tick instead of one for three terms.
//   - blocks that do not fit shared memory pass through four places a half, for all bands, asked for long before their
//     turn by the band that comes first. Cost: 16 KB, and no band gets far ahead of another. Gain: no latency of L2, a
//     quarter of what each band would stream (for `small` 480 KB of 1.3 MB a multiprocessor and tick).
//
// The halves' sums meet in shared memory: half h finishes rows 2t + h. Half 0 alone starts from the embedding's share,
// and x + y = y + x, so a sum's bits depend neither on the row nor on the band.
// Waiting ends: spikes that are waited for are of an earlier tick, and of a share's bands the one that is behind waits
// for no other, since it may bring its next blocks itself: all bands have done with what lay in their places.
#pragma once

#include "brain.cuh"

namespace neurogen::cuda {

constexpr unsigned kPause = 100;  // nanoseconds between two looks at what others still have to write

struct DenseCall {
  const RegionView* regions;
  const StateView* states;
  const DenseTile* tiles;
  const DenseSource* sources;
  const DenseShare* shares;
  const int32_t* blocks;
  const void* weights;    // bf16 [blocks, 32, 32]
  uint4* ordered;         // the same, share by share, in the order of Fragments; those that are streamed
  const uint8_t* resets;  // null = none
  const int32_t* age;
  Verdict* verdict;
  int streams, tokens, levels, stream_group, region_count, base_grid, shared_bytes;
  float max_spike;  // 1 where spikes are binary
  Dropout dropout;
};

// DenseSource, ready for use.
struct alignas(16) Heard {
  const bf16 *panel, *recent;  // rows of this call, of earlier calls (the newest first, streams rows a token)
  int delay;
  int gate, basal;  // place of the block; basal: into the drive, or where delay > 0 into the delayed sum
  int fresh;        // how many of the two are streamed
};

// past and w of a warp's neurons in the lanes' own order, and how often they spoke.
template <int Steps>
struct DenseState {
  float4 past[Steps][32], w[Steps][32];
  int4 count[32];
};

// What a warp needs of its block of threads, all in shared memory.
template <int Steps>
struct DenseTables {
  const RegionView* regions;
  const StateView* states;
  const DenseTile* tiles;
  const Heard* sources;
  const float* constants;         // [tiles][kTileConstants]
  const int32_t* streamed;        // streamed blocks in the order of use, see DenseTile::list_begin
  const int32_t* streamed_count;  // [tiles][kDenseHalves]
  uint4* ring;                    // [kDenseHalves][kDenseRing] blocks
  float4* exchange;               // [kDenseWarps][kSums][32]
  DenseConveyor* conveyor;
  DenseState<Steps>* local;  // [tiles][kDenseWarps]
  const uint4* resident;     // blocks
  int slots;                 // how many of those
};

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// 16 bytes on their way to shared memory.
__device__ inline void bring16(uint4* to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// A barrier turns over when what all lanes of a warp brought is there; round: how often it had turned over before.
__device__ inline void begin_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(32) : "memory");
}
__device__ inline void arrive_when_brought(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline bool turned_over(const uint64_t* barrier, int round) {
  int out;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(out)
      : "r"(shared_address(barrier)), "r"(round % 2)
      : "memory");
  return out;
}

// Counters in shared memory that other warps wait for.
__device__ inline void publish(int32_t* counter, int value) {
  asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(shared_address(counter)), "r"(value) : "memory");
}
__device__ inline int published(const int32_t* counter) {
  int out;
  asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(out) : "r"(shared_address(counter)) : "memory");
  return out;
}

// The two warps of a band.
__device__ inline void meet(int band) {
  asm volatile("bar.sync %0, %1;" ::"r"(band + 1), "n"(32 * kDenseHalves) : "memory");
}

// A block of weights in the order of the tensor core's registers: part p is what a lane gives the product of receivers
// 4g + 2 (p % 2) .. + 1 with words 2 (p / 2) .. + 1 of the sources. The kernel puts its blocks into this order when it
// starts (fill_shared). Cost: some 4 us a launch, a copy of what it streams. Gain: no registers moved before a product,
// 44 moves a block with its 16 products otherwise.
struct Fragments {
  uint4 part[4];
  __device__ void load(const uint4* block) {
#pragma unroll
    for (int p = 0; p < 4; ++p) part[p] = block[p * 32 + threadIdx.x % 32];
  }
};

// sums += block * sources of all steps: what does not depend on each other first.
template <int Steps>
__device__ void multiply_add(Sums (&sums)[Steps], const Fragments& block, const Sources<bf16> (&s)[Steps]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const uint4& w = block.part[p];
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      float (&x)[2] = sums[i].x[p % 2 * 2], (&y)[2] = sums[i].x[p % 2 * 2 + 1];
      tensor_product(x[0], x[1], y[0], y[1], w.x, w.y, w.z, w.w, p < 2 ? s[i].raw.x : s[i].raw.z,
                     p < 2 ? s[i].raw.y : s[i].raw.w);
    }
  }
}

// Tile number `at` of the share; streams stream0 .. stream0 + left - 1. Rows beyond `left` hear silence and are not
// written. Both warps of a band come here with the same arguments, and all bands in the same order.
// used: blocks that this warp has streamed so far.
// Plain: neither resets nor dropout, whose code would crowd the instruction cache.
template <int Steps, bool Plain>
__device__ void run_dense_tile(const DenseCall& call, const DenseTables<Steps>& tables, int at, int token, int stream0,
                               int left, int& used) {
  constexpr int kDepth = Steps == 4 ? 4 : 6;  // sources on their way
  static_assert(kDenseRing >= 2, "a source enters up to two sums");
  constexpr int kPieces = kDenseBlockBytes / sizeof(uint4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, band = warp / kDenseHalves, half = warp % kDenseHalves;
  const DenseTile& tile = tables.tiles[at];
  const int row0 = token * call.streams + stream0;
  const bool last = token == call.tokens - 1, gated = tile.gated;
  uint4* const ring = tables.ring + half * kDenseRing * kPieces;

  const Heard* const sources = tables.sources + tile.source_begin;
  const int count = tile.sources;
  Sources<bf16> heard[kDepth][Steps];
  const auto place_of = [&](const Heard& source) {
    const bool here = token >= source.delay;
    const int row = (here ? token - source.delay : source.delay - 1 - token) * call.streams + stream0;
    return in_global<const bf16>(const_cast<bf16*>(here ? source.panel : source.recent)) + row * kBlock;
  };
  const auto ask = [&](Sources<bf16>(&to)[Steps], int index) {
    const bf16* from = place_of(sources[index]);
    if (left == Steps * kRows) {
#pragma unroll
      for (int i = 0; i < Steps; ++i) to[i].raw = peek(Sources<bf16>::own(from + i * kStepValues));
    } else {
#pragma unroll
      for (int i = 0; i < Steps; ++i) to[i].look(from + i * kStepValues, left - i * kRows);
    }
  };
  const auto missing = [](const Sources<bf16>(&of)[Steps]) {
    bool out = false;
#pragma unroll
    for (int i = 0; i < Steps; ++i) out |= of[i].missing();
    return __any_sync(0xffffffffu, out);
  };
#pragma unroll
  for (int j = 0; j < kDepth; ++j) {
    if (half + j * kDenseHalves < count) ask(heard[j], half + j * kDenseHalves);
  }

  // Streamed weights: number p is brought by whoever sees first that all bands have done with number p - kDenseRing.
  DenseConveyor& conveyor = *tables.conveyor;
  const int32_t* const streamed = tables.streamed + tile.list_begin[half];
  const int stream_begin = used, stream_end = used + tables.streamed_count[at * kDenseHalves + half];
  const auto bring = [&] {
    for (;;) {
      int next = lane == 0 ? published(&conveyor.asked[half]) : 0;
      next = __shfl_sync(0xffffffffu, next, 0);
      if (next >= stream_end || next >= used + kDenseRing) break;  // never before `used`, which was brought
      const int done = lane < kDenseBands ? published(&conveyor.used[half][lane]) : used;
      if (next >= __reduce_min_sync(0xffffffffu, done) + kDenseRing) break;
      int mine = lane == 0 ? atomicCAS(&conveyor.asked[half], next, next + 1) == next : 0;
      mine = __shfl_sync(0xffffffffu, mine, 0);
      if (!mine) continue;
      __syncwarp();
      const uint4* from = call.ordered + int64_t{streamed[next - stream_begin]} * kPieces + lane;
      uint4* to = ring + next % kDenseRing * kPieces + lane;
#pragma unroll
      for (int j = 0; j < kPieces; j += 32) bring16(to + j, from + j);
      arrive_when_brought(&conveyor.there[half][next % kDenseRing]);
    }
  };
  const auto there = [&](int number) {
    return turned_over(&conveyor.there[half][number % kDenseRing], number / kDenseRing);
  };
  bring();

  Sums sums[kSums][Steps];
#pragma unroll
  for (int i = 0; i < Steps; ++i) {
#pragma unroll
    for (int kind = 0; kind < kSums; ++kind) zero(sums[kind][i]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = i * kRows + lane_row() + c, offset = (row0 + row) * kBlock + lane_receiver();
      if (half != 0 || row >= left) continue;
      const auto start = [&](Sums& sum, void* panel) {
        const float4 x = load4(in_global<const bf16>(panel) + offset);
        sum.x[0][c] = x.x, sum.x[1][c] = x.y, sum.x[2][c] = x.z, sum.x[3][c] = x.w;
      };
      start(sums[kDriveSum][i], tile.d);
      if (gated) start(sums[kGateSum][i], tile.g);
    }
  }
  // The next token's drive and gate were written long ago: far away by now. 128 bytes, two rows, a lane.
  if (!last && lane * 2 < left) {
    const int next = (row0 + call.streams + lane * 2) * kBlock;
    void* const panel = half == 0 ? tile.d : tile.g;
    if (half == 0 || gated) asm volatile("prefetch.global.L2 [%0];" ::"l"(in_global<const bf16>(panel) + next));
  }
  int age[Steps] = {};
  if (!Plain && call.resets) {
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const int row = i * kRows + lane / 4;
      if (row < left) age[i] = call.age[row0 + row];
    }
  }

  const auto add = [&](Sums(&to)[Steps], int place, const Sources<bf16>(&from)[Steps]) {
    const bool resident = place < tables.slots;
    Fragments block;
    block.load(resident ? tables.resident + place * kPieces
                        : ring + static_cast<unsigned>(used) % kDenseRing * kPieces);
    used += !resident;
    multiply_add(to, block, from);
  };
#pragma unroll 1
  for (int begin = half; begin < count; begin += kDepth * kDenseHalves) {
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      const int index = begin + j * kDenseHalves;
      if (index >= count) break;
      if (missing(heard[j])) {
        // Not written yet. The last step is written last: it alone is looked at meanwhile, for the L2 cache has others
        // to serve. Then all that is still missing is asked for again, and what comes after this source not waited for.
        const auto look_again = [&](int k, int first) {
          const bf16* from = place_of(sources[begin + k * kDenseHalves]);
#pragma unroll
          for (int i = 0; i < Steps; ++i) {
            if (i >= first) heard[k][i].look_again(from + i * kStepValues);
          }
        };
#pragma unroll 1
        while (__any_sync(0xffffffffu, heard[j][Steps - 1].missing())) {
          __nanosleep(kPause);
          look_again(j, Steps - 1);
        }
#pragma unroll
        for (int k = j; k < kDepth; ++k) {
          if (begin + k * kDenseHalves < count) look_again(k, 0);
        }
#pragma unroll 1
        while (missing(heard[j])) {
          __nanosleep(kPause);
          look_again(j, 0);
        }
      }
      const Heard& source = sources[index];
      const int fresh = source.fresh;
      if (fresh > 0) {
#pragma unroll 1
        do {
          bring();
        } while (!__all_sync(0xffffffffu, there(used) && (fresh == 1 || there(used + 1))));
      }
      if (source.gate >= 0) add(sums[kGateSum], source.gate, heard[j]);
      if (source.delay > 0) {
        if (!Plain && call.resets) {
#pragma unroll
          for (int i = 0; i < Steps; ++i) heard[j][i].mask(age[i] >= source.delay);
        }
        add(sums[kDelayedSum], source.basal, heard[j]);
      } else if (source.basal >= 0) {
        add(sums[kDriveSum], source.basal, heard[j]);
      }
      if (fresh > 0) {
        __syncwarp();
        if (lane == 0) publish(&conveyor.used[half][band], used);
      }
      if (index + kDepth * kDenseHalves < count) ask(heard[j], index + kDepth * kDenseHalves);
    }
  }

  // The halves meet, a step at a time: that is the room there is.
  float4* const mine = tables.exchange + warp * kSums * 32 + lane;
  const float4* const theirs = mine + (half == 0 ? 1 : -1) * kSums * 32;
  const auto column = [&](const Sums& sum, bool second) -> float4 {
    return {second ? sum.x[0][1] : sum.x[0][0], second ? sum.x[1][1] : sum.x[1][0], second ? sum.x[2][1] : sum.x[2][0],
            second ? sum.x[3][1] : sum.x[3][0]};
  };
  const float* constants = tables.constants + at * kTileConstants + lane_receiver();
  float alpha[4], gain[4], rho[4], a[4], b[4];
  DenseState<Steps>& local = tables.local[at * kDenseWarps + warp];
  const StateView& state = tables.states[tile.region];
  const int64_t cell0 = int64_t{stream0} * tables.regions[tile.region].n + tile.offset + lane_receiver();
  int spoken[4] = {};
  if (token > 0) *reinterpret_cast<int4*>(spoken) = local.count[lane];
  bool sound = true;
#pragma unroll
  for (int i = 0; i < Steps; ++i) {
    if (i > 0) meet(band);  // the other has read what lay there
#pragma unroll
    for (int kind = 0; kind < kSums; ++kind) mine[kind * 32] = column(sums[kind][i], half == 0);
    meet(band);
    as_array(alpha, load4(constants)), as_array(gain, load4(constants + kBlock));
    as_array(rho, load4(constants + 2 * kBlock)), as_array(a, load4(constants + 3 * kBlock));
    as_array(b, load4(constants + 4 * kBlock));
    const auto total = [&](int kind) {
      const float4 x = column(sums[kind][i], half == 1), y = theirs[kind * 32];
      return float4{x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
    };
    const int row = i * kRows + lane_row() + half, offset = (row0 + row) * kBlock + lane_receiver();
    const int64_t cell = cell0 + min(row, left - 1) * int64_t{tables.regions[tile.region].n};
    const bool own = row < left;
    float input[4];
    const float4 drive = total(kDriveSum), delayed = total(kDelayedSum);
    if (gated) {
      const float4 x = total(kGateSum);
      const Four<bf16> packed =
          pack<bf16>({gate_of(x.x, bf16{}), gate_of(x.y, bf16{}), gate_of(x.z, bf16{}), gate_of(x.w, bf16{})});
      if (own) put4(in_global<bf16>(tile.g) + offset, packed);
      if (own) put4(in_global<bf16>(tile.d) + offset, pack<bf16>(drive));
      const float4 gate = unpack<bf16>(packed);
      as_array(input, {fmaf(drive.x, gate.x, delayed.x), fmaf(drive.y, gate.y, delayed.y),
                       fmaf(drive.z, gate.z, delayed.z), fmaf(drive.w, gate.w, delayed.w)});
    } else {
      as_array(input, {drive.x + delayed.x, drive.y + delayed.y, drive.z + delayed.z, drive.w + delayed.w});
    }
    float past[4], w[4], v[4], u[4], s[4];
    if (token > 0) {
      as_array(past, local.past[i][lane]), as_array(w, local.w[i][lane]);
    } else {
      as_array(past, load4(in_global<const float>(state.v) + cell)),
          as_array(w, load4(in_global<const float>(state.w) + cell));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        past[j] = past_of(past[j], w[j], rounded<bf16>(emit(past[j], call.max_spike)), alpha[j]);
      }
    }
    if (!Plain && call.resets && own && call.resets[row0 + row]) {
      as_array(past, float4{0, 0, 0, 0}), as_array(w, float4{0, 0, 0, 0});
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = fmaf(gain[j], input[j], past[j]);
      u[j] = v[j] - 1.0f;
      s[j] = emit(v[j], call.max_spike);
      spoken[j] += own && s[j] > 0;
    }
    const Four<bf16> spikes = pack<bf16>({s[0], s[1], s[2], s[3]});
    as_array(s, unpack<bf16>(spikes));
    if (own) {
      speak4(in_global<bf16>(tile.s) + offset, spikes);
      if (!Plain && tile.emitted != tile.s) {
        const float4 mask =
            dropout_mask(call.dropout, tile.region, tile.offset + lane_receiver(), token, stream0 + row);
        speak4(in_global<bf16>(tile.emitted) + offset,
               pack<bf16>({s[0] * mask.x, s[1] * mask.y, s[2] * mask.z, s[3] * mask.w}));
      }
      put4(in_global<bf16>(tile.u) + offset, pack<bf16>({u[0], u[1], u[2], u[3]}));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w[j] = fmaf(rho[j], w[j], fmaf(a[j], v[j], b[j] * s[j]));
      past[j] = past_of(v[j], w[j], s[j], alpha[j]);
    }
    local.past[i][lane] = {past[0], past[1], past[2], past[3]};
    local.w[i][lane] = {w[0], w[1], w[2], w[3]};
    if (last && own) {
      store4(in_global<float>(state.next_v) + cell, {v[0], v[1], v[2], v[3]});
      store4(in_global<float>(state.next_w) + cell, {w[0], w[1], w[2], w[3]});
#pragma unroll
      for (int j = 0; j < 4; ++j) sound &= fabsf(v[j]) <= kLargestState && fabsf(w[j]) <= kLargestState;
    }
  }
  local.count[lane] = *reinterpret_cast<int4*>(spoken);
  meet(band);  // the other has read the last
  if (!last) return;
  if (!sound) atomicOr(&call.verdict->state_not_finite, 1);
  int* counts = tables.regions[tile.region].spike_count + tile.offset + lane_receiver();
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // whole numbers: exact in any order
    spoken[j] += __shfl_xor_sync(0xffffffffu, spoken[j], 1);
    spoken[j] += __shfl_xor_sync(0xffffffffu, spoken[j], 2);
    if (lane % 4 == 0 && spoken[j]) atomicAdd(counts + j, spoken[j]);
  }
}

}  // namespace neurogen::cuda
