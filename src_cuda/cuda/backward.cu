// Batched e-prop (Bellec et al. 2020, with exact spatial credit): the gradient of the loss with delayed spikes and the
// soft reset held constant. With the learning signal L = dE/ds of a region, walk t from T-1 down,
//   lw = rho lw' - (1-alpha) lv',   ls = L + (1-rho) b lw,
//   lv = alpha lv' + (1-rho) a lw + ls ds/du + rate term,   delta = sqrt(1-alpha^2) lv = dE/dI
// Levels go from the highest down: products with transposed blocks bring L, a scan over time turns it into the errors
// that weights (weights.cu) and lower levels are multiplied with. Many streams: one kernel does both (credit.cuh,
// bulk_credit.cuh).
#include "adjoint.cuh"
#include "batched_product.cuh"
#include "bulk_credit.cuh"
#include "credit.cuh"
#include "dropout.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kScanThreads = 32;
constexpr int kFewStreams = 8;
constexpr int kScanAhead = 8;  // tokens whose inputs are loaded before they are needed

// dE/d broca -> dE/d o in place, broca = f o with f = 1/rms; a block a row, see row_threads().
template <class Real>
__global__ void unnormalize_kernel(const Real* broca, const float* inverse_rms, int dim, float* error) {
  __shared__ float room[32];
  const int64_t row = blockIdx.x;
  const int step = 4 * blockDim.x, begin = 4 * threadIdx.x, loose = begin + kHeldFours * step;
  const float factor = inverse_rms[row];
  broca += row * dim;
  error += row * dim;
  const auto product = [](float4 e, float4 b) { return e.x * b.x + e.y * b.y + e.z * b.z + e.w * b.w; };
  float4 held[kHeldFours] = {};
  Four<Real> spoken[kHeldFours] = {};
#pragma unroll
  for (int k = 0; k < kHeldFours; ++k) {
    if (begin + k * step < dim) held[k] = load4(error + begin + k * step), spoken[k] = fetch4(broca + begin + k * step);
  }
  float overlap = 0;
#pragma unroll
  for (int k = 0; k < kHeldFours; ++k) overlap += product(held[k], unpack<Real>(spoken[k]));
#pragma unroll 1
  for (int j = loose; j < dim; j += step) overlap += product(load4(error + j), load4(broca + j));
  const float mean = block_sum(overlap, room) / dim;
  const auto put = [&](int j, float4 e, float4 b) {
    store4(error + j, {factor * (e.x - b.x * mean), factor * (e.y - b.y * mean), factor * (e.z - b.z * mean),
                       factor * (e.w - b.w * mean)});
  };
#pragma unroll
  for (int k = 0; k < kHeldFours; ++k) {
    if (begin + k * step < dim) put(begin + k * step, held[k], unpack<Real>(spoken[k]));
  }
#pragma unroll 1
  for (int j = loose; j < dim; j += step) put(j, load4(error + j), load4(broca + j));
}

// dE/d o -> dE/d(summed readout input), in panels: the integrator's adjoint; a thread follows one channel of one
// stream.
template <class Real>
__global__ void readout_adjoint_kernel(const float* error, const float* kappa, const uint8_t* resets, int streams,
                                       int tokens, int64_t dim, int64_t stride, Real* out) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, step = streams * dim;
  if (at >= step) return;
  const int64_t stream = at / dim, channel = at % dim;
  const float keep = kappa[channel];
  out += channel / kBlock * stride + stream * kBlock + channel % kBlock;
  float carry = 0;
  constexpr int kAhead = 32;  // tokens whose error is loaded before it is needed
  for (int last = tokens - 1; last >= 0; last -= kAhead) {
    float ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = error[max(last - i, 0) * step + at];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = last - i;
      if (token < 0) break;
      const float adjoint = ahead[i] + carry;
      out[int64_t{token} * streams * kBlock] = from_float<Real>((1.0f - keep) * adjoint);
      carry = resets && resets[int64_t{token} * streams + stream] ? 0.0f : keep * adjoint;
    }
  }
}

