// AdamW with a global norm clip and a non-finite guard, decided on the device. All trainables but an untied embedding
// lie in one stretch of memory, cut into units of 1024 values: a weight block is a unit. The untied embedding is lazy:
// only rows with a gradient are touched, moments of the others wait, bias correction goes by the global step.
//   m <- beta1 m + (1-beta1) g,  v <- beta2 v + (1-beta2) g^2,
//   value <- (1 - lr decay) value - lr/(1-beta1^t) m / (sqrt(v / (1-beta2^t)) + eps)
// The copies of weights that products read are renewed in the same pass.
#include <algorithm>
#include <cmath>

#include "block_product.cuh"
#include "model.h"

namespace neurogen::cuda {
namespace {

constexpr int kThreads = 256;  // four values each: a unit
static_assert(kThreads * 4 == kUnit && kUnit == kBlockArea);

struct Update {
  float *weights, *gradients, *moment1, *moment2;
  int64_t units, blocks, decoder_begin, decoder_end, decay_units;  // in units
  void *forward_blocks, *transposed_blocks, *decoder_real;         // Real copies
  bool copy_forward;                                               // false: products read the weights themselves
  double clip;
  float beta1, beta2, step_size, second_scale, eps, decay;
  const Verdict* verdict;
};

__device__ float square_sum(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

// A row may have been written by the user: look at all of them.
__global__ void mark_rows_kernel(const float* gradient, uint8_t* touched, int64_t vocab, int64_t dim) {
  const int64_t id = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (id >= vocab) return;
  bool any = false;
  for (int64_t j = threadIdx.x % 32; j < dim; j += 32) any = any || gradient[id * dim + j] != 0.0f;
  if (__any_sync(0xffffffffu, any) && threadIdx.x % 32 == 0) touched[id] = 1;
}

// part[block] = its share of the squared norm; units and rows go round the blocks in turn.
__global__ void __launch_bounds__(kThreads)
    square_gradients_kernel(const float* gradients, int64_t units, LazyRows rows, double* part) {
  __shared__ double room[32];
  double total = 0;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    total += square_sum(load4(gradients + unit * kUnit + threadIdx.x * 4));
  }
  for (int64_t id = blockIdx.x; rows.touched && id < rows.vocab; id += gridDim.x) {
    if (!rows.touched[id]) continue;
    for (int64_t j = threadIdx.x * 4; j < rows.dim; j += kUnit) {
      total += square_sum(load4(rows.gradients + id * rows.dim + j));
    }
  }
  total = block_sum(total, room);
  if (threadIdx.x == 0) part[blockIdx.x] = total;
}

__global__ void decide_kernel(const double* part, int count, Verdict* verdict) {
  __shared__ double room[32];
  double total = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) total += part[i];
  total = block_sum(total, room);
  if (threadIdx.x > 0) return;
  verdict->squares = total;
  if (!isfinite(total)) verdict->ok = 0;
}

__device__ float4 adam(const Update& p, float* weights, float* moment1, float* moment2, float4 g, float clip,
                       bool decays) {
  const float4 ms = load4(moment1), vs = load4(moment2), xs = load4(weights);
  float m[4] = {ms.x, ms.y, ms.z, ms.w}, v[4] = {vs.x, vs.y, vs.z, vs.w}, x[4] = {xs.x, xs.y, xs.z, xs.w};
  const float gs[4] = {g.x * clip, g.y * clip, g.z * clip, g.w * clip};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    m[i] = p.beta1 * m[i] + (1.0f - p.beta1) * gs[i];
    v[i] = p.beta2 * v[i] + (1.0f - p.beta2) * gs[i] * gs[i];
    x[i] = (decays ? p.decay : 1.0f) * x[i] - p.step_size * m[i] / (sqrtf(v[i] * p.second_scale) + p.eps);
  }
  store4(moment1, {m[0], m[1], m[2], m[3]});
  store4(moment2, {v[0], v[1], v[2], v[3]});
  const float4 out = {x[0], x[1], x[2], x[3]};
  store4(weights, out);
  return out;
}

__device__ float clip_scale(const Update& p) {
  const double norm = sqrt(p.verdict->squares);
  return p.clip > 0 && norm > p.clip ? static_cast<float>(p.clip / norm) : 1.0f;
}

// The copies of one unit; value: the thread's four. tile: shared memory for a transposition.
template <class Real>
__device__ void renew_copies(const Update& p, int64_t unit, float4 value, float (*tile)[kBlock + 1]) {
  const int row = threadIdx.x / 8, col = threadIdx.x % 8 * 4;
  if (unit < p.blocks) {
    if (p.copy_forward) {
      Real* forward = static_cast<Real*>(p.forward_blocks) + unit * kBlockArea;
      store4(forward + stored_row<Real>(row) * kBlock + col, value);
    }
    __syncthreads();
    tile[row][col] = value.x, tile[row][col + 1] = value.y, tile[row][col + 2] = value.z, tile[row][col + 3] = value.w;
    __syncthreads();
    Real* transposed = static_cast<Real*>(p.transposed_blocks) + unit * kBlockArea;
    store4(transposed + stored_row<Real>(row) * kBlock + col,
           {tile[col][row], tile[col + 1][row], tile[col + 2][row], tile[col + 3][row]});
  } else if (p.copy_forward && unit >= p.decoder_begin && unit < p.decoder_end) {
    store4(static_cast<Real*>(p.decoder_real) + (unit - p.decoder_begin) * kUnit + threadIdx.x * 4, value);
  }
}

