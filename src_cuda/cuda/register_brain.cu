// The brain launch where every tile has a warp of its own. Its blocks of weights stay in that warp's registers for the
// whole call, the last of them in shared memory, which is otherwise left to v and w.
//
// A warp goes through the tokens of its tile, eight streams at a time, and waits for the spikes it needs as in
// brain.cuh; it never holds up another tile. One stream (`base` on an H200): 3.35 -> 1.54 us a tick, since nothing lies
// between the arrival of a spike and the tensor core. Many streams: spikes of the next eight are asked for while the
// present ones are worked on, 14.6 -> 13.9 us at 64. Cost: connectomes alone where a tile has few terms
// (kRegisterSlots) and a multiprocessor no more tiles than warps.
//
// Every kind of term has places, so that nothing has to find out which kind comes next; empty ones multiply by zeros.
// The order of every sum is that of run_tile(), which calls with resets go to: the same to the last bit.
#include <algorithm>
#include <map>

#include "brain.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kThreads = kRegisterWarps * 32;
constexpr int kFirstDrive = kRegisterSlots[0], kFirstDelayed = kFirstDrive + kRegisterSlots[1],
              kSlots = kFirstDelayed + kRegisterSlots[2];
constexpr int kBlockPieces = kBlockArea * sizeof(bf16) / sizeof(uint4);
constexpr unsigned kGated = 1u << 31, kEmbeddedGate = 1u << 30, kEmbeddedDrive = 1u << 29;
constexpr uint32_t kOnes = 0x3f803f80;  // two of bf16
constexpr int kCountedTokens = 512;     // after so many, counts of 16 bits are added to those in memory

// past and w of eight streams (one, where Columns is 1) in a lane's order.
template <int Columns>
struct KeptState {
  float4 past[Columns][32], w[Columns][32];
};

// A neuron's constants, for the lane's four.
struct Constants {
  float alpha[4], gain[4], rho[4], a[4], b[4];
  __device__ explicit Constants(const float* tile) {  // [5][32]
    const float* from = tile + lane_receiver();
    as_array(alpha, load4(from)), as_array(gain, load4(from + kBlock)), as_array(rho, load4(from + 2 * kBlock));
    as_array(a, load4(from + 3 * kBlock)), as_array(b, load4(from + 4 * kBlock));
  }
};

// Of a warp, in shared memory.
struct WarpTables {
  float constants[6][kBlock];   // the sixth: biases
  const bf16* sources[kSlots];  // so that row r of the call is kBlock r values further
  bf16 *u, *s, *d, *g;          // row 0
};

// The slot's block among those in registers, -1 = it is in shared memory.
template <bool Single>
__host__ __device__ constexpr int held_block(int slot) {
  const int kind = slot < kFirstDrive     ? 0
                   : slot < kFirstDelayed ? 1
                                          : 2,
            at = slot - (kind == 0   ? 0
                         : kind == 1 ? kFirstDrive
                                     : kFirstDelayed);
  if (at >= register_held<Single>(kind)) return -1;
  return at + (kind > 0 ? register_held<Single>(0) : 0) + (kind > 1 ? register_held<Single>(1) : 0);
}
// Bits: first slots that hear the embedding.
__device__ inline unsigned known_slots(unsigned present) {
  return (present & kEmbeddedGate ? 1u : 0) | (present & kEmbeddedDrive ? 1u << kFirstDrive : 0);
}
template <bool Single>
__host__ __device__ constexpr unsigned near_slots() {
  unsigned bits = 0;
  for (int j = 0; j < kSlots; ++j) bits |= held_block<Single>(j) < 0 ? 1u << j : 0;
  return bits;
}
static_assert(sizeof(WarpTables) == kRegisterTableBytes, "the host plans with it");
static_assert(sizeof(WarpTables) % sizeof(uint4) == 0, "states follow");
static_assert(sizeof(KeptState<2>) == register_state_bytes(2) && sizeof(KeptState<1>) == register_state_bytes(1),
              "the host plans with it");

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

// Where the spikes that each term needs for a token are: those of earlier calls are [K, S] rows, newest first.
__device__ void find_sources(const BrainCall& call, int token, WarpTables& tables) {
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
  }
  __syncwarp();
}