// L of a region, where delta will be; what dropout silenced gets no credit.
template <class Real>
struct StoreSignal {
  const RegionView* regions;
  const TileName* tiles;
  Dropout dropout;
  int streams;
  __device__ auto open(int tile, int lane) const {
    const TileName name = tiles[tile];
    const RegionView& region = regions[name.region];
    const int neuron = name.offset + lane;
    return [to = static_cast<Real*>(region.delta) + name.offset / kBlock * region.stride + lane, neuron,
            region = name.region, dropout = dropout, streams = streams](int64_t row, float4 sums) {
      if (dropout.probability > 0) {
        const float4 mask =
            dropout_mask(dropout, region, neuron, static_cast<int>(row / streams), static_cast<int>(row % streams));
        sums = {sums.x * mask.x, sums.y * mask.y, sums.z * mask.z, sums.w * mask.w};
      }
      store_sums(to + row * kBlock, sums);
    };
  }
};

// N neighbouring neurons of one stream, from the last token to the first: two where there are streams enough, for wider
// loads (a warp then takes 32 neurons of two streams); one where it takes every warp to fill the GPU. blockIdx.x: tile.
// Single: one stream, so that a token's place is known to the compiler: less than half the instructions, which is what
// a level costs where a multiprocessor has two warps. Resets: there are some.
template <class Real, int N, bool Single, bool Resets>
__global__ void __launch_bounds__(kScanThreads) scan_adjoint_kernel(Scan p) {
  constexpr int kPerTile = kBlock / N;
  constexpr int kTogether = N == 1 ? kScanAhead : 1;  // tokens whose own part is computed before the recurrence
  const int stream = blockIdx.y * (kScanThreads / kPerTile) + threadIdx.x / kPerTile;
  if (stream >= p.streams) return;
  const TileName name = p.tiles[p.first_tile + blockIdx.x];
  const RegionView& region = p.regions[name.region];
  const int lane = threadIdx.x % kPerTile * N, neuron = name.offset + lane;
  const int64_t panel = name.offset / kBlock * region.stride;
  const int64_t first = panel + stream * kBlock + lane;
  const int step = Single ? kBlock : p.streams * kBlock;
  const Real* u_at = in_global<Real>(region.u) + first;
  Real* delta_at = in_global<Real>(region.delta) + first;
  Real* d_at = in_global<Real>(region.d) + first;
  Real* g_at = in_global<Real>(region.g) + first;
  const bool gated = region.gated;

  float alpha[N], leak[N], gain[N], rho[N], a[N], b[N], rate[N], lv[N] = {}, lw[N] = {}, dbias[N] = {};
  const float* constants = region.constants + name.offset * 5 + lane;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    alpha[j] = constants[j], leak[j] = alpha[j] - 1.0f, gain[j] = constants[kBlock + j],
    rho[j] = constants[2 * kBlock + j];
    a[j] = constants[3 * kBlock + j], b[j] = constants[4 * kBlock + j];
    rate[j] = rate_error(p, region, neuron + j);
  }
  // What a token's step reads, as it is stored; the next kScanAhead tokens' are on their way while these are worked on.
  struct Inputs {
    Few<Real, N> u[kScanAhead], signal[kScanAhead], drive[kScanAhead], gate[kScanAhead];
    bool cut[kScanAhead];
  };
  const auto fetch = [&](Inputs& in, int from) {
#pragma unroll
    for (int i = 0; i < kScanAhead; ++i) {
      const int at = (Single ? from - i : max(from - i, 0)) * step;  // before the first token: read, not used
      in.u[i] = fetch_few<N>(u_at + at);
      in.signal[i] = fetch_few<N>(delta_at + at);
      if (gated) in.drive[i] = fetch_few<N>(d_at + at), in.gate[i] = fetch_few<N>(g_at + at);
      in.cut[i] = Resets && p.resets[max(from - i, 0) * p.streams + stream];
    }
  };
  const auto work = [&](const Inputs& in, int from) {
#pragma unroll
    for (int begin = 0; begin < kScanAhead; begin += kTogether) {
      OwnPart own[kTogether][N];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          own[i][j] = own_part(p, in.u[begin + i].get(j), in.signal[begin + i].get(j), rate[j], a[j], b[j]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int k = begin + i;
        if (from - k < 0) break;
        const int at = (from - k) * step;
        float deltas[N], drive_errors[N], gate_errors[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
          step_back(own[i][j], alpha[j], leak[j], rho[j], lv[j], lw[j]);
          float delta = gain[j] * lv[j];
          deltas[j] = delta;
          if (gated) {
            const float gate = in.gate[k].get(j);
            delta *= gate;
            drive_errors[j] = delta;
            gate_errors[j] = gate_error(delta, in.drive[k].get(j), gate);
          }
          dbias[j] += delta;
          if (Resets && in.cut[k]) lv[j] = lw[j] = 0.0f;  // nothing flows to the token before a reset
        }
        const auto store = [&](Real* to, const float (&values)[N]) {
          Few<Real, N> out;
          out.set(values);
          store_few<N>(to + at, out);
        };
        store(delta_at, deltas);
        if (gated) store(g_at, drive_errors), store(d_at, gate_errors);
      }
    }
  };
  Inputs one, other;
  fetch(one, p.tokens - 1);
  for (int last = p.tokens - 1; last >= 0; last -= 2 * kScanAhead) {
    fetch(other, last - kScanAhead);
    work(one, last);
    fetch(one, last - 2 * kScanAhead);
    work(other, last - kScanAhead);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) region.dbias_part[int64_t{stream} * region.n + neuron + j] = dbias[j];
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
  const int64_t channels = int64_t{call_streams_} * spec_.dim;
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    unnormalize_kernel<<<static_cast<unsigned>(rows_), row_threads(spec_.dim), 0, stream_.get()>>>(
        static_cast<const Real*>(broca_real_), inverse_rms_, spec_.dim, d_broca_);
    launched();
    readout_adjoint_kernel<<<static_cast<int>((channels + 127) / 128), 128, 0, stream_.get()>>>(
        d_broca_, kappa_, has_resets_ ? resets_ : nullptr, call_streams_, call_tokens_, int64_t{spec_.dim},
        panel_values(), static_cast<Real*>(readout_error_));
  });
  launched();
}

