// Staging: the user's [S, T] arrays become time-major rows, checked on the way; and the end of a call: loss and rates
// are added up, the verdict is given, state is committed.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "dependent.cuh"
#include "gather.cuh"
#include "model.h"
#include "numbers.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kThreads = 256;

int blocks_for(int64_t count) { return static_cast<int>((count + kThreads - 1) / kThreads); }

__device__ int32_t checked_id(const void* ids, int itemsize, int64_t at, int vocab, int* bad) {
  const int64_t id = itemsize == 8 ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
  if (id >= 0 && id < vocab) return static_cast<int32_t>(id);
  atomicMax(bad, static_cast<int>(at) + 1);
  return 0;
}

// out[t*S + b] = ids[b*T + t].
__global__ void stage_ids_kernel(const void* ids, int itemsize, int streams, int tokens, int vocab, int32_t* out,
                                 Verdict* verdict) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= int64_t{streams} * tokens) return;
  out[at % tokens * streams + at / tokens] = checked_id(ids, itemsize, at, vocab, &verdict->bad_id);
}

__global__ void stage_weights_kernel(const float* weights, int streams, int tokens, bool any_sign, float* out,
                                     Verdict* verdict) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= int64_t{streams} * tokens) return;
  const float weight = weights ? weights[at] : 1.0f;
  if (!isfinite(weight) || (weight < 0 && !any_sign)) atomicMax(&verdict->bad_weight, static_cast<int>(at) + 1);
  out[at % tokens * streams + at / tokens] = weight;
}

// One thread a stream: flags and ages, time-major.
__global__ void stage_resets_kernel(const uint8_t* resets, int streams, int tokens, uint8_t* out, int32_t* age) {
  const int stream = blockIdx.x * blockDim.x + threadIdx.x;
  if (stream >= streams) return;
  int since = INT_MAX;
  for (int token = 0; token < tokens; ++token) {
    const bool reset = resets[int64_t{stream} * tokens + token] != 0;
    since = reset ? 0 : since == INT_MAX ? INT_MAX : since + 1;
    out[int64_t{token} * streams + stream] = reset;
    age[int64_t{token} * streams + stream] = since;
  }
}

__global__ void sum_weights_kernel(const float* weights, int64_t rows, bool magnitudes, double given,
                                   Verdict* verdict) {
  __shared__ double room[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) sum += magnitudes ? fabsf(weights[i]) : weights[i];
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) verdict->divisor = given >= 0 ? given : sum;
}

// Row i of the panels = row ids[i] of the table; its row i without ids.
template <class Real>
__global__ void gather_rows_kernel(const float* table, const int32_t* ids, int64_t dim, int64_t stride, Real* out) {
  const int64_t row = blockIdx.x;
  gather_row<2>(table + (ids ? ids[row] : row) * dim, dim, row, stride, threadIdx.x, blockDim.x, out);
}

// Per region: [mean rate, mean squared distance of a neuron's rate to its target].
__global__ void measure_rates_kernel(const RegionView* regions, double rows, double target, double* part,
                                     double* rates) {
  __shared__ double room[32];
  const RegionView& region = regions[blockIdx.x];
  double rate = 0, squares = 0;
  for (int j = threadIdx.x; j < region.n; j += blockDim.x) {
    const double own = region.spike_count[j] / rows;
    rate += own;
    squares += (own - target) * (own - target);
  }
  rate = block_sum(rate, room);
  squares = block_sum(squares, room);
  if (threadIdx.x > 0) return;
  rates[blockIdx.x] = rate / region.n;
  part[blockIdx.x] = squares / region.n;
}

struct Summary {
  int64_t rows;
  int streams, tokens, regions;
  const float *weights, *losses;
  const int32_t *targets, *best;
  const double* rate_gaps;
  double rate_weight;
  int32_t* predictions;  // [S, T] or null
  Verdict* verdict;
};

