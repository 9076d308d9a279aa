// Neuron state of the CPU backend. Spikes are [K, S, n], newest first, so that "the spike d tokens before the
// first token of a call" is one contiguous [S, n] slice.
#pragma once

#include <vector>

#include "arena.h"
#include "neurogen/model.h"

namespace neurogen::cpu {

class CpuState final : public State {
 public:
  // history[r] = K of region r.
  CpuState(const ModelSpec& spec, const std::vector<int>& history, int streams);

  int streams() const override { return streams_; }
  std::vector<Tensor> arrays() override { return arrays_; }
  void clear(const uint8_t* which) override;

  float* v(int region) { return v_[region]; }
  float* w(int region) { return w_[region]; }
  float* spikes(int region) { return spikes_[region]; }
  float* o() { return o_; }

 private:
  void lay_out(const ModelSpec& spec, const std::vector<int>& history);

  int streams_;
  Arena arena_;
  std::vector<float*> v_, w_, spikes_;
  float* o_ = nullptr;
  std::vector<Tensor> arrays_;
};

}  // namespace neurogen::cpu