template <class Real>
__global__ void __launch_bounds__(kThreads) update_kernel(Update p, LazyRows rows) {
  __shared__ float tile[kBlock][kBlock + 1];
  if (!p.verdict->ok) return;
  const float clip = clip_scale(p);
  for (int64_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const int64_t at = unit * kUnit + threadIdx.x * 4;
    const float4 value =
        adam(p, p.weights + at, p.moment1 + at, p.moment2 + at, load4(p.gradients + at), clip, unit < p.decay_units);
    renew_copies<Real>(p, unit, value, tile);
  }
  for (int64_t id = blockIdx.x; rows.touched && id < rows.vocab; id += gridDim.x) {
    if (!rows.touched[id]) continue;
    for (int64_t j = threadIdx.x * 4; j < rows.dim; j += kUnit) {
      const int64_t at = id * rows.dim + j;
      adam(p, rows.weights + at, rows.moment1 + at, rows.moment2 + at, load4(rows.gradients + at), clip, false);
    }
  }
}

// What the neuron update needs of its constants. blockIdx.y: region.
__global__ void derive_constants_kernel(const RegionView* regions) {
  const RegionView& region = regions[blockIdx.y];
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= region.n) return;
  const float alpha = region.alpha[j], rho = region.rho[j];
  float* to = region.constants + j / kBlock * 5 * kBlock + j % kBlock;
  to[0] = alpha;
  to[kBlock] = sqrtf(1.0f - alpha * alpha);
  to[2 * kBlock] = rho;
  to[3 * kBlock] = (1.0f - rho) * region.a[j];
  to[4 * kBlock] = (1.0f - rho) * region.b[j];
}

template <class Real>
__global__ void __launch_bounds__(kThreads) copy_weights_kernel(Update p) {
  __shared__ float tile[kBlock][kBlock + 1];
  for (int64_t unit = blockIdx.x; unit < p.decoder_end; unit += gridDim.x) {
    renew_copies<Real>(p, unit, load4(p.weights + unit * kUnit + threadIdx.x * 4), tile);
  }
}

}  // namespace

namespace {

int grid_for(int64_t units) { return static_cast<int>(std::clamp<int64_t>(units, 1, kNormBlocks)); }

}  // namespace

// After parameters were written from outside.
void CudaModel::refresh_derived() {
  if (!derived_stale_) return;
  Update job{};
  job.weights = weights_;
  job.blocks = blocks_;
  job.decoder_begin = decoder_unit_;
  job.decoder_end = decoder_unit_ + decoder_units_;
  job.forward_blocks = forward_blocks_;
  job.transposed_blocks = transposed_blocks_;
  job.decoder_real = decoder_real_;
  job.copy_forward = spec_.bf16;
  with_real(spec_.bf16, [&](auto real) {
    copy_weights_kernel<decltype(real)><<<grid_for(job.decoder_end), kThreads, 0, stream_.get()>>>(job);
  });
  launched();
  int widest = 0;
  for (const RegionView& region : regions_) widest = std::max(widest, region.n);
  const dim3 grid((widest + kThreads - 1) / kThreads, static_cast<unsigned>(regions_.size()));
  derive_constants_kernel<<<grid, kThreads, 0, stream_.get()>>>(region_views_);
  launched();
  derived_stale_ = false;
}

LazyRows CudaModel::lazy_rows() const {
  const auto lazy = [&](float* base) { return base + (embedding_ - weights_); };
  return {embedding_,  lazy(gradients_), lazy(moment1_), lazy(moment2_), spec_.tied ? nullptr : row_touched_,
          spec_.vocab, spec_.dim};
}

void CudaModel::decide_update() {
  refresh_derived();
  const LazyRows rows = lazy_rows();
  if (rows.touched && scan_embedding_rows_) {
    mark_rows_kernel<<<static_cast<int>((int64_t{spec_.vocab} * 32 + 255) / 256), 256, 0, stream_.get()>>>(
        rows.gradients, row_touched_, spec_.vocab, spec_.dim);
    launched();
  }
  square_gradients_kernel<<<kNormBlocks, kThreads, 0, stream_.get()>>>(gradients_, units_, rows, norm_part_);
  launched();
  decide_kernel<<<1, 1024, 0, stream_.get()>>>(norm_part_, kNormBlocks, verdict_);
  launched();
}

void CudaModel::launch_update(const AdamW& adam) {
  const LazyRows rows = lazy_rows();
  const double correction1 = 1.0 - std::pow(adam.beta1, static_cast<double>(adam.step));
  const double correction2 = 1.0 - std::pow(adam.beta2, static_cast<double>(adam.step));
  const Update job{weights_,
                   gradients_,
                   moment1_,
                   moment2_,
                   units_,
                   blocks_,
                   decoder_unit_,
                   decoder_unit_ + decoder_units_,
                   decay_units_,
                   forward_blocks_,
                   transposed_blocks_,
                   decoder_real_,
                   spec_.bf16,
                   adam.clip,
                   static_cast<float>(adam.beta1),
                   static_cast<float>(adam.beta2),
                   static_cast<float>(adam.lr / correction1),
                   static_cast<float>(1.0 / correction2),
                   static_cast<float>(adam.eps),
                   static_cast<float>(1.0 - adam.lr * adam.weight_decay),
                   verdict_};
  with_real(spec_.bf16,
            [&](auto real) { update_kernel<decltype(real)><<<kNormBlocks, kThreads, 0, stream_.get()>>>(job, rows); });
  launched();
}

}  // namespace neurogen::cuda