__global__ void summarize_kernel(Summary p) {
  __shared__ double room[32];
  // A call that is refused writes nothing, where the caller's own memory is written right here.
  const bool deliver = p.predictions && !p.verdict->faulty && !p.verdict->bad_id && !p.verdict->bad_weight;
  double loss = 0, correct = 0, tokens = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += blockDim.x) {
    if (deliver) p.predictions[row % p.streams * p.tokens + row / p.streams] = p.best[row];
    if (p.weights[row] == 0.0f) continue;
    loss += static_cast<double>(p.weights[row]) * p.losses[row];
    tokens += 1;
    correct += p.best[row] == p.targets[row];
  }
  loss = block_sum(loss, room);
  tokens = block_sum(tokens, room);
  correct = block_sum(correct, room);
  if (threadIdx.x > 0) return;
  Verdict& v = *p.verdict;
  double gaps = 0;
  for (int r = 0; r < p.regions; ++r) gaps += p.rate_gaps[r];
  v.loss = v.divisor > 0 ? loss / v.divisor : 0.0;
  v.homeostasis = p.rate_weight * gaps;
  v.tokens = static_cast<long long>(tokens);
  v.correct = static_cast<long long>(correct);
  v.ok = !v.faulty && !v.bad_id && !v.bad_weight && !v.state_not_finite && !v.loss_not_finite && isfinite(loss) &&
         isfinite(v.homeostasis);
}

// Whether a call without losses, or whose losses do not count, may leave its state. One look at all three.
__device__ inline bool sound(const Verdict& verdict) {
  return (verdict.faulty | verdict.bad_id | verdict.state_not_finite) == 0;
}

// Counts are added to without waiting for what they were.
__device__ inline void give_verdict(Verdict* verdict, double loss, bool ok) {
  verdict->loss = loss;
  verdict->ok = ok;
  atomicAdd(&verdict->heard, ok);
}

__device__ inline void next_draw(Draw* draw) {
  const auto count = [](auto& x) {
    static_assert(sizeof(x) == sizeof(unsigned long long));
    atomicAdd(reinterpret_cast<unsigned long long*>(&x), 1ull);
  };
  count(draw->kept);
  count(draw->sampling.position);
}

// The verdict of a call without targets, or (with losses) of an evaluation: v.loss = the sum of all rows.
__global__ void judge_kernel(const float* losses, int64_t rows, Verdict* verdict) {
  __shared__ double room[32];
  double loss = 0;
  for (int64_t row = threadIdx.x; losses && row < rows; row += blockDim.x) loss += losses[row];
  loss = block_sum(loss, room);
  if (threadIdx.x == 0) give_verdict(verdict, loss, sound(*verdict));
}

__global__ void set_verdict_kernel(Verdict* verdict, const Faults* faults, bool ok, bool state_not_finite) {
  *verdict = Verdict{};
  verdict->faulty = faults->bad_id || faults->bad_x || faults->bad_broca || faults->state_not_finite;
  verdict->ok = ok && !verdict->faulty;
  verdict->state_not_finite = state_not_finite;
}

__global__ void set_draw_kernel(Draw* to, Draw draw) { *to = draw; }

struct Commit {
  const RegionView* regions;
  const StateView* states;
  const TileName* tiles;
  const int32_t* age;  // null = no resets
  const float* last_o;
  float* o;
  int64_t outputs;  // S * D
  int streams, tokens, tile_count;
  int tile_blocks, log_streams;  // blocks of threads along x that have tiles; 2^log_streams streams of a tile each
  bool judging;
  Verdict* verdict;
  Draw* draw;  // of a token of generation, null = none: another one follows
};

// A block of threads takes 32 rows of 32 neurons: 2^log_streams streams of as many tiles as that leaves. A thread has
// four neurons of a stream, so eight threads share a line of 128 bytes. The blocks along x behind those of the tiles
// have the readout. What it reads is asked for before the verdict is looked at. Judging: it gives the verdict of a call
// without losses as well; every thread reads what nobody writes here. After a token of generation it leaves everything
// as hush_kernel would, so that none is needed before the next.
constexpr int kCommitRows = 32;
constexpr int kShiftedAtOnce = 4;
static_assert(kCommitRows * kBlock / 4 == kThreads);

// Four spikes that are not written yet.
__device__ inline Four<bf16> silence(bf16) { return {{~0u, ~0u}}; }
__device__ inline Four<float> silence(float) {
  const float none = __uint_as_float(~0u);
  return {{none, none, none, none}};
}

