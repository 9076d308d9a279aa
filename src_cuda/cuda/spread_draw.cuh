// A draw by a cluster of blocks of threads, where every token may be drawn: it keeps a row of up to 32,768 tokens in
// registers, and its blocks tell each other the best token and the sums of masses. The same whole numbers are added up
// as in sampling.cu, so the same token is drawn.
#pragma once

#include <cooperative_groups.h>

#include "dependent.cuh"
#include "draw.cuh"

namespace neurogen::cuda {

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

}  // namespace neurogen::cuda
