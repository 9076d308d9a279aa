// The adjoint of a cell, one neuron of one stream at one token: what every walk back through time computes
// (backward.cu has the equations, credit.cuh the walk that brings its own learning signal).
#pragma once

#include "model.h"
#include "numbers.cuh"

namespace neurogen::cuda {

// What a walk over the tiles of a level is told.
struct Scan {
  const RegionView* regions;
  const TileName* tiles;
  const uint8_t* resets;  // null = none
  int first_tile, streams, tokens;
  float surrogate_k, most;  // most: the largest spike; binary ones are graded ones of at most 1
  float rate_weight, rate_target;
};

// The rate term's share of dE/du, over psi.
__device__ inline float rate_error(const Scan& p, const RegionView& region, int neuron) {
  const double rows = static_cast<double>(p.streams) * p.tokens, own = region.spike_count[neuron] / rows;
  return static_cast<float>(p.rate_weight * 2.0 * (own - p.rate_target) / (region.n * rows));
}

// With lw as it is after its own step, lv = alpha lv + a lw + (L + b lw) slope + rate psi is
// lv = (alpha lv + base) + pull lw, where base and pull depend on no other token.
struct OwnPart {
  float base, pull;
};

__device__ inline OwnPart own_part(const Scan& p, float u, float signal, float rate, float a, float b) {
  const float distance = fmaf(p.surrogate_k, fabsf(u), 1.0f), psi = reciprocal(distance * distance);
  const float spike = 1.0f + u;
  float slope = psi * fminf(fmaxf(spike, 1.0f), p.most);
  if (u > 0 && spike < p.most) slope += 1.0f;
  return {fmaf(signal, slope, rate * psi), fmaf(b, slope, a)};
}

// lv, lw of the token after -> of this token; leak = alpha - 1.
__device__ inline void step_back(const OwnPart& own, float alpha, float leak, float rho, float& lv, float& lw) {
  lw = fmaf(rho, lw, leak * lv);
  lv = fmaf(own.pull, lw, fmaf(alpha, lv, own.base));
}

// dE/dg of a gate G = 2 sigmoid(g); drive_error = dE/dd.
__device__ inline float gate_error(float drive_error, float drive, float gate) {
  return drive_error * drive * fmaf(-0.5f, gate, 1.0f);
}

}  // namespace neurogen::cuda
