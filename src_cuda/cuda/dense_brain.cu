// The brain launch of dense connectomes: its kernel, and when and how it is launched. The wavefront and the way spikes
// are waited for are those of forward.cu: a band's two warps take the items of their share in the order of ticks, so
// what they wait for is never behind an unfinished item of a later tick. Bands never wait for each other.
#include "dense_brain.cuh"

#include <algorithm>
#include <climits>

namespace neurogen::cuda {
namespace {

constexpr int kFewestStreams = 32;  // below, warps of eight streams have more to do at a time

// Tables, rings, state and resident weights of this share, in this order, in shared memory.
template <int Steps>
__device__ DenseTables<Steps> fill_shared(const DenseCall& call, const DenseShare& share, char* shared) {
  char* at = shared;
  const auto take = [&](auto*& table, int count) {
    using T = std::remove_pointer_t<std::remove_reference_t<decltype(table)>>;
    table = reinterpret_cast<T*>(at);
    at += count * sizeof(T);
  };
  const auto bring = [&](auto*& table, const auto* from, int count) {
    take(table, count);
    const int words = count * static_cast<int>(sizeof(*from)) / 4;
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
      reinterpret_cast<int*>(table)[i] = reinterpret_cast<const int*>(from)[i];
    }
  };
  float* constants;
  Heard* sources;
  RegionView* regions;
  StateView* states;
  DenseTile* tiles;
  int32_t *streamed, *streamed_count;
  uint4 *ring, *resident;
  float4* exchange;
  DenseConveyor* conveyor;
  DenseState<Steps>* local;
  take(constants, share.tiles * kTileConstants);
  take(sources, share.sources);
  bring(regions, call.regions, call.region_count);
  bring(states, call.states, call.region_count);
  bring(tiles, call.tiles + share.tile_begin, share.tiles);
  take(streamed, share.blocks);
  take(streamed_count, share.tiles * kDenseHalves);
  at = shared + share.table_bytes;
  take(ring, kDenseRingBytes / sizeof(uint4));
  take(exchange, kDenseExchangeBytes / sizeof(float4));
  take(conveyor, 1);
  take(local, share.tiles * kDenseWarps);
  const int slots =
      min(share.blocks, (call.shared_bytes - static_cast<int>(at - shared)) / static_cast<int>(kDenseBlockBytes));
  constexpr int kPieces = kDenseBlockBytes / sizeof(uint4);
  take(resident, slots * kPieces);
  const int32_t* blocks = call.blocks + share.block_begin;
  const auto ordered = [&](int i) -> uint4 {  // piece i of the share's blocks: of stored rows 2 (part % 2) and the next
    const int part = i % kPieces / 32, lane = i % 32;
    const uint2* from = static_cast<const uint2*>(call.weights) + int64_t{blocks[i / kPieces]} * kPieces * 2 +
                        (part % 2 * 2 * 32 + lane) * 2 + part / 2;
    const uint2 one = __ldg(from), two = __ldg(from + 32 * 2);
    return {one.x, two.x, one.y, two.y};
  };
#pragma unroll 8
  for (int i = threadIdx.x; i < slots * kPieces; i += kDenseThreads) resident[i] = ordered(i);
  uint4* const streams = call.ordered + int64_t{share.block_begin} * kPieces;
#pragma unroll 8
  for (int i = slots * kPieces + threadIdx.x; i < share.blocks * kPieces; i += kDenseThreads) streams[i] = ordered(i);
  if (threadIdx.x == 0) {
    for (int half = 0; half < kDenseHalves; ++half) {
      for (uint64_t& barrier : conveyor->there[half]) begin_barrier(&barrier);
      for (int32_t& used : conveyor->used[half]) used = 0;
      conveyor->asked[half] = 0;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < share.tiles * kTileConstants; i += blockDim.x) {
    constants[i] = tiles[i / kTileConstants].constants[i % kTileConstants];
  }
  for (int i = threadIdx.x; i < share.sources; i += blockDim.x) {
    const DenseSource source = call.sources[share.source_begin + i];
    const int gate = source.place[kGateSum], drive = source.place[kDriveSum], delayed = source.place[kDelayedSum],
              basal = source.delay > 0 ? delayed : drive;
    const bf16* recent = source.delay > 0
                             ? static_cast<const bf16*>(states[source.region].recent) +
                                   int64_t{source.index} * regions[source.region].history * call.streams * kBlock
                             : nullptr;
    sources[i] = {static_cast<const bf16*>(source.panel), recent, source.delay, gate, basal,
                  (gate >= slots) + (basal >= slots)};
  }
  __syncthreads();
  // A thread lists what a half of a tile has to stream.
  for (int i = threadIdx.x; i < share.tiles * kDenseHalves; i += blockDim.x) {
    const DenseTile& tile = tiles[i / kDenseHalves];
    const int half = i % kDenseHalves;
    int count = 0;
    for (int index = half; index < tile.sources; index += kDenseHalves) {
      const Heard& source = sources[tile.source_begin + index];
      if (source.gate >= slots) streamed[tile.list_begin[half] + count++] = share.block_begin + source.gate;
      if (source.basal >= slots) streamed[tile.list_begin[half] + count++] = share.block_begin + source.basal;
    }
    streamed_count[i] = count;
  }
  __syncthreads();
  return {regions, states,   tiles,    sources, constants, streamed, streamed_count,
          ring,    exchange, conveyor, local,   resident,  slots};
}

template <int Steps, bool Plain>
__global__ void __launch_bounds__(kDenseThreads, 1) run_dense_kernel(const __grid_constant__ DenseCall call) {
  extern __shared__ uint4 shared[];
  const int replica = blockIdx.x / call.base_grid, replicas = gridDim.x / call.base_grid;
  const DenseShare share = call.shares[blockIdx.x % call.base_grid];
  const DenseTables<Steps> tables = fill_shared<Steps>(call, share, reinterpret_cast<char*>(shared));
  const int band = threadIdx.x / (32 * kDenseHalves), offset = (replica + band * replicas) * Steps * kRows;
  const int ticks = call.tokens + call.levels - 1;
  int used = 0;
  for (int first = 0; first < call.streams; first += call.stream_group) {
    const int streams = min(call.stream_group, call.streams - first), left = min(streams - offset, Steps * kRows);
    if (left <= 0) break;  // in this group and those that follow
    for (int tick = 0; tick < ticks; ++tick) {
      for (int at = 0; at < share.tiles; ++at) {
        const int token = tick - tables.tiles[at].rank;
        if (token < 0 || token >= call.tokens) continue;
        run_dense_tile<Steps, Plain>(call, tables, at, token, first + offset, left, used);
      }
    }
  }
  // Nobody waits for what this band does not need.
  __syncwarp();
  const int half = threadIdx.x / 32 % kDenseHalves;
  if (threadIdx.x % 32 == 0) publish(&tables.conveyor->used[half][band], INT_MAX);
}

template <bool Plain>
void* dense_kernel(int steps) {
  return reinterpret_cast<void*>(steps == 4   ? &run_dense_kernel<4, Plain>
                                 : steps == 2 ? &run_dense_kernel<2, Plain>
                                              : &run_dense_kernel<1, Plain>);
}

static_assert(sizeof(DenseState<4>) * kDenseWarps == dense_state_bytes(4), "the host plans with it");
static_assert(sizeof(Heard) == sizeof(DenseSource), "the host plans with it");

}  // namespace

bool CudaModel::run_dense_brain() {
  const DenseShape shape = dense_shape(call_streams_);
  if (shape.group == 0) return false;
  DenseCall call{region_views_,
                 active_->views(),
                 dense_tiles_,
                 dense_sources_,
                 dense_shares_,
                 dense_blocks_,
                 forward_blocks_,
                 static_cast<uint4*>(dense_weights_),
                 has_resets_ ? resets_ : nullptr,
                 age_,
                 verdict_,
                 call_streams_,
                 call_tokens_,
                 levels_,
                 shape.group,
                 static_cast<int>(regions_.size()),
                 base_grid_,
                 static_cast<int>(shape.shared_bytes),
                 spec_.graded ? spec_.max_spike : 1.0f,
                 dropout()};
  const bool plain = !has_resets_ && spec_.dropout == 0;
  void* kernel = plain ? dense_kernel<true>(shape.steps) : dense_kernel<false>(shape.steps);
  NG_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)));
  void* arguments[] = {&call};
  NG_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(shape.grid), dim3(kDenseThreads), arguments, shape.shared_bytes,
                                      stream_.get()));
  launched();
  return true;
}

// The choice depends on sizes alone, not on the group: groups of streams do not change a bit.
DenseShape CudaModel::dense_shape(int streams) const {
  if (!dense_tiles_ || streams < kFewestStreams) return {};
  const auto fits = [&](int steps) { return dense_bytes(steps, false) <= shared_limit_; };
  if (!fits(1)) return {};
  const auto widest = [&](int steps) { return replicas_ * kDenseBands * steps * kRows; };
  const int most = widest(fits(4) ? 4 : fits(2) ? 2 : 1);
  const int limit = stream_group_ ? std::min(stream_group_, streams) : streams, passes = (limit + most - 1) / most;
  DenseShape shape{};
  shape.group = limit <= most ? limit : (limit + passes * kRows - 1) / (passes * kRows) * kRows;
  shape.steps = shape.group <= widest(1) ? 1 : shape.group <= widest(2) ? 2 : 4;
  const int bands = (shape.group + shape.steps * kRows - 1) / (shape.steps * kRows);
  shape.grid = base_grid_ * std::min(replicas_, bands);
  shape.shared_bytes = std::min(dense_bytes(shape.steps, true), shared_limit_);
  return shape;
}

}  // namespace neurogen::cuda