void CudaModel::learn_level(int level) {
  const int first = level_begin_[level], count = level_begin_[level + 1] - first;
  const Scan scan{region_views_,
                  tile_names_,
                  has_resets_ ? resets_ : nullptr,
                  first,
                  call_streams_,
                  call_tokens_,
                  spec_.surrogate_k,
                  spec_.graded ? spec_.max_spike : 1.0f,
                  spec_.rate_weight,
                  spec_.rate_target};
  if (spec_.bf16 && call_streams_ >= kCreditStreams) {
    const bool gated = std::any_of(regions_.begin(), regions_.end(),
                                   [&](const RegionView& region) { return region.rank == level && region.gated; });
    const int room = most_pulled_[level];
    const Credit credit{scan, pull_, static_cast<const bf16*>(transposed_blocks_), dropout(), room, gated ? 3 : 1};
    const CreditShape shape = credit_shape(credit, count, processors_, shared_limit_);
    const bool crowded = call_streams_ >= kBulkStreams && !shape.roomy;
    if (credit_wanted_ != "lanes" && (crowded || credit_wanted_ == "bulk") && code_of_90()) {
      const BulkShape bulk = bulk_shape(credit, count, processors_, shared_limit_);
      if (bulk.stages > 0) {
        launch_bulk_credit(stream_.get(), credit, count, bulk);
        launched();
        return;
      }
    }
    if (shape.fits) {
      launch_credit(stream_.get(), credit, count, shape);
      launched();
      return;
    }
  }
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    launched(multiply_blocks<Real>(stream_.get(), pull_, transposed_blocks_, rows_, first, count,
                                   StoreSignal<Real>{region_views_, tile_names_, dropout(), call_streams_}));
    const int each = call_streams_ <= kFewStreams ? 1 : 2, streams = kScanThreads * each / kBlock;
    const dim3 grid(count, (call_streams_ + streams - 1) / streams);
    const auto walk = [&](auto resets) {
      constexpr bool kResets = decltype(resets)::value;
      const auto kernel = call_streams_ == 1 ? scan_adjoint_kernel<Real, 1, true, kResets>
                          : each == 1        ? scan_adjoint_kernel<Real, 1, false, kResets>
                                             : scan_adjoint_kernel<Real, 2, false, kResets>;
      kernel<<<grid, kScanThreads, 0, stream_.get()>>>(scan);
    };
    has_resets_ ? walk(std::true_type{}) : walk(std::false_type{});
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
  embedding_gradient(accumulate);
}

}  // namespace neurogen::cuda
