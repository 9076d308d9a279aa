// Owners of CUDA resources, and the check of every CUDA call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>

struct CUctx_st;

namespace neurogen::cuda {

// what(): CUDA's text, the expression, file and line.
class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, const char* expression, const char* file, int line);
  cudaError_t code() const { return code_; }

 private:
  cudaError_t code_;
};

// Throws for anything but success, and clears the error so that the next call does not report it again. Running out of
// memory becomes std::bad_alloc.
void check(cudaError_t code, const char* expression, const char* file, int line);
#define NG_CUDA(expression) ::neurogen::cuda::check((expression), #expression, __FILE__, __LINE__)

// Makes a device's primary context current for a scope. Every entry of the library holds one.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  CUctx_st *before_, *own_;
};

// Destructors ignore errors: the context may be gone at exit.
struct FreeDevice {
  void operator()(void* memory) const { cudaFree(memory); }
};
struct FreePinned {
  void operator()(void* memory) const { cudaFreeHost(memory); }
};
struct DestroyStream {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
struct DestroyEvent {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
struct DestroyGraph {
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
using DeviceMemory = std::unique_ptr<void, FreeDevice>;
using PinnedMemory = std::unique_ptr<void, FreePinned>;
using Stream = std::unique_ptr<CUstream_st, DestroyStream>;
using Event = std::unique_ptr<CUevent_st, DestroyEvent>;
using GraphExec = std::unique_ptr<CUgraphExec_st, DestroyGraph>;

DeviceMemory device_memory(size_t bytes);  // zeroed
PinnedMemory pinned_memory(size_t bytes);
Stream new_stream();         // non-blocking: does not wait for the default stream
Event new_event(bool spin);  // without timing; a wait sleeps unless `spin`

}  // namespace neurogen::cuda
