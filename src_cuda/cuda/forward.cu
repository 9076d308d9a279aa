// Forward: embedding products of all tokens, the brain in one persistent cooperative launch, the readout of all tokens.
//
// The brain launch: blocks of threads own tiles of 32 neurons for the whole call, with their weights in shared memory
// as far as those fit, and v and w there too. A warp takes its tiles in wavefront order: at tick k the regions of level
// l work on token k - l, so everything a tick reads is of an earlier tick, and waiting for it (brain.cuh) always ends.
// Spikes go through the L2 cache: the arrays that the backward pass needs anyway are the delay lines. Groups of streams
// whose state does not fit together run one after the other inside the launch.
#include <algorithm>

#include "batched_product.cuh"
#include "brain.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kResidentTokens = 4;          // from so many tokens on it pays to load weights into shared memory
constexpr int64_t kCachedBytes = 48 << 20;  // weights that stay in the L2 cache
constexpr int kInsideStreams = 8;           // from so many on, the brain launch multiplies the embedding's blocks too
constexpr int kGlobalStateStreams = 64;     // streams at a time where v and w do not fit shared memory
constexpr int kWide = 256;
constexpr int kWarps = kBrainThreads / 32;
constexpr float kRmsEpsilon = 1e-5f;

__device__ void copy_words(void* to, const void* from, size_t bytes) {
  for (size_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) {
    static_cast<int*>(to)[i] = static_cast<const int*>(from)[i];
  }
}

// Tables and resident weights of this share, in shared memory.
template <class Real>
__device__ BrainTables<Real> fill_shared(const BrainCall& call, const Share& share, char* shared) {
  char* at = shared;
  const auto room = [&](auto* like, int count) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(like)>>;
    static_assert(sizeof(T) % 8 == 0, "tables are stacked and hold pointers");
    T* there = reinterpret_cast<T*>(at);
    at += count * sizeof(T);
    return there;
  };
  const auto bring = [&](const auto* from, int count) {
    auto* to = room(from, count);
    copy_words(to, from, count * sizeof(*from));
    return to;
  };
  constexpr int kBlockBytes = kBlockArea * sizeof(Real), kConstants = 5 * kBlock, kTile = kConstants + kBlock;
  static_assert(sizeof(NearTerm) == kNearTermBytes && kTile * sizeof(float) == kNearBytes);
  BrainTables<Real> out;
  // The first two hold 16-byte units.
  float* constants = reinterpret_cast<float*>(at);
  if (call.near) at += share.tiles * kNearBytes;
  NearTerm* terms = room(static_cast<NearTerm*>(nullptr), share.terms);
  out.far = call.terms + share.term_begin;
  for (int i = threadIdx.x; i < share.terms; i += blockDim.x) {
    const Term& term = out.far[i];
    terms[i] = {term.source, term.slot < call.slots ? term.slot * kBlockBytes : ~term.block, term.delay};
  }
  out.terms = terms;
  out.regions = bring(call.regions, call.region_count);
  out.states = bring(call.states, call.region_count);
  BrainTile* tiles = bring(call.tiles + share.tile_begin, share.tiles);
  out.tiles = tiles;
  __syncthreads();
  for (int i = threadIdx.x; call.near && i < share.tiles * kTile; i += blockDim.x) {
    const BrainTile& tile = call.tiles[share.tile_begin + i / kTile];
    constants[i] = i % kTile < kConstants ? tile.constants[i % kTile] : tile.bias[i % kTile - kConstants];
    if (i % kTile) continue;
    tiles[i / kTile].constants = constants + i;
    tiles[i / kTile].bias = constants + i + kConstants;
  }
  char* resident = shared + call.table_bytes;
  const int blocks = min(share.residents, call.slots);
  const auto block = [&](int i) {
    return reinterpret_cast<const uint4*>(static_cast<const char*>(call.weights) +
                                          int64_t{call.resident[share.resident_begin + i]} * kBlockBytes);
  };
  constexpr int kPieces = kBlockBytes / sizeof(uint4);
  if constexpr (sizeof(Real) == sizeof(bf16)) {
    for (int i = threadIdx.x; i < blocks * kKeepParts; i += blockDim.x) {
      uint4* to = reinterpret_cast<uint4*>(resident) + i / kKeepParts * kPieces;
      keep_block(to, block(i / kKeepParts), i % kKeepParts);
    }
  } else {
    for (int i = threadIdx.x; i < blocks * kPieces; i += blockDim.x) {
      reinterpret_cast<uint4*>(resident)[i] = block(i / kPieces)[i % kPieces];
    }
  }
  out.resident = resident;
  __syncthreads();
  return out;
}

