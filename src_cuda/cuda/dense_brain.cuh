// The brain of a dense connectome: one tile of 32 neurons, one token, a band of up to 32 streams, by two warps.
//
// Tricks, against brain.cuh's warp of 8 or 16 streams with all of a tile's blocks:
//   - a warp holds the three sums of 32 streams in registers (96) and reads half the sources: a block of weights is
//     loaded once for 32 streams, and sources that both gate and drive once for both. Cost: 8 warps of up to 255
//     registers instead of 16. Gain for `small`: 4.4 -> 1.1 MB of weights a multiprocessor and tick out of shared
//     memory, 109 -> 84 MB of spikes out of the L2 cache.
//   - each warp has kDepth sources on their way at any time, the longest written first, instead of batches: 64 KB a
//     multiprocessor. Cost: 64 registers a thread. Gain: one latency of L2 a tick instead of one for three terms.
//   - blocks that do not fit shared memory pass through a ring of two blocks a warp, asked for long before their turn.
//     Cost: 32 KB, 16 resident blocks. Gain: no latency of L2 a streamed block.
//
// The halves' sums meet in shared memory (the ring, empty by then): half h finishes rows 2t + h. Half 0 alone starts
// from the embedding's share, and x + y = y + x, so a sum's bits depend neither on the row nor on the band.
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
  uint4* rings;                   // [kDenseWarps][kDenseRing] blocks
  DenseState<Steps>* local;       // [tiles][kDenseWarps]
  const uint4* resident;          // blocks
  int slots;                      // how many of those
};

// 16 bytes of constant data on their way to shared memory, through the L1 cache: other bands want the same soon.
__device__ inline void bring16(uint4* to, const uint4* from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
__device__ inline void close_bringing() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Open>
__device__ void wait_until_open() {  // at most so many groups
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
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
// written. Both warps of a band come here with the same arguments.
// Plain: neither resets nor dropout, whose code would crowd the instruction cache.
template <int Steps, bool Plain>
__device__ void run_dense_tile(const DenseCall& call, const DenseTables<Steps>& tables, int at, int token, int stream0,
                               int left) {
  constexpr int kDepth = Steps == 4 ? 4 : 6;  // sources on their way
  static_assert(kDenseRing == 2, "a source enters up to two sums: wait_until_open");
  constexpr int kPieces = kDenseBlockBytes / sizeof(uint4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, band = warp / kDenseHalves, half = warp % kDenseHalves;
  const DenseTile& tile = tables.tiles[at];
  const int row0 = token * call.streams + stream0;
  const bool last = token == call.tokens - 1, gated = tile.gated;
  uint4* const ring = tables.rings + warp * kDenseRing * kPieces;

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

  // Streamed weights, each in a group of its own. A lane reads only what it brought itself: nobody else has to wait for
  // it. Groups are closed even when there is nothing left to bring, so that their number tells which are there.
  const int32_t* const streamed = tables.streamed + tile.list_begin[half];
  const unsigned streamed_count = tables.streamed_count[at * kDenseHalves + half];
  unsigned asked = 0;
  const auto bring_next = [&] {
    if (asked < streamed_count) {
      const uint4* from = call.ordered + int64_t{streamed[asked]} * kPieces + lane;
#pragma unroll
      for (int j = 0; j < kPieces; j += 32) bring16(ring + asked % kDenseRing * kPieces + lane + j, from + j);
    }
    close_bringing();
    ++asked;
  };
#pragma unroll
  for (int j = 0; j < kDenseRing; ++j) bring_next();

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

  unsigned used = 0;  // streamed blocks
  const auto add = [&](Sums(&to)[Steps], int place, const Sources<bf16>(&from)[Steps]) {
    const bool resident = place < tables.slots;
    Fragments block;
    block.load(resident ? tables.resident + place * kPieces : ring + used % kDenseRing * kPieces);
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
      if (source.fresh == 1) wait_until_open<1>();
      if (source.fresh > 1) wait_until_open<0>();
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
#pragma unroll 1
      while (asked < used + kDenseRing) bring_next();
      if (index + kDepth * kDenseHalves < count) ask(heard[j], index + kDepth * kDenseHalves);
    }
  }

  // The halves meet, two steps at a time: that is the room there is.
  constexpr int kRound = Steps < 2 ? Steps : 2;
  static_assert(kRound * kSums * 32 <= kDenseRing * kPieces, "float4 and uint4 have one size");
  float4* const mine = reinterpret_cast<float4*>(ring) + lane;
  const float4* const theirs = mine + (half == 0 ? 1 : -1) * kDenseRing * kPieces;
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
  for (int begin = 0; begin < Steps; begin += kRound) {
    if (begin > 0) meet(band);  // the other has read what lay there
#pragma unroll
    for (int i = begin; i < begin + kRound; ++i) {
#pragma unroll
      for (int kind = 0; kind < kSums; ++kind) {
        mine[((i - begin) * kSums + kind) * 32] = column(sums[kind][i], half == 0);
      }
    }
    meet(band);
    as_array(alpha, load4(constants)), as_array(gain, load4(constants + kBlock));
    as_array(rho, load4(constants + 2 * kBlock)), as_array(a, load4(constants + 3 * kBlock));
    as_array(b, load4(constants + 4 * kBlock));
#pragma unroll
    for (int i = begin; i < begin + kRound; ++i) {
      const auto total = [&](int kind) {
        const float4 x = column(sums[kind][i], half == 1), y = theirs[((i - begin) * kSums + kind) * 32];
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
  }
  local.count[lane] = *reinterpret_cast<int4*>(spoken);
  meet(band);  // the rings are free again
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
