// The brain launch of few streams where every tile has a warp of its own (register_brain.cuh): up to eight a warp. Its
// blocks of weights stay in that warp's registers for the whole call, the last of them in shared memory.
//
// `base`, one stream on an H200: 3.35 -> 1.54 us a tick, since nothing lies between the arrival of a spike and the
// tensor core; no spike is asked for before it can be there. Cost: connectomes alone where a tile has few terms
// (kRegisterSlots) and a multiprocessor no more tiles than warps.
#include <algorithm>
#include <map>

#include "dependent.cuh"
#include "register_brain.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kThreads = kRegisterWarps * 32;
constexpr int kBlockPieces = kBlockArea * sizeof(bf16) / sizeof(uint4);
constexpr int kHeldBlocks = register_held(0) + register_held(1) + register_held(2);
constexpr uint32_t kOnes = 0x3f803f80;  // two of bf16
constexpr int kCountedTokens = 512;     // after so many, counts of 16 bits are added to those in memory

// past and w of eight streams (one, where Columns is 1) in a lane's order.
template <int Columns>
struct KeptState {
  float4 past[Columns][32], w[Columns][32];
};
static_assert(sizeof(KeptState<2>) == register_state_bytes(2) && sizeof(KeptState<1>) == register_state_bytes(1),
              "the host plans with it");

// The slot's block among those in registers, -1 = it is in shared memory.
__host__ __device__ constexpr int held_block(int slot) {
  const int kind = slot < kFirstDrive ? 0 : slot < kFirstDelayed ? 1 : 2;
  const int at = slot - (kind == 0 ? 0 : kind == 1 ? kFirstDrive : kFirstDelayed);
  if (at >= register_held(kind)) return -1;
  return at + (kind > 0 ? register_held(0) : 0) + (kind > 1 ? register_held(1) : 0);
}
// Bits: first slots that hear the embedding.
__device__ inline unsigned known_slots(unsigned present) {
  return (present & kEmbeddedGate ? 1u : 0) | (present & kEmbeddedDrive ? 1u << kFirstDrive : 0);
}
__host__ __device__ constexpr unsigned near_slots() {
  unsigned bits = 0;
  for (int j = 0; j < kSlots; ++j) bits |= held_block(j) < 0 ? 1u << j : 0;
  return bits;
}

