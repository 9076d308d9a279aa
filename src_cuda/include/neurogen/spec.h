// What a model is made of: regions, projections, sizes. Plain data, checked by the Python configuration
// before it gets here (neurogen_cy/config.py) and read by every backend.
//
// Shape legend, used in every header and kernel of this library:
//   B  streams of the model            T  tokens of one call          M = T*B rows, row = t*B + b (time-major)
//   V  vocabulary                      D  width of embedding and Broca output (multiple of 32)
//   n  neurons of one region (multiple of 32)                          S  streams of a call that brings its own state
//   K  largest delay of a region's outgoing delayed projections        k  blocks in one row of blocks
// Rightmost index fastest. One block = 32 x 32 synapses, stored [dst in block, src in block].
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace neurogen {

constexpr int kBlock = 32;
constexpr int kBlockArea = kBlock * kBlock;
constexpr int kFromEmbedding = -1;  // ProjectionSpec::src of the projections that start at the embedding

struct RegionSpec {
  std::string name;
  int neurons = 0;
  int level = 0;
};

struct ProjectionSpec {
  std::string key;            // "proj.<src>.<dst>.<kind>.<delay>"
  int src = 0;                // region index or kFromEmbedding
  int dst = 0;                // region index, or regions.size() for broca_out
  int delay = 0;              // tokens
  bool gate = false;          // apical (multiplicative) instead of basal input
  int blocks_per_row = 0;     // k
  std::vector<int32_t> cols;  // [rows of blocks, k] block columns, ascending inside a row
};

struct ModelSpec {
  int vocab = 0;
  int dim = 0;
  std::vector<RegionSpec> regions;
  std::vector<ProjectionSpec> projections;
  bool graded = true;
  bool tied = false;
  float surrogate_k = 1.0f;
  float max_spike = INFINITY;  // largest graded spike
  float rate_target = 0.1f;
  float rate_weight = 0.5f;
  float dropout = 0.0f;
  int streams = 1;     // B
  int max_tokens = 1;  // largest T of one call
  int threads = 1;     // CPU threads of one call
  uint64_t seed = 0;   // keys dropout
  int device = 0;      // CUDA device
  bool bf16 = false;   // CUDA: products of bf16 values with fp32 accumulation, 16-bit saved activations
  bool fp8 = false;    // CUDA, with bf16: the decoder's products take 8-bit operands where a call learns
  bool spin = false;   // CUDA: wait for the device by spinning instead of sleeping

  int readout() const { return static_cast<int>(regions.size()); }
  int width(int node) const {  // neurons of a region, D for the embedding and broca_out
    return node < 0 || node == readout() ? dim : regions[node].neurons;
  }
};

}  // namespace neurogen