// Steps: a warp works on Steps * 8 streams at a time, of which a lane has Columns (1: there is one stream).
template <class Real, int Steps, int Columns, bool Plain>
__global__ void __launch_bounds__(kBrainThreads, 1) run_brain_kernel(const __grid_constant__ BrainCall call) {
  extern __shared__ uint4 shared[];
  const int replica = blockIdx.x / call.base_grid, replicas = gridDim.x / call.base_grid;
  const Share share = call.shares[blockIdx.x % call.base_grid];
  const BrainTables<Real> tables = fill_shared<Real>(call, share, reinterpret_cast<char*>(shared));
  using Local = LocalState<Steps * Columns>;
  auto* local = reinterpret_cast<Local*>(reinterpret_cast<char*>(shared) + call.table_bytes +
                                         call.slots * kBlockArea * sizeof(Real));
  // Items of a tick: chunk by chunk (this replica's: replica, replica + replicas, ...), tile by tile.
  const auto items_of = [&](int streams) {
    const int chunks = (streams + Steps * kRows - 1) / (Steps * kRows);
    return (chunks - replica + replicas - 1) / replicas * share.tiles;
  };
  const int most = items_of(call.stream_group);
  const bool rotate = call.local_state && most > kWarps;  // warps take them in turn, over all ticks
  for (int i = threadIdx.x; rotate && i < most; i += blockDim.x) local[i].turn = 0;
  __syncthreads();
  const int ticks = call.tokens + call.levels - 1;
  int turns = 0;  // of an item, in earlier groups
  for (int first = 0; first < call.streams; first += call.stream_group, turns += call.tokens) {
    const int streams = min(call.stream_group, call.streams - first), items = items_of(streams);
    int begin = threadIdx.x / 32;
    for (int tick = 0; tick < ticks; ++tick) {
      int at = begin, chunk = 0;
      if (rotate) begin = (begin + kWarps - items % kWarps) % kWarps;
      for (int item = at; item < items; item += kWarps, at += kWarps) {
        while (at >= share.tiles) at -= share.tiles, ++chunk;
        const BrainTile& tile = tables.tiles[at];
        const int token = tick - tile.rank;
        if (token < 0 || token >= call.tokens) continue;
        const int offset = (replica + chunk * replicas) * Steps * kRows;
        const int left = min(streams - offset, Steps * kRows);
        Local& own = local[call.local_state ? item : threadIdx.x / 32];
        if (rotate) take_over(own.turn, turns + token);
        if (token == 0 || !call.local_state) {
          recall<Steps, Columns>(call, tables.states[tile.region], tables.regions[tile.region].n,
                                 tile.offset + lane_receiver(), token, first + offset, left, own);
        }
        if (call.prefetch) prefetch_weights<Real>(call, tables, tile);
        run_tile<Real, Steps, Columns, Plain>(call, tables, tile, token, first + offset, left, own);
        if (rotate) pass_on(own.turn, turns + token + 1);
      }
    }
  }
}