// Columns: 1 where there is one stream.
template <int Columns, bool Resets>
__global__ void __launch_bounds__(kThreads, 1) run_register_kernel(const __grid_constant__ BrainCall call, int copies) {
  constexpr unsigned kNearSlots = near_slots();  // bits: slots whose blocks are in shared memory
  extern __shared__ uint4 shared[];
  using State = KeptState<Columns>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int tiles = call.shares[blockIdx.x % call.base_grid].tiles, copy = warp / tiles;  // several warps have a tile
  WarpTables* const all_tables = reinterpret_cast<WarpTables*>(shared);
  State* const all_states = reinterpret_cast<State*>(all_tables + warps);
  uint4* near = reinterpret_cast<uint4*>(all_states + warps);  // blocks that are not in registers
  WarpTables& tables = all_tables[warp];
  State& state = all_states[warp];
  unsigned present;  // bits: slots that are not empty; kGated; whether the first of its kind hears the embedding
  KeptBlock blocks[kHeldBlocks];
  {
    const Place place(call);
    present = fill_tables(call, *place.tile, tables);
    const int before = lane < place.own ? register_near(place.tile[lane - place.own].terms) : 0;
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
      if (held_block(j) >= 0) {
        blocks[max(held_block(j), 0)] = kept;
      } else if (term) {
#pragma unroll
        for (int i = 0; i < 4 && copy == 0; ++i) to[i * 32 + lane] = kept.operand[i];
        to += kBlockPieces;
      }
    }
  }
  __syncthreads();
  let_later_start();
  if (copy >= copies) return;
  const auto gated = [&] { return (present & kGated) != 0; };
  const auto panel = [](bf16* at, int place) { return in_global<bf16>(at) + place; };

  Sources<bf16> sources[kSlots] = {};  // of empty slots: zeros
  const auto source_at = [&](int j, int row0) {
    return in_global<const bf16>(const_cast<bf16*>(tables.sources[j])) + (row0 * kBlock + lane * 8);
  };
  // What the first gate and the first drive hear of the embedding, a token ahead.
  Sources<bf16> gate_ahead{}, drive_ahead{};
  const auto ask_embedding = [&](int row0, int left) {
    if (lane / 4 >= left) return;
    if (present & kEmbeddedGate) gate_ahead.raw = peek(source_at(0, row0));
    if (present & kEmbeddedDrive) drive_ahead.raw = peek(source_at(kFirstDrive, row0));
  };
  uint32_t spoken[2] = {0, 0};
  const auto add_counts = [&] {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t count = j % 2 ? spoken[j / 2] >> 16 : spoken[j / 2] & 0xffff;
      add_count(tables.counts + lane_receiver() + j, static_cast<int>(count));
    }
    spoken[0] = spoken[1] = 0;
  };

  const int replicas = gridDim.x / call.base_grid, begin = (blockIdx.x / call.base_grid + copy * replicas) * kRows;
  for (int first = 0; first < call.streams; first += call.stream_group) {
    const int streams = min(call.stream_group, call.streams - first);
    if (begin >= streams) break;
    const int left = min(streams - begin, kRows);
    const unsigned wanted = lane / 4 < left ? present : 0, known = known_slots(present);
#pragma unroll
    for (int i = 0; i < Columns; ++i) {
      const int stream = first + min(begin + lane_row() + i, streams - 1);
      recall(tables, stream, call.max_spike, state.past[i][lane], state.w[i][lane]);
    }
    find_sources(call, 0, tables);
    int row0 = first + begin;
    ask_embedding(row0, left);
#pragma unroll 1
    for (int token = 0; token < call.tokens; ++token, row0 += call.streams) {
      Sums sums, drives;  // sums: of the gates, then of the drives, then I
      const auto take = [&](int i, float4 x) {
        sums.x[0][i] = x.x, sums.x[1][i] = x.y, sums.x[2][i] = x.z, sums.x[3][i] = x.w;
      };
      const auto give = [&](int i) { return float4{sums.x[0][i], sums.x[1][i], sums.x[2][i], sums.x[3][i]}; };
      zero(sums);
      int age = kForever;  // of the lane's row: tokens since its stream's last reset
      if (Resets && lane / 4 < left) age = call.age[row0 + lane / 4];
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        if ((wanted & ~known) >> j & 1) sources[j].raw = peek(source_at(j, row0));
      }
      // The embedding's products are made while spikes are on their way.
      const float4 bias = load4(&tables.constants[5][lane_receiver()]);
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        drives.x[0][i] = bias.x, drives.x[1][i] = bias.y, drives.x[2][i] = bias.z, drives.x[3][i] = bias.w;
      }
      if (known & 1) multiply_add(sums, blocks[held_block(0)], gate_ahead);
      if (known >> kFirstDrive & 1) multiply_add(drives, blocks[held_block(kFirstDrive)], drive_ahead);
      ask_embedding(row0 + call.streams, token + 1 < call.tokens ? left : 0);
      const auto missing = [&] {  // one comparison for all: no other word is as large
        unsigned largest = 0;
#pragma unroll
        for (int j = 0; j < kSlots; ++j) largest = max(largest, max(sources[j].raw.x, sources[j].raw.z));
        return largest == ~0u;
      };
#pragma unroll 1
      while (__any_sync(0xffffffffu, missing())) {
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
          if (absent(sources[j].raw)) sources[j].raw = peek(source_at(j, row0));
        }
      }
