// Rows of the embedding become the brain's input.
#pragma once

#include "neurogen/spec.h"
#include "numbers.cuh"

namespace neurogen::cuda {

// Row `row` of the panels = dim values, of which thread 0 .. threads - 1 takes its share: `AtOnce` fours on their way.
// The sum with 0 leaves one kind of NaN, which is not the one that tells the brain launch to wait.
template <int AtOnce, class Real>
__device__ inline void gather_row(const float* from, int64_t dim, int64_t row, int64_t stride, int thread, int threads,
                                  Real* out) {
  const int64_t step = 4 * threads;
  for (int64_t first = 4 * thread; first < dim; first += AtOnce * step) {
    float4 x[AtOnce];
#pragma unroll
    for (int i = 0; i < AtOnce; ++i) x[i] = load4(from + min(first + i * step, dim - 4));
#pragma unroll
    for (int i = 0; i < AtOnce; ++i) {
      const int64_t j = first + i * step;
      if (j >= dim) break;
      store4(out + j / kBlock * stride + row * kBlock + j % kBlock,
             {x[i].x + 0.0f, x[i].y + 0.0f, x[i].z + 0.0f, x[i].w + 0.0f});
    }
  }
}

}  // namespace neurogen::cuda