// store4() that the compiler neither takes apart nor moves.
__device__ inline void store_whole(float* to, float4 x) {
  asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

template <class Real>
__global__ void __launch_bounds__(kThreads) commit_kernel(Commit p) {
  let_later_start();
  const auto accepted = [&] { return p.judging ? sound(*p.verdict) : p.verdict->ok != 0; };
  if (blockIdx.x >= p.tile_blocks) {
    wait_for_earlier();
    const int64_t block = int64_t{blockIdx.x - p.tile_blocks} * gridDim.y + blockIdx.y;
    const int64_t i = 4 * (block * kThreads + threadIdx.x);
    const float4 o = i < p.outputs ? load4(p.last_o + i) : float4{};
    const bool ok = accepted();
    if (ok && i < p.outputs) store4(p.o + i, o);
    if (i > 0) return;
    if (p.judging) give_verdict(p.verdict, 0.0, ok);
    if (p.draw) next_draw(p.draw);
    return;
  }
  const int row = threadIdx.x / 8, quarter = threadIdx.x % 8 * 4;
  const int stream = (blockIdx.y << p.log_streams) + (row & ((1 << p.log_streams) - 1));
  const int tile = blockIdx.x * (kCommitRows >> p.log_streams) + (row >> p.log_streams);
  if (stream >= p.streams || tile >= p.tile_count) return;  // never all threads of a block
  const TileName name = p.tiles[tile];
  const RegionView region = p.regions[name.region];
  const StateView state = p.states[name.region];
  wait_for_earlier();
  const bool ok = accepted();
  const int64_t cell = int64_t{stream} * region.n + name.offset + quarter, step = int64_t{p.streams} * region.n;
  const float4 v = load4(state.next_v + cell), w = load4(state.next_w + cell);
  const int age = p.age ? p.age[int64_t{p.tokens - 1} * p.streams + stream] : INT_MAX;
  const int64_t panel = name.offset / kBlock,
                newest = panel * region.stride + (int64_t{p.tokens - 1} * p.streams + stream) * kBlock + quarter;
  Real* const s = in_global<Real>(region.s) + newest;
  const auto hush = [&] {
    put4(s, silence(Real{}));
    if (region.emitted != region.s) put4(in_global<Real>(region.emitted) + newest, silence(Real{}));
    if (stream == 0) *reinterpret_cast<int4*>(region.spike_count + name.offset + quarter) = {0, 0, 0, 0};
  };
  if (!ok) {  // what is spoken from here on counts no more, but nobody may take these spikes for it
    if (p.draw) hush();
    return;
  }
  float* const spikes = in_global<float>(state.spikes) + cell;
  Real* const recent = in_global<Real>(state.recent) + (panel * region.history * p.streams + stream) * kBlock + quarter;
  // From the oldest spike down, some at once: what moves up is read before it is overwritten.
  for (int oldest = region.history - 1; oldest >= 0; oldest -= kShiftedAtOnce) {
    float4 old[kShiftedAtOnce] = {};
    Four<Real> spoken[kShiftedAtOnce];
#pragma unroll
    for (int j = 0; j < kShiftedAtOnce; ++j) {  // both, unpacked later: what may be too much does not hold up the rest
      const int k = max(oldest - j, 0);
      if (k >= p.tokens) old[j] = load4(spikes + (k - p.tokens) * step);
      spoken[j] = fetch4(s - int64_t{min(k, p.tokens - 1)} * p.streams * kBlock);
    }
#pragma unroll
    for (int j = 0; j < kShiftedAtOnce; ++j) {
      const int k = oldest - j;
      const float4 fresh = unpack(spoken[j]);
      // Without the sign, see CudaModel::hush.
      const auto choose = [&](float one, float other) { return age < k ? 0.0f : fabsf(k < p.tokens ? one : other); };
      const float4 moved = {choose(fresh.x, old[j].x), choose(fresh.y, old[j].y), choose(fresh.z, old[j].z),
                            choose(fresh.w, old[j].w)};
      if (k < 0) continue;
      store_whole(spikes + k * step, moved);
      if (p.draw) put4(recent + int64_t{k} * p.streams * kBlock, pack<Real>(moved));
    }
  }
  store4(state.v + cell, v);
  store4(state.w + cell, w);
  if (p.draw) hush();
}

}  // namespace