#pragma unroll
      for (int j = kFirstDelayed; j < kSlots && Resets; ++j) sources[j].mask(age >= tables.delays[j - kFirstDelayed]);
      const int place = (row0 + lane_row()) * kBlock + lane_receiver();
      const auto multiply = [&](int j) {
        if (known >> j & 1) return;
        if (held_block(j) >= 0) {
          multiply_add(sums, blocks[max(held_block(j), 0)], sources[j]);
        } else if (present >> j & 1) {
          KeptBlock block;
          block.load(near + __popc(present & kNearSlots & ((1u << j) - 1)) * kBlockPieces);
          multiply_add(sums, block, sources[j]);
        }
      };
#pragma unroll
      for (int j = 0; j < kFirstDrive; ++j) multiply(j);
      Four<bf16> gates[Columns];
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        const float4 x = give(i);
        gates[i] = pack<bf16>({gate_of(x.x, bf16{}), gate_of(x.y, bf16{}), gate_of(x.z, bf16{}), gate_of(x.w, bf16{})});
        if (!gated()) gates[i].raw = {kOnes, kOnes};
        if (gated() && lane_row() + i < left) put4(panel(tables.g, place + i * kBlock), gates[i]);
      }
      sums = drives;
#pragma unroll
      for (int j = kFirstDrive; j < kFirstDelayed; ++j) multiply(j);
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        const float4 x = give(i), gate = unpack<bf16>(gates[i]);
        if (gated() && lane_row() + i < left) put4(panel(tables.d, place + i * kBlock), pack<bf16>(x));
        take(i, {x.x * gate.x, x.y * gate.y, x.z * gate.z, x.w * gate.w});
      }
      if (token < call.longest_delay) find_sources(call, token + 1, tables);  // of delayed terms
#pragma unroll
      for (int j = kFirstDelayed; j < kSlots; ++j) multiply(j);

      // What the embedding says to the next token was written before the launch, and is far away by now.
      constexpr int kLines = kStepValues * sizeof(bf16) / 128;
      if (lane < 2 * kLines && present & (lane < kLines ? kEmbeddedGate : kEmbeddedDrive) && token < call.tokens - 1) {
        const bf16* next = tables.sources[lane < kLines ? 0 : kFirstDrive] + (row0 + call.streams) * kBlock;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(next + lane % kLines * 64));
      }

      const Constants constants(&tables.constants[0][lane_receiver()]);
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        float past[4], w[4], v[4], s[4];
        as_array(past, state.past[i][lane]), as_array(w, state.w[i][lane]);
        if (Resets && __shfl_sync(0xffffffffu, age, (lane_row() + i) * 4) == 0) {
          as_array(past, float4{0, 0, 0, 0}), as_array(w, float4{0, 0, 0, 0});
        }
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
        if (token == call.tokens - 1 && own) {
          remember(tables, first + begin + lane_row() + i, {v[0], v[1], v[2], v[3]}, {w[0], w[1], w[2], w[3]},
                   call.verdict);
        }
      }
      if ((token + 1) % kCountedTokens == 0) add_counts();
    }
    add_counts();
  }
}

}  // namespace

bool CudaModel::run_register_brain(const BrainPlan& plan) {
  const RegisterShape shape = call_shape(plan);
  if (shape.group == 0) return false;
  BrainCall call = brain_call(plan);
  call.stream_group = shape.group;
  call.longest_delay = *std::max_element(history_.begin(), history_.end());
  const auto few = [&](auto resets) {
    constexpr bool kResets = decltype(resets)::value;
    return call_streams_ == 1 ? reinterpret_cast<const void*>(&run_register_kernel<1, kResets>)
                              : reinterpret_cast<const void*>(&run_register_kernel<2, kResets>);
  };
  const void* kernel = shape.wide    ? wide_kernel(has_resets_)
                       : has_resets_ ? few(std::true_type{})
                                     : few(std::false_type{});
  NG_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)));
  if (starts_early()) take_shared_memory(kernel);
  int copies = shape.copies, chunks = shape.chunks, counted = 1;  // tokens until counts of a byte may be full
  while (2 * counted * chunks * kWideColumns <= 0xff) counted *= 2;
  --counted;
  void* arguments[] = {&call, &copies, &chunks, &counted};  // the launch of few streams takes the first two
  NG_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(shape.grid), dim3(plan.most_tiles * copies * 32), arguments,
                                      shape.shared_bytes, stream_.get()));
  launched();
  return true;
}

