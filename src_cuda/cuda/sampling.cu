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
// Where every token may be drawn and the device has clusters, a cluster of blocks of threads draws a row of up to
// 32,768 tokens: it keeps the row in registers, and its blocks tell each other the best token and the sums of masses.
// The same whole numbers are added up, so the same token is drawn.
#include <cooperative_groups.h>

#include <cmath>

#include "dependent.cuh"
#include "gather.cuh"
#include "model.h"
#include "numbers.cuh"
#include "philox.h"

namespace neurogen::cuda {
namespace {

constexpr uint32_t kSamplingTag = 0x73616d70u;  // as in common/sampling.cpp
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kOwnBins = kBins / kThreads;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Shared memory of a block.
struct Room {
  uint64_t warp[kWarps];
  uint32_t low[kBins], high[kBins];  // histogram: 64-bit sums in two words
  uint64_t above, tied;              // weight of the tokens in higher digits; in the digit found
  uint32_t digit;
  int32_t id;
};

// Inclusive sum over a warp.
__device__ inline uint64_t warp_scan(uint64_t x) {
  const int lane = threadIdx.x % 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t lower = __shfl_up_sync(kWholeWarp, x, offset);
    if (lane >= offset) x += lower;
  }
  return x;
}

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

// Counts upwards with the logit. NaN counts as impossible, -0 as 0.
__device__ inline uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(logit == logit ? logit + 0.0f : -INFINITY);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float logit_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

struct Row {
  const float* logits;  // [V]
  int32_t vocab;
  __device__ uint32_t key(int32_t id) const { return key_of(logits[id]); }
};

// Masses of tokens, by key.
struct Mass {
  uint32_t best_key;
  double best, sharpness, unit;  // logit of the best; 1 / temperature; 2^k
  __device__ uint64_t operator()(uint32_t key) const {
    if (key == best_key) return static_cast<uint64_t>(unit);
    const double x = (logit_of(key) - best) * sharpness;
    return x <= 0.0 ? static_cast<uint64_t>(llrint(exp(x) * unit)) : 0;
  }
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

// floor(a * b / 2^shift), and whether anything was cut off.
__device__ inline uint64_t multiply_shift(uint64_t a, uint64_t b, int shift, bool* cut) {
  const uint64_t low = a * b;
  *cut = low << (64 - shift) != 0;
  return __umul64hi(a, b) << (64 - shift) | low >> shift;
}

// What becomes of a token of generation: draw number `kept` of drawn [.., streams], and the brain's input.
template <class Real>
struct Speech {
  const float *bias, *embedding;  // bias: of the logits, which lack it; null = they have it
  int64_t dim, stride, streams;
  int32_t* drawn;  // null = nothing is spoken
  Real* x;         // panels
  // By all threads of a block; row: of all streams.
  __device__ void say(int32_t id, int64_t row, int64_t kept) const {
    if (!drawn) return;
    if (threadIdx.x == 0) drawn[kept * streams + row] = id;
    gather_row<2>(embedding + id * dim, dim, row, stride, threadIdx.x, blockDim.x, x);
  }
};

__device__ inline Mass mass_of(const Sampling& how, uint32_t best_key, int32_t vocab) {
  const int bits = min(52, 31 + __clz(vocab - 1));  // 63 - ceil(log2(V))
  return {best_key, logit_of(best_key), 1.0 / how.temperature, static_cast<double>(uint64_t{1} << bits)};
}

// Of 2^53.
__device__ inline uint64_t uniform_of(const Sampling& how, int64_t row) {
  const Philox random =
      philox(static_cast<uint32_t>(row), static_cast<uint32_t>(how.position), static_cast<uint32_t>(how.position >> 32),
             kSamplingTag, static_cast<uint32_t>(how.seed), static_cast<uint32_t>(how.seed >> 32));
  return uint64_t{random.word[0] >> 5} << 26 | random.word[1] >> 6;
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

constexpr int kSpreadThreads = 512;
constexpr int kSpreadWarps = kSpreadThreads / 32;
constexpr int kFours = 2;                                // of logits a thread keeps, 128 ids from one to the next
constexpr int kSpreadIds = kSpreadThreads * 4 * kFours;  // of a block
constexpr int kMostBlocks = 8;                           // of a cluster
constexpr int kMostPlaces = kMostBlocks * kSpreadWarps;  // of warps in a cluster
constexpr int kHeard = kMostPlaces / 32;                 // places whose word a lane looks at
static_assert(kSpreadWarps % kHeard == 0, "a lane's places are all in the cluster, or none");

// Shared memory of a block: what every warp of the cluster has to say, warp by warp in the order of ids.
struct SpreadRoom {
  uint64_t best[kMostPlaces], sum[kMostPlaces];
  uint64_t best_come, sum_come;  // mbarriers of these
  int32_t id;
};

#if __CUDA_ARCH__ >= 900
// A word and the news that it has come reach another block's shared memory as one. A barrier of the cluster takes a
// fence of the whole GPU before it.
__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
// By one thread, before any barrier of the cluster: `come` will have seen all once so many bytes are here.
__device__ inline void expect(uint64_t* come, int bytes) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;\n"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(come)),
      "r"(bytes)
      : "memory");
}
// To the same places in the shared memory of a block of the cluster.
__device__ inline void send(int block, uint64_t* to, uint64_t x, uint64_t* come) {
  asm volatile(
      "{.reg .u32 to, come;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 come, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [to], %3, [come];}" ::"r"(shared_address(to)),
      "r"(shared_address(come)), "r"(block), "l"(x)
      : "memory");
}
__device__ inline void await(uint64_t* come) {
  int all;
  do {
    asm volatile(
        "{.reg .pred all;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 all, [%1], 0;\n"
        "selp.b32 %0, 1, 0, all;}"
        : "=r"(all)
        : "r"(shared_address(come))
        : "memory");
  } while (!all);
}
#endif

// One cluster a row; neither top_k nor top_p. A warp has 128 * kFours neighbouring ids.
template <class Real>
__global__ void __launch_bounds__(kSpreadThreads, 2)
    draw_spread_kernel(const float* logits, int32_t vocab, const Draw* arguments, int64_t first_row, int32_t* ids,
                       Speech<Real> speech) {
#if __CUDA_ARCH__ >= 900
  __shared__ SpreadRoom room;
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const int told = blocks * kSpreadWarps * static_cast<int>(sizeof(uint64_t));
  if (threadIdx.x == 0) expect(&room.best_come, told), expect(&room.sum_come, told);
  __cluster_barrier_arrive_relaxed();  // what other blocks are told has to wait until they run
  const int lane = threadIdx.x % 32, place = rank * kSpreadWarps + static_cast<int>(threadIdx.x) / 32;
  const int64_t row = blockIdx.x / blocks;
  const int32_t begin = (place * 32 * kFours + lane) * 4;
  const auto id_of = [&](int j, int e) { return begin + j * 128 + e; };
  const auto load = [&](const float* from, float (&to)[kFours][4]) {
    if (vocab % 4 == 0) {  // rows are aligned to fours
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        if (id_of(j, 0) >= vocab) continue;
        const float4 x = load4(from + id_of(j, 0));
        to[j][0] = x.x, to[j][1] = x.y, to[j][2] = x.z, to[j][3] = x.w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (id_of(j, e) < vocab) to[j][e] = from[id_of(j, e)];
        }
      }
    }
  };
  float z[kFours][4] = {}, bias[kFours][4] = {};
  if (speech.bias) load(speech.bias, bias);
  wait_for_earlier();
  const Sampling how = arguments->sampling;
  const int64_t kept = arguments->kept;
  load(logits + row * vocab, z);
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) z[j][e] += bias[j][e];
  }

  // Every warp of the cluster gets to know what every other has found. A block that knows is told nothing more of it,
  // so it may end.
  const auto tell = [&](uint64_t (&what)[kMostPlaces], uint64_t x, uint64_t& come) {
    if (lane < blocks) send(lane, &what[place], x, &come);
    await(&come);
  };
  const int heard = lane * kHeard;  // the first of a lane's places
  const bool hears = heard < blocks * kSpreadWarps;

  uint64_t best = 0;
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int32_t id = id_of(j, e);
      if (id < vocab) best = max(best, uint64_t{key_of(z[j][e])} << 32 | ~static_cast<uint32_t>(id));
    }
  }
  const auto warp_best = [&] {
    for (int offset = 16; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(kWholeWarp, best, offset));
  };
  warp_best();
  __cluster_barrier_wait();
  tell(room.best, best, room.best_come);
