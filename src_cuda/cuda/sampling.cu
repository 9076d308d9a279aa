// Drawing one token from every row of logits: common/sampling.h in integers, so that the order of work does not matter.
//
// mass(logit) = round(exp((logit - best) / temperature) * 2^k), 2^k for the best logit itself; k is the largest with
// which V masses fit 63 bits, at most 52 (48 for V = 32,000). A mass is off by half a unit and exp's last bits, so a
// cumulative sum is off the float64 definition by at most V * 2^-(k+1) of the best token's mass, and as a rule by
// sqrt(V) * 2^-(k+2): a draw differs only where the uniform falls that close to the border between two tokens.
//
// Tokens are ordered by key, the bits of the logit made to count upwards, then by lower id. top_k and top_p both ask
// how far down the order to go until the tokens, counted or weighed, reach what is wanted: the highest digit of the key
// that does it, then the next digit among the tokens that share it, in histograms in shared memory. Of the tokens tied
// at the key found, the lowest ids are kept. Finding the last of these, and the draw, invert a cumulative sum in id
// order. A row is read about twice to draw, three times more for each of top_k and top_p; after the first time from the
// cache.
//
// Where every token may be drawn and the device has clusters, see spread_draw.cuh.
#include "spread_draw.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kOwnBins = kBins / kThreads;

// Shared memory of a block.
struct Room {
  uint64_t warp[kWarps];
  uint32_t low[kBins], high[kBins];  // histogram: 64-bit sums in two words
  uint64_t above, tied;              // weight of the tokens in higher digits; in the digit found
  uint32_t digit;
  int32_t id;
};

// Inclusive sum over the block; `all` gets the sum of everybody.
__device__ inline uint64_t block_scan(uint64_t x, Room& room, uint64_t* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_scan(x);
  __syncthreads();
  if (lane == 31) room.warp[warp] = x;
  __syncthreads();
  const uint64_t warps = warp_scan(lane < kWarps ? room.warp[lane] : 0);
  *all = __shfl_sync(kWholeWarp, warps, 31);
  const uint64_t before = __shfl_sync(kWholeWarp, warps, (warp + 31) % 32);
  return warp > 0 ? before + x : x;
}

struct Row {
  const float* logits;  // [V]
  int32_t vocab;
  __device__ uint32_t key(int32_t id) const { return key_of(logits[id]); }
};

struct One {
  __device__ uint64_t operator()(uint32_t) const { return 1; }
};

// The tokens above `key`, and those at it up to id `last`.
struct Kept {
  uint32_t key;
  int32_t last;
  __device__ bool operator()(uint32_t token_key, int32_t id) const {
    return token_key > key || (token_key == key && id <= last);
  }
};

// (key, ~id) of the best token: lower ids win ties.
__device__ inline uint64_t find_best(const Row& row, Room& room) {
  uint64_t best = 0;
  for (int32_t id = threadIdx.x; id < row.vocab; id += kThreads) {
    best = max(best, uint64_t{row.key(id)} << 32 | ~static_cast<uint32_t>(id));
  }
  for (int offset = 16; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(kWholeWarp, best, offset));
  if (threadIdx.x % 32 == 0) room.warp[threadIdx.x / 32] = best;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) best = max(best, room.warp[i]);
  return best;
}