// An array of the call in device memory, whatever side the caller has it on.
const void* CudaModel::arrive(const Input& input, size_t bytes) {
  if (input.device || !input.data) return input.data;
  char* room = pinned(bytes);
  std::memcpy(room, input.data, bytes);
  char* to = inbox_ + (room - static_cast<char*>(pinned_.get()));
  copy_in(to, room, bytes);
  return to;
}

// Called by every entry before anything else: sizes, and a clean verdict.
void CudaModel::begin(CudaState& state, int streams, int tokens) {
  active_ = &state;
  call_streams_ = streams;
  call_tokens_ = tokens;
  rows_ = int64_t{streams} * tokens;
  held_ = has_resets_ = false;
  pinned_used_ = 0;
  set_verdict(false, false);
}

void CudaModel::set_verdict(bool ok, bool state_not_finite) {
  set_verdict_kernel<<<1, 1, 0, stream_.get()>>>(verdict_, faults_, ok, state_not_finite);
  launched();
}

void CudaModel::stage(CudaState& state, const Tokens& tokens) {
  begin(state, tokens.streams, tokens.tokens);
  stage_ids(tokens.ids);
  const size_t count = static_cast<size_t>(rows_);
  if (tokens.resets.data) {
    const auto* flags = tokens.resets.host<uint8_t>();
    has_resets_ = tokens.resets.device || std::any_of(flags, flags + count, [](uint8_t flag) { return flag != 0; });
  }
  if (has_resets_) {
    const auto* flags = static_cast<const uint8_t*>(arrive(tokens.resets, count));
    stage_resets_kernel<<<blocks_for(call_streams_), kThreads, 0, stream_.get()>>>(flags, call_streams_, call_tokens_,
                                                                                   resets_, age_);
    launched();
  }
  gather_rows();
}

void CudaModel::stage_ids(const Input& ids) {
  const void* from = arrive(ids, static_cast<size_t>(rows_) * ids.itemsize);
  stage_ids_kernel<<<blocks_for(rows_), kThreads, 0, stream_.get()>>>(from, ids.itemsize, call_streams_, call_tokens_,
                                                                      spec_.vocab, ids_, verdict_);
  launched();
}

void CudaModel::gather_rows() { gather_rows(embedding_, ids_); }

void CudaModel::gather_rows(const float* table, const int32_t* ids) {
  with_real(spec_.bf16, [&](auto real) {
    gather_rows_kernel<<<static_cast<int>(rows_), 128, 0, stream_.get()>>>(
        table, ids, int64_t{spec_.dim}, panel_values(), static_cast<decltype(real)*>(x_));
  });
  launched();
}

void CudaModel::stage_targets(const Targets& targets) {
  const size_t count = static_cast<size_t>(rows_);
  const void* ids = arrive(targets.ids, count * targets.ids.itemsize);
  stage_ids_kernel<<<blocks_for(rows_), kThreads, 0, stream_.get()>>>(ids, targets.ids.itemsize, call_streams_,
                                                                      call_tokens_, spec_.vocab, target_ids_, verdict_);
  launched();
  const bool magnitudes = targets.normalize == Normalize::absolute;
  const auto* weights = static_cast<const float*>(arrive(targets.weights, count * sizeof(float)));
  stage_weights_kernel<<<blocks_for(rows_), kThreads, 0, stream_.get()>>>(weights, call_streams_, call_tokens_,
                                                                          magnitudes, target_weights_, verdict_);
  launched();
  sum_weights_kernel<<<1, 1024, 0, stream_.get()>>>(target_weights_, rows_, magnitudes, targets.divisor, verdict_);
  launched();
}

void CudaModel::summarize(const Output& predictions) {
  const int regions = static_cast<int>(regions_.size());
  measure_rates_kernel<<<regions, 1024, 0, stream_.get()>>>(region_views_, static_cast<double>(rows_),
                                                            spec_.rate_target, region_part_, rate_sums_);
  launched();
  summarize_kernel<<<1, 1024, 0, stream_.get()>>>({rows_, call_streams_, call_tokens_, regions, target_weights_,
                                                   row_loss_, target_ids_, row_best_, region_part_, spec_.rate_weight,
                                                   predictions.device ? predictions.as<int32_t>()
                                                   : predictions.data ? predictions_
                                                                      : nullptr,
                                                   verdict_});
  launched();
}

