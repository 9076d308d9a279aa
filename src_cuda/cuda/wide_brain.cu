// The brain launch of many streams where every tile has a warp of its own (register_brain.cuh).
//
// What bounds it is how long each warp waits for its own instructions: ten warps a multiprocessor, two or three a
// scheduler, which issued 577 instructions in the 3,240 cycles of an item of eight streams (`base`, 64 streams on an
// H200). So an item has sixteen: twice the independent work between two waits, and what an item costs whatever its
// streams (places, tests, looking out for spikes) is paid half as often: 899 instructions in 4,600 cycles, 13.7 -> 10.6
// us a tick. Cost: six blocks of weights, sums of sixteen streams and what is heard fill the registers, v, w and what
// is on its way the shared memory; ten warps at most, no tile with both a third drive and a third delayed term, and the
// second gate's block is read from shared memory.
//
// Nothing may spill: shared memory leaves 27 KB of L1 cache, so a spilled word comes from L2 (16.6 us a tick with seven
// of them). Hence same(), and places that are computed again each time.
//
// What slots say to the next item is asked for as soon as they have been heard. Stores keep their registers until L1
// has taken them, line by line, and loads that get those registers next wait for it: hence the order of rows in
// own_piece(). With that, constants read once an item and empty slots passed over: 10.6 -> 9.8 us.
#include <type_traits>

#include "dependent.cuh"
#include "register_brain.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kSteps = kWideStreams / kRows, kColumns = kWideColumns;  // of an item: times kRows streams; of a lane
constexpr int kTermPieces = kSteps * 32;                               // of 16 bytes: what a term says to an item
constexpr int kEmbedded = 8;             // bits from here on: slots that hear the embedding
constexpr int kHearings = 4;             // of an item: kinds of spikes asked for together
constexpr int kHeldBlocks = kSlots - 2;  // in registers
static_assert(kColumns == 2 * kSteps, "a lane has two rows of a step");
static_assert(kTermPieces * sizeof(uint4) == kWideRingBytes, "the host plans with it");

// past and w of an item in a lane's order.
struct WideState {
  float4 past[kColumns][32], w[kColumns][32];
};
static_assert(sizeof(WideState) == register_state_bytes(kColumns), "the host plans with it");

// The register block of a slot: the third drive and the third delayed term, of which a tile has one, share a place.
constexpr int kFarSlot = 1;
__host__ __device__ constexpr int block_of(int slot) {
  return slot == 0 ? 0 : slot == kSlots - 1 ? block_of(kFirstDelayed - 1) : slot - 1;
}

template <int N>
using Slot = std::integral_constant<int, N>;

// Whether spikes are still to be written: the sign bit says so, for they have not the sign of this call yet
// (CudaModel::hush). Spikes are written eight bytes at a time.
__device__ inline unsigned unspoken(const uint4& raw, uint32_t sign) { return (raw.x ^ sign) | (raw.z ^ sign); }
__device__ inline bool sign_bit(unsigned x) { return static_cast<int>(x) < 0; }

__device__ inline uint4 flip(const uint4& x, uint32_t sign) { return {x.x ^ sign, x.y ^ sign, x.z ^ sign, x.w ^ sign}; }
__device__ inline Four<bf16> flip(const Four<bf16>& x, uint32_t sign) { return {{x.raw.x ^ sign, x.raw.y ^ sign}}; }

// A block for sources that have this sign.
__device__ inline KeptBlock flip(const BlockWeights<bf16>& weights, uint32_t sign) {
  KeptBlock block(weights);
#pragma unroll
  for (int i = 0; i < 4; ++i) block.operand[i] = flip(block.operand[i], sign);
  return block;
}

// Which 16 bytes of eight rows of spikes a lane asks for: those of column n = lane / 4 of a product, for which it takes
// row n / 2, or n / 2 + 4 where n is odd. What comes of a lane's columns, 2 q and 2 q + 1, is then of rows q and q + 4,
// so that lanes store four neighbouring rows at once: two lines, where rows in order of columns were four.
__device__ inline int own_piece(int lane) { return (lane & 4) << 2 | (lane & 24) >> 1 | (lane & 3); }
__device__ inline int lane_of(int piece) { return (piece & 16) >> 2 | (piece & 12) << 1 | (piece & 3); }