// The first id at which the cumulative sum of weight(key, id) exceeds goal(sum of all); goal < that sum.
template <class Weight, class Goal>
__device__ int32_t invert(const Row& row, Room& room, Weight weight, Goal goal) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Every warp adds up a stretch of ids. Only the stretch in which the goal is passed is looked at token by token.
  const int64_t stretch = (int64_t{row.vocab} + kThreads - 1) / kThreads * 32;
  const auto stretch_end = [&](int i) { return static_cast<int32_t>(min((i + 1) * stretch, int64_t{row.vocab})); };
  uint64_t sum = 0, all = 0;
  for (int64_t id = warp * stretch + lane; id < stretch_end(warp); id += 32) {
    sum += weight(row.key(static_cast<int32_t>(id)), static_cast<int32_t>(id));
  }
  const uint64_t reached = block_scan(sum, room, &all), target = goal(all);
  const uint64_t before = __shfl_sync(kWholeWarp, reached - sum, 0), after = __shfl_sync(kWholeWarp, reached, 31);
  if (lane == 0 && before <= target && target < after) {
    room.digit = warp;
    room.above = before;
  }
  __syncthreads();
  const int found = room.digit;
  uint64_t passed = room.above;
  for (int64_t begin = found * stretch; passed <= target && begin < stretch_end(found); begin += kThreads) {
    const int64_t id = begin + threadIdx.x;
    const bool inside = id < stretch_end(found);
    const uint64_t own = inside ? weight(row.key(static_cast<int32_t>(id)), static_cast<int32_t>(id)) : 0;
    const uint64_t here = passed + block_scan(own, room, &all);
    if (here - own <= target && target < here) room.id = static_cast<int32_t>(id);
    passed += all;
  }
  __syncthreads();
  return room.id;
}

// 64-bit addition by two 32-bit ones, which shared memory does by itself: whoever makes the low word wrap carries.
__device__ inline void add(Room& room, uint32_t bin, uint64_t x) {
  const uint32_t low = static_cast<uint32_t>(x), before = atomicAdd(&room.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(x >> 32) + (before + low < before);
  if (high > 0) atomicAdd(&room.high[bin], high);
}

// The shortest run of tokens out of `among`, in order, whose weights reach wanted(sum of all), which is 1 .. that sum.
template <class Weight, class Wanted>
__device__ Kept keep(const Row& row, Room& room, Kept among, Weight weight, Wanted wanted) {
  uint32_t key = 0;
  uint64_t missing = 0;
  for (int upper = 32; upper > 0; upper -= kDigitBits) {  // bits `upper` and above of the key are known
    const int lower = max(upper - kDigitBits, 0), width = upper - lower;
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads) room.low[i] = room.high[i] = 0;
    __syncthreads();
    for (int32_t id = threadIdx.x; id < row.vocab; id += kThreads) {
      const uint32_t own = row.key(id);
      if (uint64_t{own} >> upper != key || !among(own, id)) continue;
      const uint64_t heavy = weight(own);
      if (heavy > 0) add(room, own >> lower & ((1u << width) - 1), heavy);
    }
    __syncthreads();
    uint64_t bins[kOwnBins], sum = 0, all = 0;
    const uint32_t highest = kBins - 1 - threadIdx.x * kOwnBins;  // the scan goes from the highest digit down
    for (int i = 0; i < kOwnBins; ++i) {
      bins[i] = uint64_t{room.high[highest - i]} << 32 | room.low[highest - i];
      sum += bins[i];
    }
    uint64_t above = block_scan(sum, room, &all) - sum;
    if (upper == 32) missing = wanted(all);
    for (int i = 0; i < kOwnBins; ++i) {
      if (above < missing && missing <= above + bins[i]) {
        room.digit = highest - i;
        room.above = above;
        room.tied = bins[i];
      }
      above += bins[i];
    }
    __syncthreads();
    key = key << width | room.digit;
    missing -= room.above;
  }
  const uint64_t each = weight(key), count = (missing + each - 1) / each;
  if (count * each == room.tied) return {key, key == among.key ? among.last : row.vocab - 1};
  const auto tied = [&](uint32_t own, int32_t id) -> uint64_t { return own == key && among(own, id); };
  return {key, invert(row, room, tied, [&](uint64_t) { return count - 1; })};
}