void CudaModel::judge(bool with_losses) {
  judge_kernel<<<1, 1024, 0, stream_.get()>>>(with_losses ? row_loss_ : nullptr, rows_, verdict_);
  launched();
}

void CudaModel::commit(bool judging, bool drawn) {
  int log_streams = 0;  // as many streams to a block of threads as there are, in powers of two
  while (1 << log_streams < std::min(call_streams_, kCommitRows)) ++log_streams;
  const int tiles_each = kCommitRows >> log_streams, tile_blocks = (tiles_ + tiles_each - 1) / tiles_each;
  const unsigned pieces = (call_streams_ - 1) / (1 << log_streams) + 1;
  const int64_t outputs = int64_t{call_streams_} * spec_.dim, of_blocks = int64_t{4} * kThreads * pieces;
  const Commit job{region_views_,
                   active_->views(),
                   tile_names_,
                   has_resets_ ? age_ : nullptr,
                   o_ + (rows_ - call_streams_) * spec_.dim,
                   active_->o(),
                   outputs,
                   call_streams_,
                   call_tokens_,
                   tiles_,
                   tile_blocks,
                   log_streams,
                   judging,
                   verdict_,
                   drawn ? draw_ : nullptr};
  const dim3 grid(tile_blocks + static_cast<unsigned>((outputs + of_blocks - 1) / of_blocks), pieces);
  with_real(spec_.bf16, [&](auto real) {
    launch_dependent(drawn && starts_early(), grid, kThreads, 0, stream_.get(), commit_kernel<decltype(real)>, job);
  });
  launched();
}

const Verdict& CudaModel::finish(size_t extra_bytes) {
  post(extra_bytes);
  settle();
  return heard();
}

// The one copy back of a call.
void CudaModel::post(size_t extra_bytes) {
  const size_t bytes = sizeof(Verdict) + sizeof(double) * regions_.size() + extra_bytes;
  char* const room = pinned(bytes);
  copy_out(room, verdict_, bytes);
  result_ = room;
}

// Once it is there. Errors that only the device could see are raised here.
const Verdict& CudaModel::heard() {
  const Verdict& verdict = *reinterpret_cast<const Verdict*>(result_);
  if (verdict.bad_id) {
    const int at = verdict.bad_id - 1;
    throw std::out_of_range("ids or targets in device memory, position [" + std::to_string(at / call_tokens_) + ", " +
                            std::to_string(at % call_tokens_) + "]: expected token ids in 0.." +
                            std::to_string(spec_.vocab - 1) + "; nothing was changed");
  }
  if (verdict.bad_weight) {
    const int at = verdict.bad_weight - 1;
    throw std::invalid_argument("weights in device memory, position [" + std::to_string(at / call_tokens_) + ", " +
                                std::to_string(at % call_tokens_) +
                                "]: expected finite values, >= 0 with normalize='sum'; nothing was changed");
  }
  return verdict;
}

void CudaModel::set_draw(const Sampling& sampling) {
  draws_from_all_ = sampling.greedy || ((sampling.top_k <= 0 || sampling.top_k >= spec_.vocab) && sampling.top_p >= 1);
  set_draw_kernel<<<1, 1, 0, stream_.get()>>>(draw_, Draw{sampling, 0});  // by value: nothing to keep until it is read
  launched();
}

void CudaModel::report(const Targets& targets, StepStats* stats) {
  const Verdict& verdict = *reinterpret_cast<const Verdict*>(result_);
  const double* rates = reinterpret_cast<const double*>(result_ + sizeof(Verdict));
  stats->loss = verdict.loss;
  stats->homeostasis = verdict.homeostasis;
  stats->tokens = verdict.tokens;
  stats->correct = verdict.correct;
  stats->finite = verdict.ok;
  rates_.assign(rates, rates + regions_.size());
  if (on_host(targets.predictions)) {
    std::memcpy(targets.predictions.data, rates + regions_.size(), sizeof(int32_t) * rows_);
  }
}

}  // namespace neurogen::cuda