// v and w of earlier calls.
template <int Columns>
__device__ void recall(const BrainCall& call, int stream, int last_stream, const WarpTables& tables,
                       KeptState<Columns>& state) {
  const BrainTile& tile = *Place(call).tile;
  const StateView& from = call.states[tile.region];
#pragma unroll
  for (int i = 0; i < Columns; ++i) {
    const int64_t cell =
        int64_t{min(stream + i, last_stream)} * call.regions[tile.region].n + tile.offset + lane_receiver();
    float past[4], w[4];
    as_array(past, load4(from.v + cell)), as_array(w, load4(from.w + cell));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      past[j] = past_of(past[j], w[j], rounded<bf16>(emit(past[j], call.max_spike)),
                        tables.constants[0][lane_receiver() + j]);
    }
    state.past[i][threadIdx.x % 32] = {past[0], past[1], past[2], past[3]};
    state.w[i][threadIdx.x % 32] = {w[0], w[1], w[2], w[3]};
  }
}

// v and w for later calls.
__device__ void remember(const BrainCall& call, int stream, const float (&v)[4], const float (&w)[4]) {
  const BrainTile& tile = *Place(call).tile;
  const StateView& to = call.states[tile.region];
  const int64_t cell = int64_t{stream} * call.regions[tile.region].n + tile.offset + lane_receiver();
  store4(to.next_v + cell, {v[0], v[1], v[2], v[3]});
  store4(to.next_w + cell, {w[0], w[1], w[2], w[3]});
  bool sound = true;
#pragma unroll
  for (int j = 0; j < 4; ++j) sound &= fabsf(v[j]) <= kLargestState && fabsf(w[j]) <= kLargestState;
  if (!sound) atomicOr(&call.verdict->state_not_finite, 1);
}

// Spikes counted so far, to memory: whole numbers, exact in any order.
__device__ void add_counts(const BrainCall& call, uint32_t (&spoken)[2]) {
  const BrainTile& tile = *Place(call).tile;
  int* counts = call.regions[tile.region].spike_count + tile.offset + lane_receiver();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int sum = static_cast<int>(j % 2 ? spoken[j / 2] >> 16 : spoken[j / 2] & 0xffff);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (threadIdx.x % 4 == 0 && sum) atomicAdd(counts + j, sum);
  }
  spoken[0] = spoken[1] = 0;
}