// x in a register, not computed again wherever it is used.
__device__ inline unsigned held(unsigned x) { return __shfl_sync(0xffffffffu, x, threadIdx.x % 32); }
// What is the same for all lanes, so that the compiler knows: it has registers of its own, of which there are enough.
__device__ inline unsigned same(unsigned x) { return __shfl_sync(0xffffffffu, x, 0); }

// sums += block * sources, in an order that leaves independent products between dependent ones.
__device__ inline void multiply_add(Sums (&sums)[kSteps], const KeptBlock& block, const uint4 (&source)[kSteps]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint4& part = block.operand[half * 2 + i / 2];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        float (&x)[4][2] = sums[step].x;
        const uint4& s = source[step];
        tensor_product(x[i][0], x[i][1], x[i + 1][0], x[i + 1][1], part.x, part.y, part.z, part.w, half ? s.z : s.x,
                       half ? s.w : s.y);
      }
    }
  }
}

// put4() and speak4() without a branch.
template <bool Spoken>
__device__ inline void store_if(bool counts, bf16* to, const Four<bf16>& x) {
  const uint64_t bits = uint64_t{x.raw.y} << 32 | x.raw.x;
  if constexpr (Spoken) {
    asm volatile("{.reg .pred counts; setp.ne.s32 counts, %0, 0; @counts st.relaxed.gpu.global.b64 [%1], %2;}" ::"r"(
                     static_cast<int>(counts)),
                 "l"(to), "l"(bits)
                 : "memory");
  } else {
    asm volatile("{.reg .pred counts; setp.ne.s32 counts, %0, 0; @counts st.global.cs.b64 [%1], %2;}" ::"r"(
                     static_cast<int>(counts)),
                 "l"(to), "l"(bits)
                 : "memory");
  }
}

// What a lane has counted, four neurons in a word: a spike of each adds to its byte (0, 2, 1, 3).
__device__ inline uint32_t spikes_of(const Four<bf16>& s) {
  const auto mask = [](uint32_t raw) {
    return __hne2_mask(reinterpret_cast<const __nv_bfloat162&>(raw), __float2bfloat162_rn(0.0f));
  };
  return (mask(s.raw.x) & 0x00010001u) | (mask(s.raw.y) & 0x01000100u);
}

