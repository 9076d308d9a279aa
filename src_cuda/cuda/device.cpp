#include "device.h"

#include <new>

#include "context.h"
#include "neurogen/model.h"

namespace neurogen {

int cuda_device_count() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess || count == 0) {
    cudaGetLastError();
    const char* reason = code == cudaSuccess                   ? "none is visible"
                         : code == cudaErrorInsufficientDriver ? "no NVIDIA driver, or one too old for this build"
                                                               : cudaGetErrorString(code);
    throw std::runtime_error(std::string("no CUDA device can be used: ") + reason);
  }
  for (int device = 0; device < count; ++device) {
    int major = 0;
    NG_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major >= 8) return count;
  }
  throw std::runtime_error("no CUDA device can be used: none has compute capability 8.0 or newer");
}

CudaDevice cuda_device(int device) {
  const int count = cuda_device_count();
  if (device < 0 || device >= count) {
    throw std::invalid_argument("device: expected 0.." + std::to_string(count - 1) + ", got " + std::to_string(device));
  }
  const cuda::OnDevice scope(device);
  cudaDeviceProp properties;
  NG_CUDA(cudaGetDeviceProperties(&properties, device));
  if (properties.major < 8 || !properties.cooperativeLaunch) {
    throw std::runtime_error(std::string(properties.name) + ": expected compute capability 8.0 or newer, got " +
                             std::to_string(properties.major) + "." + std::to_string(properties.minor));
  }
  size_t free_bytes = 0, total_bytes = 0;
  NG_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  int driver = 0;
  NG_CUDA(cudaDriverGetVersion(&driver));
  CudaDevice out;
  out.name = properties.name;
  out.driver = std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  out.free_bytes = static_cast<int64_t>(free_bytes);
  out.total_bytes = static_cast<int64_t>(total_bytes);
  return out;
}

namespace cuda {

CudaError::CudaError(cudaError_t code, const char* expression, const char* file, int line)
    : std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ") in " +
                         expression + " at " + file + ":" + std::to_string(line)),
      code_(code) {}

void check(cudaError_t code, const char* expression, const char* file, int line) {
  if (code == cudaSuccess) return;
  cudaGetLastError();
  if (code == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw CudaError(code, expression, file, line);
}

OnDevice::OnDevice(int device) : before_(current_context()), own_(primary_context(device)) {
  if (before_ != own_) set_current_context(own_);
}

OnDevice::~OnDevice() {
  try {
    if (before_ != own_) set_current_context(before_);
  } catch (const std::runtime_error&) {  // the context that was current is gone
  }
}

DeviceMemory device_memory(size_t bytes) {
  void* memory = nullptr;
  NG_CUDA(cudaMalloc(&memory, bytes));
  DeviceMemory out(memory);
  NG_CUDA(cudaMemset(memory, 0, bytes));
  NG_CUDA(cudaDeviceSynchronize());  // the memset runs on the default stream, which ours does not wait for
  return out;
}

PinnedMemory pinned_memory(size_t bytes) {
  void* memory = nullptr;
  NG_CUDA(cudaMallocHost(&memory, bytes));
  return PinnedMemory(memory);
}

Stream new_stream() {
  cudaStream_t stream = nullptr;
  NG_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return Stream(stream);
}

Event new_event(bool spin) {
  cudaEvent_t event = nullptr;
  NG_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | (spin ? 0 : cudaEventBlockingSync)));
  return Event(event);
}

}  // namespace cuda
}  // namespace neurogen