// Single: a warp has eight streams or fewer, and waits for others most of the time; no spike is asked for before it can
// be there. Columns: 1 where there is one stream.
template <int Columns, bool Single>
__global__ void __launch_bounds__(kThreads, 1)
    run_register_kernel(const __grid_constant__ BrainCall call, int copies, int most_chunks) {
  constexpr unsigned kNearSlots = near_slots<Single>();  // bits: slots whose blocks are in shared memory
  extern __shared__ uint4 shared[];
  using State = KeptState<Columns>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int tiles = call.shares[blockIdx.x % call.base_grid].tiles, copy = warp / tiles;  // several warps have a tile
  WarpTables* const all_tables = reinterpret_cast<WarpTables*>(shared);
  State* const all_states = reinterpret_cast<State*>(all_tables + warps);
  uint4* const rings = reinterpret_cast<uint4*>(all_states + warps * most_chunks);
  uint4* const ring = rings + warp * (kSlots * 32) + lane;  // what this lane has asked for, slot after slot; not Single
  uint4* near = rings + (Single ? 0 : warps * kSlots * 32);  // blocks that are not in registers
  WarpTables& tables = all_tables[warp];
  State* const states = all_states + warp * most_chunks;
  unsigned present;  // bits: slots that are not empty; kGated; whether the first of its kind hears the embedding
  KeptBlock blocks[register_held<Single>(0) + register_held<Single>(1) + register_held<Single>(2)];
  {
    const Place place(call);
    const BrainTile& tile = *place.tile;
    for (int i = 0; i < 5; ++i) tables.constants[i][lane] = tile.constants[i * kBlock + lane];
    tables.constants[5][lane] = tile.bias[lane];
    present = (tile.gated ? kGated : 0) | (tile.heard[0] ? kEmbeddedGate : 0) | (tile.heard[1] ? kEmbeddedDrive : 0);
    if (lane == 0) {
      tables.u = static_cast<bf16*>(tile.u), tables.s = static_cast<bf16*>(tile.s);
      tables.d = static_cast<bf16*>(tile.d), tables.g = static_cast<bf16*>(tile.g);
    }
    const int before = lane < place.own ? register_near<Single>(place.tile[lane - place.own].terms) : 0;
    near += warp_sum(before) * kBlockPieces;
    uint4* to = near;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const Term* const term = place.term(j);
      BlockWeights<bf16> block = {};
      if (term) {
        block.load(static_cast<const bf16*>(call.weights) + int64_t{term->block} * kBlockArea);
        present |= 1u << j;
      }
      const KeptBlock kept(block);
      if (held_block<Single>(j) >= 0) {
        blocks[max(held_block<Single>(j), 0)] = kept;
      } else if (term) {
#pragma unroll
        for (int i = 0; i < 4 && copy == 0; ++i) to[i * 32 + lane] = kept.operand[i];
        to += kBlockPieces;
      }
    }
  }
  __syncthreads();
  if (copy >= copies) return;
  const auto gated = [&] { return (present & kGated) != 0; };
  const auto panel = [](bf16* at, int place) { return in_global<bf16>(at) + place; };

  Sources<bf16> sources[kSlots] = {};  // of empty slots: zeros
  static_assert(kSlots * 32 * sizeof(uint4) == kRegisterRingBytes, "the host plans with it");
  const auto source_at = [&](int j, int row0) {
    return in_global<const bf16>(const_cast<bf16*>(tables.sources[j])) + (row0 * kBlock + lane * 8);
  };
  const auto ask = [&](int j, int row0, unsigned wanted) {
    if (!(wanted >> j & 1)) return;
    if (Single) {
      sources[j].raw = peek(source_at(j, row0));
    } else {
      __pipeline_memcpy_async(ring + j * 32, source_at(j, row0), sizeof(uint4));
    }
  };
  const auto asked_for_kind = [&](int j) {  // j: the slot after
    if (!Single && (j == kFirstDrive || j == kFirstDelayed || j == kSlots)) __pipeline_commit();
  };
  const auto wanted = [&](int left) { return lane / 4 < left ? present : 0; };
  // Single: what the first gate and the first drive hear of the embedding, a token ahead.
  Sources<bf16> gate_ahead{}, drive_ahead{};
  const auto ask_embedding = [&](int row0, int left) {
    if (lane / 4 >= left) return;
    if (present & kEmbeddedGate) gate_ahead.raw = peek(source_at(0, row0));
    if (present & kEmbeddedDrive) drive_ahead.raw = peek(source_at(kFirstDrive, row0));
  };
  uint32_t spoken[2] = {0, 0};

  const int replicas = gridDim.x / call.base_grid, begin = (blockIdx.x / call.base_grid + copy * replicas) * kRows,
            stride = copies * replicas * kRows;
  for (int first = 0; first < call.streams; first += call.stream_group) {
    const int streams = min(call.stream_group, call.streams - first);
    if (begin >= streams) break;
    const int chunks = Single ? 1 : (streams - begin + stride - 1) / stride;
    const int last_left = min(streams - begin - (chunks - 1) * stride, kRows);
    for (int c = 0; c < chunks; ++c) {
      recall(call, first + begin + c * stride + lane_row(), first + streams - 1, tables, states[c]);
    }
    find_sources(call, 0, tables);
    int row0 = first + begin, left = chunks == 1 ? last_left : kRows;
    if (!Single) {
#pragma unroll
      for (int j = 0; j < kSlots; ++j) ask(j, row0, wanted(left)), asked_for_kind(j + 1);
    }
    if (Single) ask_embedding(row0, left);
    int token = 0, chunk = 0;
#pragma unroll 1
    while (token < call.tokens) {
      // The item after this one; there is none where next_left is 0.
      const bool turn = Single || chunk == chunks - 1;
      const int next_token = token + turn, next_chunk = turn ? 0 : chunk + 1,
                next_row0 = row0 + (turn ? call.streams - (chunks - 1) * stride : stride),
                next_left = next_token == call.tokens  ? 0
                            : next_chunk == chunks - 1 ? last_left
                                                       : kRows;
      const unsigned now_wanted = wanted(left), next_wanted = wanted(next_left);
      // Waits for slots from `begin` on, asking for what is missing together.
      const auto settle = [&](int begin, int end) {
        if (!Single) {
          __pipeline_wait_prior(2);  // of the three kinds: the two that were asked for later
#pragma unroll
          for (int j = begin; j < end; ++j) {
            sources[j].raw = now_wanted >> j & 1 ? ring[j * 32] : uint4{0, 0, 0, 0};
          }
        }
        const auto missing = [&] {  // one comparison for all: no other word is as large
          unsigned largest = 0;
#pragma unroll
          for (int j = begin; j < end; ++j) largest = max(largest, max(sources[j].raw.x, sources[j].raw.z));
          return largest == ~0u;
        };
#pragma unroll 1
        while (__any_sync(0xffffffffu, missing())) {
          if (!Single) __nanosleep(40);
#pragma unroll
          for (int j = begin; j < end; ++j) {
            if (absent(sources[j].raw)) sources[j].raw = peek(source_at(j, row0));
          }
        }
      };
      Sums sums, drives;  // sums: of the gates, then of the drives, then I
      const auto take = [&](int i, float4 x) {
        sums.x[0][i] = x.x, sums.x[1][i] = x.y, sums.x[2][i] = x.z, sums.x[3][i] = x.w;
      };
      const auto give = [&](int i) { return float4{sums.x[0][i], sums.x[1][i], sums.x[2][i], sums.x[3][i]}; };
      const auto begin_drives = [&] {
        const float4 bias = load4(&tables.constants[5][lane_receiver()]);
#pragma unroll
        for (int i = 0; i < Columns; ++i) {
          drives.x[0][i] = bias.x, drives.x[1][i] = bias.y, drives.x[2][i] = bias.z, drives.x[3][i] = bias.w;
        }
      };
      zero(sums);
      if (Single) {
        const unsigned known = known_slots(present), spikes = wanted(left) & ~known;
#pragma unroll
        for (int j = 0; j < kSlots; ++j) ask(j, row0, spikes);
        // The embedding's products are made while spikes are on their way.
        begin_drives();
        if (known & 1) multiply_add(sums, blocks[held_block<Single>(0)], gate_ahead);
        if (known >> kFirstDrive & 1) multiply_add(drives, blocks[held_block<Single>(kFirstDrive)], drive_ahead);
        ask_embedding(next_row0, next_left);
        settle(0, kSlots);
      }
      const int place = (row0 + lane_row()) * kBlock + lane_receiver();
      const auto multiply = [&](int j) {
        if (Single && known_slots(present) >> j & 1) return;
        if (held_block<Single>(j) >= 0) {
          multiply_add(sums, blocks[max(held_block<Single>(j), 0)], sources[j]);
        } else if (present >> j & 1) {
          KeptBlock block;
          block.load(near + __popc(present & kNearSlots & ((1u << j) - 1)) * kBlockPieces);
          multiply_add(sums, block, sources[j]);
        }
        if (!Single) ask(j, next_row0, next_wanted), asked_for_kind(j + 1);
      };
      if (!Single) settle(0, kFirstDrive);
#pragma unroll
      for (int j = 0; j < kFirstDrive; ++j) multiply(j);
      if (!Single) begin_drives();
      Four<bf16> gates[Columns];
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        const float4 x = give(i);
        gates[i] = pack<bf16>({gate_of(x.x, bf16{}), gate_of(x.y, bf16{}), gate_of(x.z, bf16{}), gate_of(x.w, bf16{})});
        if (!gated()) gates[i].raw = {kOnes, kOnes};
        if (gated() && lane_row() + i < left) put4(panel(tables.g, place + i * kBlock), gates[i]);
      }
      sums = drives;
      if (!Single) settle(kFirstDrive, kFirstDelayed);
#pragma unroll
      for (int j = kFirstDrive; j < kFirstDelayed; ++j) multiply(j);
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        const float4 x = give(i), gate = unpack<bf16>(gates[i]);
        if (gated() && lane_row() + i < left) put4(panel(tables.d, place + i * kBlock), pack<bf16>(x));
        take(i, {x.x * gate.x, x.y * gate.y, x.z * gate.z, x.w * gate.w});
      }
      if (!Single) settle(kFirstDelayed, kSlots);
      if (turn && next_token <= call.longest_delay) find_sources(call, next_token, tables);  // of delayed terms