// most_chunks: of a warp; counted: a power of two, tokens - 1 until counts of a byte may be full.
template <bool Resets>
__global__ void __launch_bounds__(kWideWarps * 32, 1)
    run_wide_kernel(const __grid_constant__ BrainCall call, int copies, int most_chunks, int counted) {
  // Silence, which is what empty slots hear; rings, term by term; of each warp tables and states; far blocks.
  extern __shared__ uint4 shared[];
  const uint4 silent = {call.sign, call.sign, call.sign, call.sign};
  for (int i = threadIdx.x; i < kTermPieces; i += blockDim.x) shared[i] = silent;
  __syncthreads();
  const Share& share = call.shares[blockIdx.x % call.base_grid];
  const int piece = held(own_piece(threadIdx.x % 32)), warp = same(threadIdx.x / 32), copy = same(warp / share.tiles);
  if (copy >= copies) return;  // several warps have a tile, but no more than that
  const unsigned own_bytes = sizeof(WarpTables) + most_chunks * sizeof(WideState);
  unsigned room = (1 + copies * share.terms) * kWideRingBytes, far = room + copies * share.tiles * own_bytes;
  room += warp * own_bytes;
  WarpTables& tables = *reinterpret_cast<WarpTables*>(reinterpret_cast<char*>(shared) + same(room));
  WideState* const states = reinterpret_cast<WideState*>(&tables + 1);
  const auto far_block = [&] { return reinterpret_cast<uint4*>(reinterpret_cast<char*>(shared) + far) + piece; };
  unsigned present;            // bits: slots that are not empty; kGated and so on
  uint32_t rings[2] = {0, 0};  // bytes, slot by slot: the ring's number, 0 = silence
  KeptBlock blocks[kHeldBlocks];
  {
    const Place place(call);
    present = fill_tables(call, *place.tile, tables);
    unsigned ring = 1 + copy * share.terms + place.tile->terms[0];
    const int lane = threadIdx.x % 32;
    const bool before = lane < place.own && wide_far(place.tile[lane - place.own].terms);
    far = same(far + (__popc(__ballot_sync(0xffffffffu, before)) * copies + copy) * kWideFarBytes);
#pragma unroll
    for (int j = 0; j < kHeldBlocks; ++j) blocks[j] = KeptBlock(BlockWeights<bf16>{});
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const Term* const term = place.term(j);
      if (!term) continue;
      const bf16* const from = static_cast<const bf16*>(call.weights) + int64_t{term->block} * kBlockArea;
      BlockWeights<bf16> block;
      block.load(from);
      const bool embedded = term->region == kFromEmbedding;
      if (embedded) present |= 1u << (kEmbedded + j);
      const KeptBlock kept = flip(block, embedded ? 0 : call.sign);
      if (j != kFarSlot) {
        blocks[block_of(j)] = kept;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) far_block()[i * 32] = kept.operand[i];
      }
      present |= 1u << j;
      rings[j / 4] |= ring++ << 8 * (j % 4);
    }
    present = same(present), rings[0] = same(rings[0]), rings[1] = same(rings[1]);
  }
  __syncwarp();
  let_later_start();
  const auto receiver = [&] { return lane_of(piece) / 4 * 4; };
  const auto constants = [&](int which) { return load4(&tables.constants[which][receiver()]); };
  const auto row_of = [&](int column) { return column * (kRows / 2) + piece % 4; };  // in an item
  const auto gated = [&] { return (present & kGated) != 0; };
  const auto ring = [&](int j) {
    unsigned at;  // computed each time: lanes have no register to keep it in
    asm volatile("mad.lo.u32 %0, %1, 16, %2;"
                 : "=r"(at)
                 : "r"(piece), "r"((rings[j / 4] >> j % 4 * 8 & 0xff) * static_cast<unsigned>(kWideRingBytes)));
    return reinterpret_cast<uint4*>(reinterpret_cast<char*>(shared) + at);
  };
  const auto source = [&](int j) { return in_global<const bf16>(const_cast<bf16*>(tables.sources[j])); };
  // Slots [begin, end), all sixteen rows, also those that are not there: spare rows, of the next token or of other
  // streams, of which nothing comes. (Panels and carried spikes have such rows behind them.) All places first, then all
  // copies: they would wait for each place.
  const auto ask = [&](int begin, int end, int row0, unsigned slots) {
    const bf16* from[kSlots];
#pragma unroll
    for (int j = begin; j < end; ++j) from[j] = tables.sources[j];
#pragma unroll
    for (int j = begin; j < end; ++j) {
      if (!(slots >> j & 1)) continue;
      const bf16* const there = in_global<const bf16>(const_cast<bf16*>(from[j])) + (row0 * kBlock + piece * 8);
      uint4* const to = ring(j);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) __pipeline_memcpy_async(to + i * 32, there + i * kStepValues, sizeof(uint4));
    }
    __pipeline_commit();
  };
  uint32_t spoken = 0;
  const auto add_counts = [&] {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      add_count(tables.counts + receiver() + j, static_cast<int>(spoken >> (j / 2 + j % 2 * 2) * 8 & 0xff));
    }
    spoken = 0;
  };

  for (int first = 0; first < call.streams; first += call.stream_group) {
    const int streams = min(call.stream_group, call.streams - first), replicas = gridDim.x / call.base_grid,
              begin = same((blockIdx.x / call.base_grid + copy * replicas) * kWideStreams),
              stride = same(copies * replicas * kWideStreams);
    if (begin >= streams) break;
    const int chunks = same((streams - begin + stride - 1) / stride), before_last = (chunks - 1) * stride,
              last_left = same(min(streams - begin - before_last, kWideStreams)),
              leap = same(call.streams - before_last);
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int stream = first + min(begin + chunk * stride + row_of(i), streams - 1);
        recall(tables, stream, call.max_spike, states[chunk].past[i][piece], states[chunk].w[i][piece]);
      }
    }
    find_sources(call, 0, tables);
    int token = 0, chunk = 0, row0 = first + begin, left = chunks == 1 ? last_left : kWideStreams;
    ask(0, kFirstDrive, row0, present), ask(kFirstDrive, kFirstDelayed - 1, row0, present);
    ask(kFirstDelayed - 1, kFirstDelayed, row0, present), ask(kFirstDelayed, kSlots, row0, present);
