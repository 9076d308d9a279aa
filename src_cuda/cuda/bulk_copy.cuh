// Copies in bulk, compute capability 9.0: one instruction of one lane brings kilobytes of contiguous global memory to
// shared memory and tells a barrier there. Addresses and sizes are multiples of 16 bytes.
//
// A barrier turns over when all arrivals that it was begun with have come and every byte that was promised is there;
// round: how often it had turned over before, of which it tells even and odd apart.
#pragma once

#include <cstdint>

namespace neurogen::cuda {

__device__ inline unsigned bulk_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ inline void begin_turns(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bulk_address(barrier)), "r"(arrivals) : "memory");
}

// Copies that are started from here on, by whoever meets this thread, know the barriers that it has begun.
__device__ inline void turns_begun() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bulk_address(barrier)) : "memory");
}

// Arrives, and promises bytes.
__device__ inline void arrive_for(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bulk_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ inline void bring(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(bulk_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(bulk_address(barrier))
      : "memory");
}

__device__ inline bool turned(uint64_t* barrier, unsigned round) {
  int out;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(out)
      : "r"(bulk_address(barrier)), "r"(round % 2)
      : "memory");
  return out;
}

// A warp waits together.
__device__ inline void await_turn(uint64_t* barrier, unsigned round) {
  while (!__all_sync(0xffffffffu, turned(barrier, round))) {
  }
}

}  // namespace neurogen::cuda