#pragma unroll
      for (int j = kFirstDelayed; j < kSlots; ++j) multiply(j);

      // What the embedding says to the next token was written before the launch, and is far away by now.
      constexpr int kLines = kStepValues * sizeof(bf16) / 128;
      if (lane < 2 * kLines && present & (lane < kLines ? kEmbeddedGate : kEmbeddedDrive) && token < call.tokens - 1) {
        const bf16* next = tables.sources[lane < kLines ? 0 : kFirstDrive] + (row0 + call.streams) * kBlock;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(next + lane % kLines * 64));
      }

      State& state = states[chunk];
      const Constants constants(&tables.constants[0][0]);
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        float past[4], w[4], v[4], s[4];
        as_array(past, state.past[i][lane]), as_array(w, state.w[i][lane]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = fmaf(constants.gain[j], sums.x[j][i], past[j]);
          s[j] = emit(v[j], call.max_spike);
        }
        const Four<bf16> spikes = pack<bf16>({s[0], s[1], s[2], s[3]});
        const bool own = lane_row() + i < left;
        if (own) {
          speak4(panel(tables.s, place + i * kBlock), spikes);
          put4(panel(tables.u, place + i * kBlock), pack<bf16>({v[0] - 1.0f, v[1] - 1.0f, v[2] - 1.0f, v[3] - 1.0f}));
          Spoken these;
          these.add(spikes);
          spoken[0] += these.pair[0], spoken[1] += these.pair[1];
        }
        as_array(s, unpack<bf16>(spikes));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w[j] = fmaf(constants.rho[j], w[j], fmaf(constants.a[j], v[j], constants.b[j] * s[j]));
          past[j] = past_of(v[j], w[j], s[j], constants.alpha[j]);
        }
        state.past[i][lane] = {past[0], past[1], past[2], past[3]};
        state.w[i][lane] = {w[0], w[1], w[2], w[3]};
        if (token == call.tokens - 1 && own) remember(call, row0 - token * call.streams + lane_row() + i, v, w);
      }
      if (turn && next_token % kCountedTokens == 0) add_counts(call, spoken);
      token = next_token, chunk = next_chunk, row0 = next_row0, left = next_left;
    }
    add_counts(call, spoken);
  }
}

}  // namespace

