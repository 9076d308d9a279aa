// Neuron state of the CUDA backend, with room for the state that a call leaves behind: a call reads v, w and spikes,
// writes next_v and next_w, and commit() copies them over when all went well.
#pragma once

#include <vector>

#include "arena.h"
#include "device.h"
#include "neurogen/model.h"

namespace neurogen::cuda {

// Device pointers of one region's state.
struct StateView {
  float *v, *w, *next_v, *next_w;  // [S, n]
  float* spikes;                   // [K, S, n], newest first
  void* recent;                    // the same in Real, [n/32][K, S][32], renewed at the beginning of a call
};

class CudaState final : public State {
 public:
  // spec must outlive the state. history[r] = K of region r.
  CudaState(const ModelSpec& spec, const std::vector<int>& history, int streams);

  // Memory: a part of the model's arena (lay_out while it is measured and again once it is bound, then upload), or of
  // the state's own.
  void lay_out(Arena& arena);
  void upload();
  void own_memory();

  int streams() const override { return streams_; }
  std::vector<Tensor> arrays() override;
  void clear(const uint8_t* which) override;

  const StateView* views() const { return device_views_; }  // [regions], in device memory
  float* o() const { return o_; }                           // [S, D]

 private:
  const ModelSpec* spec_;
  std::vector<int> history_;
  int streams_, device_;
  DeviceMemory memory_;
  std::vector<StateView> views_;
  StateView* device_views_ = nullptr;
  float* o_ = nullptr;
};

}  // namespace neurogen::cuda
