// Dropout by counter (see common/philox.h): any kernel draws the mask of any neuron again, none is stored.
#pragma once

#include <cstdint>

#include "philox.h"

namespace neurogen::cuda {

struct Dropout {
  float probability, kept;  // kept = 1 / (1 - probability); probability 0 = off
  uint32_t key0, key1;
};

// Multipliers of neurons `neuron` .. + 3 (a multiple of four).
__device__ inline float4 dropout_mask(const Dropout& p, int region, int neuron, int token, int stream) {
  const Philox draw = philox(static_cast<uint32_t>(neuron / 4), static_cast<uint32_t>(token),
                             static_cast<uint32_t>(stream), static_cast<uint32_t>(region), p.key0, p.key1);
  const auto keep = [&](uint32_t word) { return philox_uniform(word) >= p.probability ? p.kept : 0.0f; };
  return {keep(draw.word[0]), keep(draw.word[1]), keep(draw.word[2]), keep(draw.word[3])};
}

}  // namespace neurogen::cuda
