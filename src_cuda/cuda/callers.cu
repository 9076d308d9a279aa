// The caller's arrays in device memory, read, checked and written where they are; and what went wrong in calls that do
// not wait. Such memory is aligned to its values and no more, so nothing here reads or writes four at once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "model.h"

namespace neurogen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;

unsigned blocks_for(int64_t count) { return static_cast<unsigned>(std::clamp<int64_t>(count, 1, kMostBlocks)); }

__device__ inline int64_t id_at(const void* ids, int itemsize, int64_t at) {
  return itemsize == 8 ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
}

// One block a row: out[i] = table[ids[i]], NaN where there is no such row.
__global__ void encode_kernel(const float* table, const void* ids, int itemsize, int64_t count, int vocab, int64_t dim,
                              float* out, Faults* faults) {
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const int64_t id = id_at(ids, itemsize, row);
    const bool known = id >= 0 && id < vocab;
    if (!known && threadIdx.x == 0) atomicMax(&faults->bad_id, static_cast<unsigned long long>(row + 1));
    for (int64_t j = threadIdx.x; j < dim; j += blockDim.x) out[row * dim + j] = known ? table[id * dim + j] : NAN;
  }
}

__global__ void check_ids_kernel(const void* ids, int itemsize, int64_t count, int vocab, Faults* faults) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t id = id_at(ids, itemsize, i);
    if (id < 0 || id >= vocab) atomicMax(&faults->bad_id, static_cast<unsigned long long>(i + 1));
  }
}

__global__ void check_rows_kernel(const float* rows, int64_t count, unsigned long long* fault) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    if (!isfinite(rows[i])) atomicMax(fault, static_cast<unsigned long long>(i + 1));
  }
}

__global__ void remember_state_kernel(const Verdict* verdict, Faults* faults) {
  if (verdict->state_not_finite) faults->state_not_finite = 1;
}

std::string element(unsigned long long fault, int64_t row) {
  const int64_t at = static_cast<int64_t>(fault) - 1;
  return " in device memory, position [" + std::to_string(at / row) + ", " + std::to_string(at % row) +
         "]: expected finite values";
}

}  // namespace

Faults* CudaModel::faults() {
  unheard_ = true;
  return faults_;
}

void CudaModel::encode_rows(const void* ids, int itemsize, int64_t count, float* out) {
  encode_kernel<<<blocks_for(count), 128, 0, stream_.get()>>>(embedding_, ids, itemsize, count, spec_.vocab,
                                                              int64_t{spec_.dim}, out, faults_);
  launched();
}

void CudaModel::check_ids(const Input& ids, int64_t count) {
  check_ids_kernel<<<blocks_for(count / kThreads), kThreads, 0, stream_.get()>>>(ids.data, ids.itemsize, count,
                                                                                 spec_.vocab, faults());
  launched();
}

// rows: float [count, D] in device memory.
void CudaModel::check_rows(const Input& rows, int64_t count, unsigned long long* fault) {
  const int64_t values = count * spec_.dim;
  check_rows_kernel<<<blocks_for(values / kThreads), kThreads, 0, stream_.get()>>>(rows.host<float>(), values, fault);
  launched();
}

// Rows [S, D] in place of embedded ids.
void CudaModel::stage_rows(const Input& x) {
  const size_t bytes = sizeof(float) * rows_ * spec_.dim;
  if (x.device) {
    take(dx_, x, 0, bytes);
  } else {
    char* room = pinned(bytes);
    std::memcpy(room, x.data, bytes);
    copy_in(dx_, room, bytes);
  }
  gather_rows(dx_, nullptr);
}

// From an array of the caller's, wherever it is, to memory of the model.
void CudaModel::take(void* to, const Input& from, size_t offset, size_t bytes) {
  const char* source = static_cast<const char*>(from.data) + offset;
  if (!from.device) return copy_in(to, source, bytes);
  NG_CUDA(cudaMemcpyAsync(to, source, bytes, cudaMemcpyDeviceToDevice, stream_.get()));
}

// The other way round.
void CudaModel::give(const Output& to, size_t offset, const void* from, size_t bytes) {
  char* target = to.as<char>() + offset;
  if (!to.device) return copy_out(target, from, bytes);
  NG_CUDA(cudaMemcpyAsync(target, from, bytes, cudaMemcpyDeviceToDevice, stream_.get()));
}

void CudaModel::remember_state() {
  remember_state_kernel<<<1, 1, 0, stream_.get()>>>(verdict_, faults());
  launched();
}

void CudaModel::settle() {
  if (!unheard_) return wait();
  Faults* found = reinterpret_cast<Faults*>(pinned(sizeof(Faults)));
  copy_out(found, faults_, sizeof(Faults));
  NG_CUDA(cudaMemsetAsync(faults_, 0, sizeof(Faults), stream_.get()));
  wait();
  unheard_ = false;
  const char* rest = "; weights, moments and neuron state are as they were before it";
  if (found->bad_id) {
    throw std::out_of_range("ids of encode_into in device memory, element " + std::to_string(found->bad_id - 1) +
                            ": expected token ids in 0.." + std::to_string(spec_.vocab - 1) + rest);
  }
  if (found->bad_x) throw std::invalid_argument("x of step" + element(found->bad_x, spec_.dim) + rest);
  if (found->bad_broca) {
    throw std::invalid_argument("broca of sample_into" + element(found->bad_broca, spec_.dim) + rest);
  }
  if (found->state_not_finite) {
    throw std::overflow_error("neuron state of step: expected finite values, got NaN or infinity" + std::string(rest));
  }
}

}  // namespace neurogen::cuda
