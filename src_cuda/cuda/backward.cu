// Batched e-prop (Bellec et al. 2020, with exact spatial credit): the gradient of the loss with delayed spikes and the
// soft reset held constant. With the learning signal L = dE/ds of a region, walk t from T-1 down,
//   lw = rho lw' - (1-alpha) lv',   ls = L + (1-rho) b lw,
//   lv = alpha lv' + (1-rho) a lw + ls ds/du + rate term,   delta = sqrt(1-alpha^2) lv = dE/dI
// Levels go from the highest down: products with transposed blocks bring L, a scan over time turns it into the errors
// that weights (weights.cu) and lower levels are multiplied with.
#include "batched_product.cuh"
#include "dropout.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kScanThreads = 64;  // two neurons a thread
constexpr int kScanAhead = 8;     // tokens whose inputs are loaded before they are needed

// dE/d broca -> dE/d o in place, broca = f o with f = 1/rms; a warp a row.
__global__ void unnormalize_kernel(const float* broca, const float* inverse_rms, int64_t rows, int64_t dim,
                                   float* error) {
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  float overlap = 0;
  for (int64_t j = row * dim + lane; j < (row + 1) * dim; j += 32) overlap += error[j] * broca[j];
  const float mean = warp_sum(overlap) / dim, factor = inverse_rms[row];
  for (int64_t j = row * dim + lane; j < (row + 1) * dim; j += 32) error[j] = factor * (error[j] - broca[j] * mean);
}

// dE/d o -> dE/d(summed readout input): the integrator's adjoint; a thread follows one channel of one stream.
template <class Real>
__global__ void readout_adjoint_kernel(const float* error, const float* kappa, const uint8_t* resets, int streams,
                                       int tokens, int64_t dim, Real* out) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, step = streams * dim;
  if (at >= step) return;
  const float keep = kappa[at % dim];
  float carry = 0;
  for (int token = tokens - 1; token >= 0; --token) {
    const float adjoint = error[token * step + at] + carry;
    out[token * step + at] = from_float<Real>((1.0f - keep) * adjoint);
    carry = resets && resets[int64_t{token} * streams + at / dim] ? 0.0f : keep * adjoint;
  }
}

// L of a region, where delta will be; what dropout silenced gets no credit.
template <class Real>
struct StoreSignal {
  const RegionView* regions;
  const TileName* tiles;
  Dropout dropout;
  int streams;
  __device__ void operator()(int tile, int lane, int64_t row, float4 sums) const {
    const RegionView& region = regions[tiles[tile].region];
    const int neuron = tiles[tile].offset + lane;
    if (dropout.probability > 0) {
      const float4 mask = dropout_mask(dropout, tiles[tile].region, neuron, static_cast<int>(row / streams),
                                       static_cast<int>(row % streams));
      sums = {sums.x * mask.x, sums.y * mask.y, sums.z * mask.z, sums.w * mask.w};
    }
    store4(static_cast<Real*>(region.delta) + row * region.n + neuron, sums);
  }
};

struct Scan {
  const RegionView* regions;
  const TileName* tiles;
  const uint8_t* resets;  // null = none
  int first_tile, tile_count, streams, tokens;
  float surrogate_k, max_spike, rate_weight, rate_target;
  bool graded;
};

