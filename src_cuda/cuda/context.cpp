#include "context.h"

#include <cuda.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "device.h"

namespace neurogen::cuda {
namespace {

template <class Function>
void look_up(const char* name, Function** out) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  NG_CUDA(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status));
#else
  NG_CUDA(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status));
#endif
  if (status != cudaDriverEntryPointSuccess || !found) {
    throw std::runtime_error(std::string("CUDA: expected a driver with ") + name + ", got none");
  }
  *out = reinterpret_cast<Function*>(found);
}

void check(CUresult code, const char* name) {
  if (code == CUDA_SUCCESS) return;
  if (code == CUDA_ERROR_OUT_OF_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(std::string("CUDA: error ") + std::to_string(code) + " of the driver in " + name);
}

struct Driver {
  decltype(cuInit)* init = nullptr;
  decltype(cuDeviceGet)* device_get = nullptr;
  decltype(cuDevicePrimaryCtxRetain)* retain = nullptr;
  decltype(cuCtxGetCurrent)* get_current = nullptr;
  decltype(cuCtxSetCurrent)* set_current = nullptr;
  decltype(cuPointerGetAttributes)* attributes = nullptr;

  Driver() {
    look_up("cuInit", &init);
    look_up("cuDeviceGet", &device_get);
    look_up("cuDevicePrimaryCtxRetain", &retain);
    look_up("cuCtxGetCurrent", &get_current);
    look_up("cuCtxSetCurrent", &set_current);
    look_up("cuPointerGetAttributes", &attributes);
    check(init(0), "cuInit");
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

}  // namespace

CUctx_st* primary_context(int device) {
  static std::mutex alone;
  static std::map<int, CUcontext> kept;
  const std::lock_guard<std::mutex> lock(alone);
  const auto known = kept.find(device);
  if (known != kept.end()) return known->second;
  CUdevice number = 0;
  CUcontext context = nullptr;
  check(driver().device_get(&number, device), "cuDeviceGet");
  check(driver().retain(&context, number), "cuDevicePrimaryCtxRetain");
  return kept[device] = context;
}

CUctx_st* current_context() {
  CUcontext out = nullptr;
  check(driver().get_current(&out), "cuCtxGetCurrent");
  return out;
}

void set_current_context(CUctx_st* context) { check(driver().set_current(context), "cuCtxSetCurrent"); }

// The plural of the query does not fail for memory it does not know, and leaves nulls.
Place find(const void* memory, int device) {
  const OnDevice scope(device);
  CUcontext context = nullptr;
  unsigned kind = 0, managed = 0, plain = 0;
  int where = -1;
  CUdeviceptr start = 0;
  size_t size = 0;
  const std::pair<CUpointer_attribute, void*> queries[] = {{CU_POINTER_ATTRIBUTE_CONTEXT, &context},
                                                           {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, &kind},
                                                           {CU_POINTER_ATTRIBUTE_IS_MANAGED, &managed},
                                                           {CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, &where},
                                                           {CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, &plain},
                                                           {CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, &start},
                                                           {CU_POINTER_ATTRIBUTE_RANGE_SIZE, &size}};
  constexpr unsigned count = sizeof(queries) / sizeof(queries[0]);
  CUpointer_attribute asked[count];
  void* answers[count];
  for (unsigned i = 0; i < count; ++i) std::tie(asked[i], answers[i]) = queries[i];
  const CUdeviceptr address = reinterpret_cast<CUdeviceptr>(memory);
  check(driver().attributes(count, asked, answers, address), "cuPointerGetAttributes");
  Place out;
  out.known = kind != 0;
  out.host = kind == CU_MEMORYTYPE_HOST && !managed;
  out.device = managed ? device : where;
  // Memory of a pool, or mapped piece by piece, belongs to no context, and an array may lie on several pieces.
  out.own_context = !context || managed || where != device || context == primary_context(device);
  if (plain && address >= start) out.bytes = static_cast<int64_t>(start + size - address);
  return out;
}

}  // namespace neurogen::cuda