// The embedding's share of the drive, with the bias.
template <class Real>
struct StoreDrive {
  const RegionView* regions;
  const TileName* tiles;
  __device__ auto open(int tile, int lane) const {
    const RegionView& region = regions[tiles[tile].region];
    const int offset = tiles[tile].offset;
    return [d = static_cast<Real*>(region.d) + offset / kBlock * region.stride + lane,
            bias = load4(region.bias + offset + lane)](int64_t row, float4 sums) {
      store_sums(d + row * kBlock, {bias.x + sums.x, bias.y + sums.y, bias.z + sums.z, bias.w + sums.w});
    };
  }
};

template <class Real>
struct StoreGate {
  const RegionView* regions;
  const TileName* tiles;
  __device__ auto open(int tile, int lane) const {
    const RegionView& region = regions[tiles[tile].region];
    const int64_t panel = tiles[tile].offset / kBlock * region.stride;
    return [g = region.gated ? static_cast<Real*>(region.g) + panel + lane : nullptr](int64_t row, float4 sums) {
      if (g) store4(g + row * kBlock, sums);
    };
  }
};

// Sums over spikes, whose sign is taken off again; by a difference, for no sum is -0.
struct StoreRows {
  float* out;
  int64_t ld;
  bool negative;
  __device__ auto open(int tile, int lane) const {
    return [to = out + tile * kBlock + lane, ld = ld, negative = negative](int64_t row, float4 sums) {
      if (negative) sums = {0.0f - sums.x, 0.0f - sums.y, 0.0f - sums.z, 0.0f - sums.w};
      store4(to + row * ld, sums);
    };
  }
};

__device__ float integrate(float keep, float value, float input) { return fmaf(keep, value, (1.0f - keep) * input); }

// o_t = kappa o_{t-1} + (1-kappa) r_t in place of r; a thread follows one channel of one stream.
__global__ void integrate_kernel(const float* kappa, const float* before, const uint8_t* resets, int streams,
                                 int tokens, int64_t dim, float* o, Verdict* verdict) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, step = streams * dim;
  if (at >= step) return;
  const float keep = kappa[at % dim];
  float value = before[at];
  constexpr int kAhead = 32;  // tokens whose input is loaded before it is needed
  for (int begin = 0; begin < tokens; begin += kAhead) {
    float ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = o[min(begin + i, tokens - 1) * step + at];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = begin + i;
      if (token >= tokens) break;
      if (resets && resets[int64_t{token} * streams + at / dim]) value = 0.0f;
      value = integrate(keep, value, ahead[i]);
      o[token * step + at] = value;
    }
  }
  if (!(fabsf(value) <= kLargestState)) atomicOr(&verdict->state_not_finite, 1);
}

// o is there.
struct Integrated {
  __device__ float4 value(const float* o, int64_t row, int dim, int j) const { return load4(o + row * dim + j); }
};

// What integrate_kernel does, for the one token of a call: row r of o is that of stream r.
struct OneToken {
  const float *kappa, *before;
  const uint8_t* resets;
  Verdict* verdict;
  __device__ float4 value(float* o, int64_t row, int dim, int j) const {
    const float4 keep = load4(kappa + j), input = load4(o + row * dim + j);
    float4 out = load4(before + row * dim + j);
    if (resets && resets[row]) out = {0, 0, 0, 0};
    out = {integrate(keep.x, out.x, input.x), integrate(keep.y, out.y, input.y), integrate(keep.z, out.z, input.z),
           integrate(keep.w, out.w, input.w)};
    store4(o + row * dim + j, out);
    const float largest = fmaxf(fmaxf(fabsf(out.x), fabsf(out.y)), fmaxf(fabsf(out.z), fabsf(out.w)));
    // fmaxf() leaves out NaNs, a sum does not.
    if (!(largest <= kLargestState && fabsf(out.x + out.y + out.z + out.w) <= 4 * kLargestState)) {
      atomicOr(&verdict->state_not_finite, 1);
    }
    return out;
  }
};