#pragma unroll
  for (int i = 0; i < kHeard; ++i) best = max(best, hears ? room.best[heard + i] : 0);
  warp_best();

  const uint32_t best_key = static_cast<uint32_t>(best >> 32);
  bool found = false;
  if (how.greedy || logit_of(best_key) == -INFINITY) {
    found = rank == 0 && threadIdx.x == 0;
    // Where nothing is possible: what the definition answers, whose sums are NaN.
    if (found) room.id = how.greedy ? static_cast<int32_t>(~static_cast<uint32_t>(best)) : vocab - 1;
  } else {
    const Mass mass = mass_of(how, best_key, vocab);
    const auto mass_at = [&](int j, int e) { return id_of(j, e) < vocab ? mass(key_of(z[j][e])) : 0; };
    uint64_t sums[kFours], own = 0;
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      sums[j] = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[j] += mass_at(j, e);
      own += sums[j];
    }
    own = warp_sum(own);
    tell(room.sum, own, room.sum_come);
    uint64_t sum[kHeard], several = 0;
#pragma unroll
    for (int i = 0; i < kHeard; ++i) several += sum[i] = hears ? room.sum[heard + i] : 0;
    const uint64_t reached = warp_scan(several), all = __shfl_sync(kWholeWarp, reached, 31);
    uint64_t passed = __shfl_sync(kWholeWarp, reached - several, place / kHeard);
#pragma unroll
    for (int i = 0; i < kHeard; ++i) {
      const uint64_t before = __shfl_sync(kWholeWarp, sum[i], place / kHeard);
      if (i < place % kHeard) passed += before;
    }
    bool cut;
    const uint64_t target = multiply_shift(uniform_of(how, first_row + row), all, 53, &cut);
    if (passed <= target && target < passed + own) {  // one warp of the cluster
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        const uint64_t here = warp_scan(sums[j]);
        uint64_t before = passed + here - sums[j];
        if (before <= target && target < before + sums[j]) {  // one lane
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint64_t after = before + mass_at(j, e);
            if (before <= target && target < after) room.id = id_of(j, e), found = true;
            before = after;
          }
        }
        passed += __shfl_sync(kWholeWarp, here, 31);
      }
    }
  }
  if (!__syncthreads_or(found)) return;
  const int32_t drawn = room.id;
  if (threadIdx.x == 0) ids[row] = drawn;
  speech.say(drawn, first_row + row, kept);
#endif
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
    int blocks = 1;
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