// One block a row.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    draw_tokens_kernel(const float* __restrict__ logits, int32_t vocab, const Draw* arguments, int64_t first_row,
                       int32_t* ids, Speech<Real> speech) {
  __shared__ Room room;
  const Sampling how = arguments->sampling;
  const Row row{logits + int64_t{blockIdx.x} * vocab, vocab};
  const uint64_t best = find_best(row, room);
  const uint32_t best_key = static_cast<uint32_t>(best >> 32);
  const bool cut_count = how.top_k > 0 && how.top_k < vocab, cut_mass = how.top_p < 1.0f;
  int32_t drawn;
  if (how.greedy) {
    drawn = static_cast<int32_t>(~static_cast<uint32_t>(best));
  } else if (logit_of(best_key) == -INFINITY) {
    // Nothing is possible. What the definition answers, whose sums are NaN.
    drawn = cut_mass ? 0 : cut_count ? how.top_k - 1 : vocab - 1;
  } else {
    const Mass mass = mass_of(how, best_key, vocab);
    Kept kept{0, vocab - 1};
    if (cut_count) kept = keep(row, room, kept, One{}, [&](uint64_t) { return static_cast<uint64_t>(how.top_k); });
    if (cut_mass) {
      kept = keep(row, room, kept, mass, [&](uint64_t all) {
        bool cut;
        const uint64_t share = how.top_p > 0.0f ? static_cast<uint64_t>(how.top_p * 0x1p63) : 0;
        const uint64_t part = multiply_shift(share, all, 63, &cut);
        return max(part + cut, uint64_t{1});
      });
    }
    const uint64_t uniform = uniform_of(how, first_row + blockIdx.x);
    drawn = invert(
        row, room, [&](uint32_t key, int32_t id) -> uint64_t { return kept(key, id) ? mass(key) : 0; },
        [&](uint64_t all) {
          bool cut;
          return multiply_shift(uniform, all, 53, &cut);
        });
  }
  if (threadIdx.x == 0) ids[blockIdx.x] = drawn;
  speech.say(drawn, first_row + blockIdx.x, arguments->kept);
}

}  // namespace

// Not only the device: the code that was loaded for it has to know of clusters, and of launches that start early.
bool CudaModel::code_of_90() {
  if (code_of_90_ < 0) {
    cudaFuncAttributes code{};
    NG_CUDA(cudaFuncGetAttributes(&code, draw_spread_kernel<float>));
    code_of_90_ = code.ptxVersion >= 90 && code.binaryVersion >= 90;
  }
  return code_of_90_;
}

bool CudaModel::draw_spreads() { return code_of_90() && draws_from_all_ && spec_.vocab <= kMostBlocks * kSpreadIds; }

// logits: [rows, V]; ids: [rows]; row i draws as row first_row + i of the definition, by draw_. speak: the ids are kept
// in drawn_ and become the brain's input; logits that draw_spreads() lack the bias.
void CudaModel::draw(const float* logits, int64_t rows, int64_t first_row, int32_t* ids, bool speak) {
  const Draw* const arguments = draw_;
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    Speech<Real> speech{};
    if (speak) {
      speech = {draw_spreads() ? decoder_bias_ : nullptr,
                embedding_,
                spec_.dim,
                panel_values(),
                call_streams_,
                drawn_,
                static_cast<Real*>(x_)};
    }
    if (!draw_spreads()) {
      draw_tokens_kernel<Real><<<static_cast<unsigned>(rows), kThreads, 0, stream_.get()>>>(
          logits, spec_.vocab, arguments, first_row, ids, speech);
      return;
    }
    int blocks = 2;  // in a cluster of one, st.async is an error to compute-sanitizer
    while (blocks * kSpreadIds < spec_.vocab) blocks *= 2;
    cudaLaunchAttribute attributes[2] = {{}, early_start()};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(rows * blocks));
    launch.blockDim = dim3(kSpreadThreads);
    launch.stream = stream_.get();
    const bool early = speak && starts_early();
    launch.attrs = attributes;
    launch.numAttrs = 1 + early;
    if (early) take_shared_memory(draw_spread_kernel<Real>);
    NG_CUDA(
        cudaLaunchKernelEx(&launch, draw_spread_kernel<Real>, logits, spec_.vocab, arguments, first_row, ids, speech));
  });
  launched();
}

}  // namespace neurogen::cuda