// broca = o / sqrt(mean(o^2) + eps), as float, as Real or both; a block a row, see row_threads(). Input: how a value of
// o comes about.
template <class Real, class Input>
__global__ void normalize_kernel(float* o, int dim, float* broca, Real* broca_real, float* inverse_rms, Input input) {
  __shared__ float room[32];
  let_later_start();
  wait_for_earlier();
  const int64_t row = blockIdx.x;
  const int step = 4 * blockDim.x, begin = 4 * threadIdx.x, loose = begin + kHeldFours * step;
  const auto square = [](float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; };
  float4 held[kHeldFours] = {};
#pragma unroll
  for (int k = 0; k < kHeldFours; ++k) {
    if (begin + k * step < dim) held[k] = input.value(o, row, dim, begin + k * step);
  }
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kHeldFours; ++k) squares += square(held[k]);
#pragma unroll 1
  for (int j = loose; j < dim; j += step) squares += square(input.value(o, row, dim, j));
  const float factor = 1.0f / sqrtf(block_sum(squares, room) / dim + kRmsEpsilon);
  const auto put = [&](int j, float4 x) {
    const float4 y = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
    if (broca) store4(broca + row * dim + j, y);
    if (broca_real) store4(broca_real + row * dim + j, y);
  };
#pragma unroll
  for (int k = 0; k < kHeldFours; ++k) {
    if (begin + k * step < dim) put(begin + k * step, held[k]);
  }
#pragma unroll 1
  for (int j = loose; j < dim; j += step) put(j, load4(o + row * dim + j));
  if (inverse_rms && threadIdx.x == 0) inverse_rms[row] = factor;
}

// Spikes of every neuron in the call: exact in any order, they are whole numbers.
template <class Real>
__global__ void count_spikes_kernel(const RegionView* regions, const TileName* tiles, int64_t rows) {
  const TileName tile = tiles[blockIdx.x];
  const RegionView& region = regions[tile.region];
  const Real* u = static_cast<const Real*>(region.u) + tile.offset / kBlock * region.stride + threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.y} * blockDim.x / 32;
  int count = 0;
  for (int64_t row = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) / 32; row < rows; row += warps) {
    count += to_float(u[row * kBlock]) > 0;
  }
  if (count) atomicAdd(region.spike_count + tile.offset + threadIdx.x % 32, count);
}

template <class Real, bool Plain>
void* brain_kernel(const BrainShape& shape) {
  return reinterpret_cast<void*>(shape.steps == 2     ? &run_brain_kernel<Real, 2, 2, Plain>
                                 : shape.columns == 2 ? &run_brain_kernel<Real, 1, 2, Plain>
                                                      : &run_brain_kernel<Real, 1, 1, Plain>);
}

static_assert(kWarps * sizeof(LocalState<4>) <= kWorkBytes, "plan_launch() has to leave this much");
size_t local_bytes(int cells) {
  return cells == 1 ? sizeof(LocalState<1>) : cells == 2 ? sizeof(LocalState<2>) : sizeof(LocalState<4>);
}

}  // namespace

Dropout CudaModel::dropout() const {
  const float p = train_dropout_ ? spec_.dropout : 0.0f;
  return {p, static_cast<float>(1.0 / (1.0 - static_cast<double>(p))), static_cast<uint32_t>(spec_.seed),
          static_cast<uint32_t>(spec_.seed >> 32) ^ static_cast<uint32_t>(call_)};
}