#pragma unroll 1
    while (token < call.tokens) {
      // The item after this one; there is none where next_left is 0.
      const bool turn = chunk == chunks - 1;
      const int next_token = token + turn, next_chunk = turn ? 0 : chunk + 1, next_row0 = row0 + (turn ? leap : stride),
                next_left = next_token == call.tokens  ? 0
                            : next_chunk == chunks - 1 ? last_left
                                                       : kWideStreams;
      const unsigned asked = next_left ? present : 0;

      int age[kSteps];  // of the lane's row of each step: tokens since its stream's last reset
#pragma unroll
      for (int i = 0; i < kSteps && Resets; ++i) age[i] = call.age[row0 + min(i * kRows + piece / 4, left - 1)];

      Sums sums[kSteps];  // of the gates, then of the drives, then I
      const auto take = [&](int i, float4 x) {
        float (&to)[4][2] = sums[i / 2].x;
        to[0][i % 2] = x.x, to[1][i % 2] = x.y, to[2][i % 2] = x.z, to[3][i % 2] = x.w;
      };
      const auto give = [&](int i) {
        const float (&from)[4][2] = sums[i / 2].x;
        return float4{from[0][i % 2], from[1][i % 2], from[2][i % 2], from[3][i % 2]};
      };
      // Adds what slots say, once it is there.
      const auto hear = [&](auto first_slot, auto end_slot) {
        constexpr int kFirst = first_slot.value, kCount = end_slot.value - kFirst;
        uint4 heard[kCount][kSteps];
        __pipeline_wait_prior(kHearings - 1);  // but for those that were asked for later
        asm volatile("" ::: "memory");         // nothing is read before
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const uint4* const from = ring(kFirst + k);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) heard[k][i] = from[i * 32];
        }
        // Sign bits: whether this is still missing, of a row that is there, of a source that can be.
        const auto late = [&](int k, int i) {
          const unsigned x = unspoken(heard[k][i], call.sign) & (piece / 4 + i * kRows - left);
          return kFirst + k < kFirstDelayed ? x & ~(present << (31 - kEmbedded - kFirst - k)) : x;
        };
        const auto missing = [&] {
          unsigned all = 0;
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
#pragma unroll
            for (int i = 0; i < kSteps; ++i) all |= late(k, i);
          }
          return sign_bit(all);
        };
#pragma unroll 1
        while (__any_sync(0xffffffffu, missing())) {
          if (chunks > 1) __nanosleep(40);
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
              if (!sign_bit(late(k, i))) continue;
              heard[k][i] = peek(source(kFirst + k) + (row0 * kBlock + piece * 8 + i * kStepValues));
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
#pragma unroll
          for (int i = 0; i < kSteps && Resets && kFirst >= kFirstDelayed; ++i) {
            if (age[i] < tables.delays[kFirst + k - kFirstDelayed]) heard[k][i] = silent;
          }
          if constexpr (kFirst == kFarSlot) {
            KeptBlock block;
#pragma unroll
            for (int i = 0; i < 4; ++i) block.operand[i] = far_block()[i * 32];
            multiply_add(sums, block, heard[k]);
          } else {
            multiply_add(sums, blocks[block_of(kFirst + k)], heard[k]);
          }
        }
      };
      const auto ask_next = [&](int begin, int end) { ask(begin, end, next_row0, asked); };
      const auto offset = [](int i) { return i * (kRows / 2 * kBlock); };
      const auto own_panel = [&](bf16* panel) {
        return in_global<bf16>(panel) + ((row0 + row_of(0)) * kBlock + receiver());
      };
      const auto own = [&](int i) { return row_of(i) < left; };

