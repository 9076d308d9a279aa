#include "state.h"

#include <algorithm>

namespace neurogen::cuda {

CudaState::CudaState(const ModelSpec& spec, const std::vector<int>& history, int streams)
    : spec_(&spec), history_(history), streams_(streams), device_(spec.device) {}

void CudaState::lay_out(Arena& arena) {
  views_.clear();
  const size_t regions = spec_->regions.size();
  for (size_t r = 0; r < regions; ++r) {
    const size_t cells = static_cast<size_t>(streams_) * spec_->regions[r].neurons;
    const auto take = [&](size_t count) { return arena.take<float>("neuron state", count); };
    StateView view;
    view.v = take(cells);
    view.w = take(cells);
    view.next_v = take(cells);
    view.next_w = take(cells);
    view.spikes = take(cells * history_[r]);
    view.recent = take(cells * history_[r]);
    views_.push_back(view);
  }
  o_ = arena.take<float>("neuron state", static_cast<size_t>(streams_) * spec_->dim);
  device_views_ = arena.take<StateView>("neuron state", regions);
}

void CudaState::own_memory() {
  Arena arena;
  lay_out(arena);
  memory_ = device_memory(arena.bytes());
  arena.bind(memory_.get());
  lay_out(arena);
  upload();
}

void CudaState::upload() {
  NG_CUDA(cudaMemcpy(device_views_, views_.data(), views_.size() * sizeof(StateView), cudaMemcpyHostToDevice));
}

std::vector<Tensor> CudaState::arrays() {
  std::vector<Tensor> out;
  for (size_t r = 0; r < views_.size(); ++r) {
    const std::string prefix = "region." + spec_->regions[r].name;
    const int64_t n = spec_->regions[r].neurons;
    out.push_back({prefix + ".v", DType::f32, {streams_, n}, views_[r].v});
    out.push_back({prefix + ".w", DType::f32, {streams_, n}, views_[r].w});
    out.push_back({prefix + ".spikes", DType::f32, {history_[r], streams_, n}, views_[r].spikes});
  }
  out.push_back({"broca.o", DType::f32, {streams_, spec_->dim}, o_});
  return out;
}

// The default stream may write here once the model's stream has done what calls that do not wait have left there.
void CudaState::clear(const uint8_t* which) {
  const OnDevice scope(device_);
  NG_CUDA(cudaDeviceSynchronize());
  for (Tensor& array : arrays()) {
    // [.., S, width]: rows repeat every S.
    const int64_t width = array.shape.back(), rows = array.size() / std::max<int64_t>(width, 1);
    for (int64_t row = 0; row < rows; ++row) {
      if (which && !which[row % streams_]) continue;
      NG_CUDA(cudaMemset(static_cast<float*>(array.data) + row * width, 0, width * sizeof(float)));
    }
  }
  NG_CUDA(cudaDeviceSynchronize());
}

}  // namespace neurogen::cuda