// Two neighbouring neurons of one stream, from the last token to the first.
template <class Real>
__global__ void __launch_bounds__(kScanThreads) scan_adjoint_kernel(Scan p) {
  const int tile = blockIdx.x * (kScanThreads / 16) + threadIdx.x / 16;
  if (tile >= p.tile_count) return;
  const TileName name = p.tiles[p.first_tile + tile];
  const RegionView& region = p.regions[name.region];
  const int neuron = name.offset + threadIdx.x % 16 * 2, stream = blockIdx.y;
  const int64_t step = int64_t{p.streams} * region.n, first = int64_t{stream} * region.n + neuron;
  const Real* u_at = static_cast<const Real*>(region.u) + first;
  Real* delta_at = static_cast<Real*>(region.delta) + first;
  Real* d_at = static_cast<Real*>(region.d) + first;
  Real* g_at = region.gated ? static_cast<Real*>(region.g) + first : nullptr;

  const double rows = static_cast<double>(p.streams) * p.tokens;
  float alpha[2], rho[2], a[2], b[2], rate[2], lv[2] = {}, lw[2] = {}, dbias[2] = {};
  for (int j = 0; j < 2; ++j) {
    alpha[j] = region.alpha[neuron + j], rho[j] = region.rho[neuron + j];
    a[j] = region.a[neuron + j], b[j] = region.b[neuron + j];
    const double own = region.spike_count[neuron + j] / rows;
    rate[j] = static_cast<float>(p.rate_weight * 2.0 * (own - p.rate_target) / (region.n * rows));
  }
  for (int last = p.tokens - 1; last >= 0; last -= kScanAhead) {
    float2 u[kScanAhead], signal[kScanAhead], drive[kScanAhead], gate[kScanAhead];
    bool cut[kScanAhead];
#pragma unroll
    for (int i = 0; i < kScanAhead; ++i) {
      const int token = last - i;
      if (token < 0) break;
      u[i] = load2(u_at + token * step);
      signal[i] = load2(delta_at + token * step);
      if (g_at) drive[i] = load2(d_at + token * step), gate[i] = load2(g_at + token * step);
      cut[i] = p.resets && p.resets[int64_t{token} * p.streams + stream];
    }
#pragma unroll
    for (int i = 0; i < kScanAhead; ++i) {
      const int token = last - i;
      if (token < 0) break;
      const float us[2] = {u[i].x, u[i].y}, signals[2] = {signal[i].x, signal[i].y};
      float delta[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float distance = 1.0f + p.surrogate_k * fabsf(us[j]), psi = 1.0f / (distance * distance);
        float slope = psi;
        if (p.graded) {
          slope = psi * fminf(1.0f + fmaxf(us[j], 0.0f), p.max_spike);
          if (us[j] > 0 && 1.0f + us[j] < p.max_spike) slope += 1.0f;
        }
        lw[j] = rho[j] * lw[j] - (1.0f - alpha[j]) * lv[j];
        const float ls = signals[j] + (1.0f - rho[j]) * b[j] * lw[j];
        lv[j] = alpha[j] * lv[j] + (1.0f - rho[j]) * a[j] * lw[j] + ls * slope + rate[j] * psi;
        delta[j] = sqrtf(1.0f - alpha[j] * alpha[j]) * lv[j];
      }
      store2(delta_at + token * step, {delta[0], delta[1]});
      if (g_at) {
        const float gates[2] = {gate[i].x, gate[i].y}, drives[2] = {drive[i].x, drive[i].y};
        float dd[2], dg[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          dd[j] = delta[j] * gates[j];
          dg[j] = dd[j] * drives[j] * (1.0f - 0.5f * gates[j]);
          dbias[j] += dd[j];
        }
        store2(g_at + token * step, {dd[0], dd[1]});
        store2(d_at + token * step, {dg[0], dg[1]});
      } else {
        dbias[0] += delta[0];
        dbias[1] += delta[1];
      }
      if (cut[i]) lv[0] = lv[1] = lw[0] = lw[1] = 0.0f;  // nothing flows to the token before a reset
    }
  }
  store2(region.dbias_part + first, {dbias[0], dbias[1]});
}

// dbias[j] (+)= sum over streams.
__global__ void sum_bias_kernel(const RegionView* regions, const TileName* tiles, int tile_count, int streams,
                                bool accumulate) {
  const int tile = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (tile >= tile_count) return;
  const RegionView& region = regions[tiles[tile].region];
  const int neuron = tiles[tile].offset + threadIdx.x % 32;
  float sum = accumulate ? region.dbias[neuron] : 0.0f;
  for (int stream = 0; stream < streams; ++stream) sum += region.dbias_part[int64_t{stream} * region.n + neuron];
  region.dbias[neuron] = sum;
}

}  // namespace

void CudaModel::readout_errors() {
  unnormalize_kernel<<<static_cast<int>((rows_ * 32 + 255) / 256), 256, 0, stream_.get()>>>(
      broca_, inverse_rms_, rows_, int64_t{spec_.dim}, d_broca_);
  launched();
  const int64_t channels = int64_t{call_streams_} * spec_.dim;
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    readout_adjoint_kernel<<<static_cast<int>((channels + 127) / 128), 128, 0, stream_.get()>>>(
        d_broca_, kappa_, has_resets_ ? resets_ : nullptr, call_streams_, call_tokens_, int64_t{spec_.dim},
        static_cast<Real*>(readout_error_));
  });
  launched();
}

void CudaModel::learn_level(int level) {
  const int first = level_begin_[level], count = level_begin_[level + 1] - first;
  const Scan scan{region_views_,
                  tile_names_,
                  has_resets_ ? resets_ : nullptr,
                  first,
                  count,
                  call_streams_,
                  call_tokens_,
                  spec_.surrogate_k,
                  spec_.max_spike,
                  spec_.rate_weight,
                  spec_.rate_target,
                  spec_.graded};
  const dim3 grid((count + kScanThreads / 16 - 1) / (kScanThreads / 16), call_streams_);
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    multiply_blocks<Real>(stream_.get(), pull_, transposed_blocks_, rows_, first, count,
                          StoreSignal<Real>{region_views_, tile_names_, dropout(), call_streams_});
    launched();
    scan_adjoint_kernel<Real><<<grid, kScanThreads, 0, stream_.get()>>>(scan);
    launched();
  });
}

void CudaModel::learn(bool accumulate) {
  readout_errors();
  for (int level = levels_ - 1; level >= 0; --level) learn_level(level);
  sum_bias_kernel<<<(tiles_ + 3) / 4, 128, 0, stream_.get()>>>(region_views_, tile_names_, tiles_, call_streams_,
                                                               accumulate);
  launched();
  weight_gradients(accumulate);
  embedding_gradient();
}

}  // namespace neurogen::cuda
