#include "state.h"

#include <algorithm>

namespace neurogen::cpu {

CpuState::CpuState(const ModelSpec& spec, const std::vector<int>& history, int streams) : streams_(streams) {
  lay_out(spec, history);
  arena_.allocate();
  lay_out(spec, history);
  for (size_t r = 0; r < spec.regions.size(); ++r) {
    const std::string prefix = "region." + spec.regions[r].name;
    const int64_t n = spec.regions[r].neurons;
    arrays_.push_back({prefix + ".v", DType::f32, {streams, n}, v_[r]});
    arrays_.push_back({prefix + ".w", DType::f32, {streams, n}, w_[r]});
    arrays_.push_back({prefix + ".spikes", DType::f32, {history[r], streams, n}, spikes_[r]});
  }
  arrays_.push_back({"broca.o", DType::f32, {streams, spec.dim}, o_});
}

void CpuState::lay_out(const ModelSpec& spec, const std::vector<int>& history) {
  v_.clear(), w_.clear(), spikes_.clear();
  for (size_t r = 0; r < spec.regions.size(); ++r) {
    const size_t cells = static_cast<size_t>(streams_) * spec.regions[r].neurons;
    v_.push_back(arena_.take<float>("neuron state", cells));
    w_.push_back(arena_.take<float>("neuron state", cells));
    spikes_.push_back(arena_.take<float>("neuron state", cells * history[r]));
  }
  o_ = arena_.take<float>("neuron state", static_cast<size_t>(streams_) * spec.dim);
}

void CpuState::clear(const uint8_t* which) {
  for (Tensor& array : arrays_) {
    // [.., S, width]: rows repeat every S.
    const int64_t width = array.shape.back(), rows = array.size() / std::max<int64_t>(width, 1);
    for (int64_t row = 0; row < rows; ++row) {
      if (which && !which[row % streams_]) continue;
      std::fill_n(static_cast<float*>(array.data) + row * width, width, 0.0f);
    }
  }
}

}  // namespace neurogen::cpu
