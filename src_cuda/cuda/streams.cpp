// Between the model's stream and those of its callers: who waits for whom, without the host.
#include "context.h"
#include "model.h"

namespace neurogen::cuda {

namespace {
cudaStream_t as_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }
}  // namespace

void CudaModel::wait_for(uintptr_t stream) {
  if (as_stream(stream) == stream_.get()) return;
  const OnDevice scope(spec_.device);
  NG_CUDA(cudaEventRecord(arrived_.get(), as_stream(stream)));
  NG_CUDA(cudaStreamWaitEvent(stream_.get(), arrived_.get(), 0));
}

void CudaModel::hand_over(uintptr_t stream) {
  if (as_stream(stream) == stream_.get()) return;
  const OnDevice scope(spec_.device);
  NG_CUDA(cudaEventRecord(given_.get(), stream_.get()));
  NG_CUDA(cudaStreamWaitEvent(as_stream(stream), given_.get(), 0));
}

uint64_t CudaModel::mark() {
  const OnDevice scope(spec_.device);
  if (spare_.empty()) spare_.push_back(new_event(false));
  NG_CUDA(cudaEventRecord(spare_.back().get(), stream_.get()));
  marks_.push_back(std::move(spare_.back()));
  spare_.pop_back();
  return ++marked_;
}

uint64_t CudaModel::passed() {
  const OnDevice scope(spec_.device);
  while (!marks_.empty()) {
    const cudaError_t code = cudaEventQuery(marks_.front().get());
    if (code == cudaErrorNotReady) {
      cudaGetLastError();  // no error of anybody's next call
      break;
    }
    NG_CUDA(code);
    spare_.push_back(std::move(marks_.front()));
    marks_.pop_front();
    ++passed_;
  }
  return passed_;
}

Place CudaModel::place(const void* memory) const { return find(memory, spec_.device); }

}  // namespace neurogen::cuda
