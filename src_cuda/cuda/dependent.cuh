// Kernels that come up while the one before them in the stream still works (programmatic dependent launch). The trick:
// a launch, and the reads of what no token writes, cost no time of their own. The cost: the room of blocks that wait,
// and rules to keep. The gain: of 76 us a token of one stream (`base`, H200) 2, by the wall, 14 of which it waited for
// the host then.
//
// The rules. Every block of a kernel that is launched so comes by wait_for_earlier(); thus the end of a kernel is the
// end of all before it, however early they started. Before it, nothing is written, and nothing is read that any kernel
// of a token writes: the one before may itself still wait. What precedes the first token is launched plainly. Reads
// behind the wait go without __restrict__ and __ldg, which would let the compiler, or the cache of a multiprocessor,
// answer them with what was there before.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "device.h"

namespace neurogen::cuda {

// Until the kernels before are done, and what they wrote is there; waiting takes no issue slots. No wait at all in a
// kernel that was launched plainly.
__device__ inline void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks have come by, the next kernel may come up where there is room: by then this one has all of its own.
__device__ inline void let_later_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

inline cudaLaunchAttribute early_start() {
  cudaLaunchAttribute out{};
  out.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  out.val.programmaticStreamSerializationAllowed = 1;
  return out;
}

// For every kernel of such a chain, and for one whose later ones start early: blocks of threads can only share a
// multiprocessor that is divided between L1 and shared memory as they all need it, and it is divided anew when empty.
template <class Kernel>
void take_shared_memory(Kernel* kernel) {
  NG_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

// early: in this way, which asks for CudaModel::starts_early(); otherwise plainly.
template <class... Parameters, class... Arguments>
void launch_dependent(bool early, dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                      void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchAttribute attribute = early_start();
  cudaLaunchConfig_t launch{};
  launch.gridDim = grid;
  launch.blockDim = dim3(threads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = early;
  if (early) take_shared_memory(kernel);
  NG_CUDA(cudaLaunchKernelEx(&launch, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace neurogen::cuda