#pragma unroll
      for (int i = 0; i < kSteps; ++i) zero(sums[i]);
      if (gated()) hear(Slot<0>{}, Slot<kFarSlot>{});
      if (present >> kFarSlot & 1) hear(Slot<kFarSlot>{}, Slot<kFirstDrive>{});
      ask_next(0, kFirstDrive);
      Four<bf16> gates[kColumns];
      if (gated()) {
        bf16* const g = own_panel(tables.g);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float4 x = give(i);
          gates[i] =
              pack<bf16>({gate_of(x.x, bf16{}), gate_of(x.y, bf16{}), gate_of(x.z, bf16{}), gate_of(x.w, bf16{})});
          store_if<false>(own(i), g + offset(i), gates[i]);
        }
      }
      const float4 bias = constants(5);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) take(i, bias);
      hear(Slot<kFirstDrive>{}, Slot<kFirstDelayed - 1>{});
      ask_next(kFirstDrive, kFirstDelayed - 1);
      if (present >> (kFirstDelayed - 1) & 1) hear(Slot<kFirstDelayed - 1>{}, Slot<kFirstDelayed>{});
      ask_next(kFirstDelayed - 1, kFirstDelayed);
      if (gated()) {
        bf16* const d = own_panel(tables.d);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float4 x = give(i), gate = unpack<bf16>(gates[i]);
          store_if<false>(own(i), d + offset(i), pack<bf16>(x));
          take(i, {x.x * gate.x, x.y * gate.y, x.z * gate.z, x.w * gate.w});
        }
      }
      if (present >> kFirstDelayed & 1) hear(Slot<kFirstDelayed>{}, Slot<kSlots - 1>{});
      if (present >> (kSlots - 1) & 1) hear(Slot<kSlots - 1>{}, Slot<kSlots>{});
      if (turn && next_token <= call.longest_delay) find_sources(call, next_token, tables);
      ask_next(kFirstDelayed, kSlots);

      // What the embedding says to the next token was written before the launch, and is far away by now.
      constexpr int kLines = kSteps * kStepValues * sizeof(bf16) / 128;
      static_assert(2 * kLines <= 32 && kEmbeddedDrive == kEmbeddedGate >> 1, "a line a lane");
      const int drives = piece / kLines;  // or gates
      if (piece < 2 * kLines && present & kEmbeddedGate >> drives && token < call.tokens - 1) {
        const bf16* there = tables.sources[drives * kFirstDrive] + (row0 + call.streams) * kBlock;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(there + piece % kLines * 64));
      }

      WideState& state = states[chunk];
      const bool last = token == call.tokens - 1;  // then v itself is kept, for the calls after this one
      float alpha[4], gain[4];
      as_array(alpha, constants(0)), as_array(gain, constants(1));
      bf16 *const s_at = own_panel(tables.s), *const u_at = own_panel(tables.u);
      const auto begins = [&](int i) {  // a stream of the lane, after a reset
        return Resets && __shfl_sync(0xffffffffu, age[i / 2], (piece % 4 * 2 + i % 2) * 4) == 0;
      };
      float v[kColumns][4];
      Four<bf16> spikes[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        float past[4], s[4];
        as_array(past, state.past[i][piece]), as_array(v[i], give(i));
        if (begins(i)) as_array(past, float4{0, 0, 0, 0});
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[i][j] = fmaf(gain[j], v[i][j], past[j]);
          s[j] = emit(v[i][j], call.max_spike);
        }
        spikes[i] = pack<bf16>({s[0], s[1], s[2], s[3]});
        store_if<true>(own(i), s_at + offset(i), flip(spikes[i], call.sign));
        store_if<false>(own(i), u_at + offset(i),
                        pack<bf16>({v[i][0] - 1.0f, v[i][1] - 1.0f, v[i][2] - 1.0f, v[i][3] - 1.0f}));
        spoken += own(i) ? spikes_of(spikes[i]) : 0;
      }
      float rho[4], a[4], b[4];
      as_array(rho, constants(2)), as_array(a, constants(3)), as_array(b, constants(4));
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        float past[4], w[4], s[4];
        as_array(w, state.w[i][piece]), as_array(s, unpack<bf16>(spikes[i]));
        if (begins(i)) as_array(w, float4{0, 0, 0, 0});
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w[j] = fmaf(rho[j], w[j], fmaf(a[j], v[i][j], b[j] * s[j]));
          past[j] = last ? v[i][j] : past_of(v[i][j], w[j], s[j], alpha[j]);
        }
        state.past[i][piece] = {past[0], past[1], past[2], past[3]};
        state.w[i][piece] = {w[0], w[1], w[2], w[3]};
      }
      if (last) {
#pragma unroll 1
        for (int i = 0; i < kColumns; ++i) {
          if (!own(i)) continue;
          const int stream = row0 - token * call.streams + row_of(i);
          remember(tables, stream, state.past[i][piece], state.w[i][piece], call.verdict);
        }
      }
      if (turn && (next_token & counted) == 0) add_counts();
      token = next_token, chunk = next_chunk, row0 = next_row0, left = next_left;
    }
    add_counts();
  }
}

}  // namespace

const void* wide_kernel(bool resets) {
  return resets ? reinterpret_cast<const void*>(&run_wide_kernel<true>)
                : reinterpret_cast<const void*>(&run_wide_kernel<false>);
}

}  // namespace neurogen::cuda