void CudaModel::forward(bool hushed) {
  refresh_derived();
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    if (&brain_plan(call_streams_) == &outside_) {
      launched(multiply_blocks<Real>(stream_.get(), embed_drive_, forward_blocks_, rows_, 0, tiles_,
                                     StoreDrive<Real>{region_views_, tile_names_}));
      launched(multiply_blocks<Real>(stream_.get(), embed_gate_, forward_blocks_, rows_, 0, tiles_,
                                     StoreGate<Real>{region_views_, tile_names_}));
    }
    run_brain(hushed);
    launched(multiply_blocks<Real>(stream_.get(), hear_, forward_blocks_, rows_, 0, spec_.dim / kBlock,
                                   StoreRows{o_, spec_.dim, negative_}, hushed && starts_early()));
  });
  const uint8_t* resets = has_resets_ ? resets_ : nullptr;
  if (call_tokens_ == 1) {
    normalize_rows(o_, rows_, nullptr, broca_real_, inverse_rms_, OneToken{kappa_, active_->o(), resets, verdict_},
                   hushed && starts_early());
    return;
  }
  const int64_t channels = int64_t{call_streams_} * spec_.dim;
  integrate_kernel<<<static_cast<int>((channels + 127) / 128), 128, 0, stream_.get()>>>(
      kappa_, active_->o(), resets, call_streams_, call_tokens_, spec_.dim, o_, verdict_);
  launched();
  normalize_rows(o_, rows_, nullptr, broca_real_, inverse_rms_);
}

template <class Input>
void CudaModel::normalize_rows(float* o, int64_t rows, float* broca, void* broca_real, float* inverse_rms, Input input,
                               bool early) {
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    launch_dependent(early, dim3(static_cast<unsigned>(rows)), row_threads(spec_.dim), 0, stream_.get(),
                     normalize_kernel<Real, Input>, o, spec_.dim, broca, static_cast<Real*>(broca_real), inverse_rms,
                     input);
  });
  launched();
}

void CudaModel::normalize_rows(float* o, int64_t rows, float* broca, void* broca_real, float* inverse_rms) {
  normalize_rows(o, rows, broca, broca_real, inverse_rms, Integrated{});
}

// A launch of few streams waits for spikes most of the time. Where weights are in registers, the embedding's products
// cost it nothing then; elsewhere they are better made outside it, for all tokens at once (`base`, one stream on an
// H100: 3.1 us a tick, inside 3.5). Not by the number of tokens: cutting a text into other calls changes no bit.
const BrainPlan& CudaModel::brain_plan(int streams) const {
  if (!inside_.usable || dense_shape(streams).group > 0) return outside_;
  return streams >= kInsideStreams || register_shape(inside_, streams).group > 0 ? inside_ : outside_;
}

// `group` streams at a time, v and w in shared memory before weights, for those are read and written each tick.
BrainShape CudaModel::shape_of(const BrainPlan& plan, int group, int tokens) const {
  BrainShape shape{};
  shape.group = group;
  const int wide = (group + 2 * kRows - 1) / (2 * kRows);
  // As wide as leaves every warp something to do.
  shape.steps = group <= kRows || int64_t{tiles_} * wide < int64_t{base_grid_} * kWarps ? 1 : 2;
  shape.columns = group == 1 ? 1 : 2;
  const int chunks = (group + shape.steps * kRows - 1) / (shape.steps * kRows);
  const int replicas = std::min(replicas_, chunks);
  shape.grid = base_grid_ * replicas;
  const int items = plan.most_tiles * ((chunks + replicas - 1) / replicas);
  shape.rounds = std::max(1.0, static_cast<double>(items) / kWarps);
  const size_t item = local_bytes(shape.steps * shape.columns);
  shape.local = plan.table_bytes + items * item <= shared_limit_;
  shape.shared_bytes = plan.table_bytes + (shape.local ? items : kWarps) * item;
  if (tokens >= kResidentTokens) {
    const size_t block_bytes = kBlockArea * real_size();
    shape.slots = std::min(plan.most_slots, static_cast<int>((shared_limit_ - shape.shared_bytes) / block_bytes));
    shape.shared_bytes += shape.slots * block_bytes;
  }
  return shape;
}