RegisterShape CudaModel::call_shape(const BrainPlan& plan) const {
  return brain_wanted_ == "sparse" ? RegisterShape{} : register_shape(plan, call_streams_);
}

// Few streams: all at once, if there are warps enough for that. Many: as many at a time as there is shared memory for.
RegisterShape CudaModel::register_shape(const BrainPlan& plan, int streams) const {
  if (!plan.in_registers || !spec_.bf16 || spec_.dropout > 0 || dense_shape(streams).group > 0) return {};
  const int limit = stream_group_ ? std::min(stream_group_, streams) : streams;
  const auto shape_of = [&](int group, int each, int most_warps) {
    RegisterShape shape{};
    const int pieces = (group + each - 1) / each, replicas = std::min(replicas_, pieces);
    shape.group = pieces * each;
    shape.copies = std::min(most_warps / plan.most_tiles, (pieces + replicas - 1) / replicas);
    shape.chunks = (pieces + replicas * shape.copies - 1) / (replicas * shape.copies);
    shape.grid = base_grid_ * replicas;
    return shape;
  };
  RegisterShape shape = shape_of(limit, kRegisterStreams, kRegisterWarps);
  if (shape.chunks == 1) {
    shape.shared_bytes =
        plan.most_tiles * shape.copies * (kRegisterTableBytes + register_state_bytes(streams == 1 ? 1 : 2)) +
        plan.most_near * kBlockArea * sizeof(bf16);
    if (shape.shared_bytes <= shared_limit_) return shape;
  }
  for (int passes = 1; plan.wide && passes <= limit && limit > kRegisterStreams; ++passes) {
    shape = shape_of((limit + passes - 1) / passes, kWideStreams, kWideWarps);
    shape.wide = true;
    size_t most = 0;
    for (const auto& [bytes, tiles] : plan.wide_shares) {
      most = std::max(most, bytes + tiles * shape.chunks * register_state_bytes(kWideColumns));
    }
    shape.shared_bytes = kWideRingBytes + shape.copies * most;
    const int64_t rings = 1 + shape.copies * plan.most_terms;
    if (shape.shared_bytes <= shared_limit_ && rings <= 0xff && shape.chunks * kWideColumns <= 0xff) return shape;
  }
  return {};
}

void CudaModel::describe_registers(const RegisterShape& shape, const BrainPlan& plan, ExecutionPlan& out) const {
  if (shape.group == 0) return;
  const auto kib = [](size_t bytes) { return std::to_string((bytes + 512) >> 10) + " KiB"; };
  const int near = shape.wide ? 0 : plan.most_near, warps = plan.most_tiles * shape.copies;
  const std::string beside =
      "in registers, but for up to " + kib(near * kBlockArea * sizeof(bf16)) + " in the shared memory of a block";
  const std::map<std::string, std::string> said = {
      {"brain launch", std::to_string(shape.grid) + " blocks of " + std::to_string(warps * 32) + " threads, " +
                           (shape.copies == 1 ? "a warp" : std::to_string(shape.copies) + " warps") +
                           " a tile, shared memory of each: " + kib(shape.shared_bytes)},
      {"streams at a time", std::to_string(std::min(shape.group, spec_.streams))},
      {"v and w", "in shared memory"},
      {"weights between neurons", near ? beside : "in registers"}};
  for (auto& [name, value] : out) {
    if (const auto row = said.find(name); row != said.end()) value = row->second;
  }
}

}  // namespace neurogen::cuda