bool CudaModel::run_register_brain(const BrainPlan& plan) {
  const RegisterShape shape = register_shape(plan, call_streams_);
  if (shape.group == 0 || has_resets_) return false;
  BrainCall call = brain_call(plan);
  call.stream_group = shape.group;
  call.longest_delay = *std::max_element(history_.begin(), history_.end());
  const auto kernel = shape.chunks > 1     ? run_register_kernel<2, false>
                      : call_streams_ == 1 ? run_register_kernel<1, true>
                                           : run_register_kernel<2, true>;
  NG_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)));
  int copies = shape.copies, chunks = shape.chunks;
  void* arguments[] = {&call, &copies, &chunks};
  NG_CUDA(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(shape.grid),
                                      dim3(plan.most_tiles * copies * 32), arguments, shape.shared_bytes,
                                      stream_.get()));
  launched();
  return true;
}

// As many streams at a time as there is shared memory for.
RegisterShape CudaModel::register_shape(const BrainPlan& plan, int streams) const {
  if (plan.most_near < 0 || !spec_.bf16 || spec_.dropout > 0 || dense_shape(streams).group > 0) return {};
  const int columns = streams == 1 ? 1 : 2, limit = stream_group_ ? std::min(stream_group_, streams) : streams;
  RegisterShape shape{};
  for (int passes = 1; passes <= limit; ++passes) {
    shape.group = ((limit + passes - 1) / passes + kRows - 1) / kRows * kRows;
    const int pieces = shape.group / kRows, replicas = std::min(replicas_, pieces);
    shape.copies = std::min(kRegisterWarps / plan.most_tiles, (pieces + replicas - 1) / replicas);
    shape.chunks = (pieces + replicas * shape.copies - 1) / (replicas * shape.copies);
    shape.grid = base_grid_ * replicas;
    shape.shared_bytes = plan.most_tiles * shape.copies *
                             (kRegisterTableBytes + shape.chunks * register_state_bytes(columns) +
                              (shape.chunks > 1 ? kRegisterRingBytes : 0)) +
                         (shape.chunks > 1 ? plan.most_near : plan.most_near_single) * kBlockArea * sizeof(bf16);
    if (shape.shared_bytes <= shared_limit_) break;
    shape = {};
  }
  return shape;
}

void CudaModel::describe_registers(const RegisterShape& shape, const BrainPlan& plan,
                                   std::vector<std::pair<std::string, std::string>>& out) const {
  if (shape.group == 0) return;
  const auto kib = [](size_t bytes) { return std::to_string((bytes + 512) >> 10) + " KiB"; };
  const int near = shape.chunks > 1 ? plan.most_near : plan.most_near_single, warps = plan.most_tiles * shape.copies;
  const std::map<std::string, std::string> said = {
      {"brain launch", std::to_string(shape.grid) + " blocks of " + std::to_string(warps * 32) + " threads, " +
                           (shape.copies == 1 ? "a warp" : std::to_string(shape.copies) + " warps") +
                           " a tile, shared memory of each: " + kib(shape.shared_bytes)},
      {"streams at a time", std::to_string(std::min(shape.group, spec_.streams))},
      {"v and w", "in shared memory"},
      {"weights between neurons",
       "in registers, but for up to " + kib(near * kBlockArea * sizeof(bf16)) + " in the shared memory of a block"}};
  for (auto& [name, value] : out) {
    if (const auto row = said.find(name); row != said.end()) value = row->second;
  }
}

}  // namespace neurogen::cuda