// How many streams run at a time: a tick costs about as much as a round of its warps, and more where weights have to
// come from the L2 cache (`base`, 64 streams on an H200, 43 % of the weights: twice 32 take 7.5 ms, 64 at once 9.1).
BrainShape CudaModel::brain_shape(const BrainPlan& plan, int streams, int tokens) const {
  const int limit = stream_group_ ? std::min(stream_group_, streams) : streams;
  const auto cost = [&](const BrainShape& shape) {
    const int64_t streamed = std::max<int64_t>(plan.most_terms - shape.slots, 0);
    return (1 + shape.rounds) * (1 + static_cast<double>(streamed) / std::max<int64_t>(plan.most_terms, 1));
  };
  constexpr int kUnitStreams = 2 * kRows;
  BrainShape best{};
  double least = 0;
  for (int group = limit; group > 0; group = (group - 1) / kUnitStreams * kUnitStreams) {
    const BrainShape shape = shape_of(plan, group, tokens);
    if (!shape.local) continue;
    const int rest = streams % group;
    const double whole = streams / group * cost(shape) + (rest ? cost(shape_of(plan, rest, tokens)) : 0);
    if (best.group == 0 || whole < least) best = shape, least = whole;
    if (stream_group_) break;
  }
  return best.group ? best : shape_of(plan, std::min(limit, kGlobalStateStreams), tokens);
}

// What every brain launch is told; how it goes about it is the launch's to fill in.
BrainCall CudaModel::brain_call(const BrainPlan& plan) const {
  BrainCall call{};
  call.regions = region_views_, call.states = active_->views();
  call.tiles = plan.tiles, call.terms = plan.terms, call.shares = plan.shares, call.resident = plan.resident;
  call.weights = forward_blocks_;
  call.resets = has_resets_ ? resets_ : nullptr, call.age = age_;
  call.verdict = verdict_;
  call.streams = call_streams_, call.tokens = call_tokens_, call.levels = levels_;
  call.region_count = static_cast<int>(regions_.size()), call.base_grid = base_grid_;
  call.embedded = &plan == &outside_;
  call.max_spike = spec_.graded ? spec_.max_spike : 1.0f;
  call.sign = negative_ ? kTwoSigns : 0;
  call.dropout = dropout();
  return call;
}

void CudaModel::run_brain(bool hushed) {
  const BrainPlan& plan = brain_plan(call_streams_);
  // By sign, where all that Broca's output sums over has it.
  if (!hushed) hush(call_shape(plan).wide && !output_hears_embedding_);
  launch_brain(plan);
  if (!hushed) note_spikes(rows_, negative_ ? SpikeSign::negative : SpikeSign::positive);
}

void CudaModel::launch_brain(const BrainPlan& plan) {
  if (run_dense_brain() || run_register_brain(plan)) return;
  const BrainShape shape = brain_shape(plan, call_streams_, call_tokens_);
  BrainCall call = brain_call(plan);
  call.stream_group = shape.group;
  call.table_bytes = static_cast<int>(plan.table_bytes), call.near = plan.near;
  call.slots = shape.slots, call.local_state = shape.local;
  call.prefetch =
      plan.most_terms > shape.slots && blocks_ * kBlockArea * static_cast<int64_t>(real_size()) > kCachedBytes;
  const bool plain = !has_resets_ && spec_.dropout == 0;
  void* kernel = spec_.bf16 ? (plain ? brain_kernel<bf16, true>(shape) : brain_kernel<bf16, false>(shape))
                            : (plain ? brain_kernel<float, true>(shape) : brain_kernel<float, false>(shape));
  NG_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)));
  void* arguments[] = {&call};
  NG_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(shape.grid), dim3(kBrainThreads), arguments, shape.shared_bytes,
                                      stream_.get()));
  launched();
  if (!call.local_state) count_spikes();
}

// Where the brain launch had no room to count.
void CudaModel::count_spikes() {
  const dim3 grid(tiles_, static_cast<unsigned>(std::clamp<int64_t>(rows_ / 256, 1, 64)));
  with_real(spec_.bf16, [&](auto real) {
    count_spikes_kernel<decltype(real)><<<grid, kWide, 0, stream_.get()>>>(region_views_, tile_names_, rows_);
  });
  launched();
}

}  // namespace neurogen::cuda
