// Before the brain launch: no spike of the call is written yet (brain.cuh says why that has to be seen), and those of
// earlier calls lie ready.
#include <algorithm>

#include "model.h"
#include "numbers.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kThreads = 256;

// Spikes with the sign of a call, whatever theirs was: -0 too, and what is no number.
__device__ inline Four<bf16> with_sign(const Four<bf16>& x, bool negative) {
  const uint32_t sign = negative ? kTwoSigns : 0;
  return {{(x.raw.x & ~kTwoSigns) | sign, (x.raw.y & ~kTwoSigns) | sign}};
}
__device__ inline Four<float> with_sign(const Four<float>& x, bool) { return x; }  // never negative

// Before the launch: spikes of `rows` rows from `first_row` on become `silence`. carried: those of earlier calls become
// Real, with the sign of this call's, and none is counted. A block of threads takes tiles, 2^log_threads threads each;
// blockIdx.y: shares of a tile's work.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    hush_kernel(const RegionView* regions, const StateView* states, const TileName* tiles, int tile_count,
                int64_t first_row, int64_t rows, uint32_t silence, bool carried, bool negative, int streams,
                int log_threads) {
  constexpr int kAtOnce = 4;
  const int tile = blockIdx.x * (kThreads >> log_threads) + (threadIdx.x >> log_threads);
  if (tile >= tile_count) return;
  const TileName name = tiles[tile];
  const RegionView region = regions[name.region];
  const StateView state = states[name.region];
  const int64_t panel = name.offset / kBlock, step = int64_t{gridDim.y} << log_threads,
                begin = (int64_t{blockIdx.y} << log_threads) + (threadIdx.x & ((1 << log_threads) - 1)),
                words = rows * kBlock * sizeof(Real) / sizeof(uint4);
  const auto hush = [&](void* spikes) {
    auto* to = reinterpret_cast<uint4*>(static_cast<Real*>(spikes) + panel * region.stride + first_row * kBlock);
    for (int64_t i = begin; i < words; i += step) to[i] = {silence, silence, silence, silence};
  };
  hush(region.s);
  if (region.emitted != region.s) hush(region.emitted);
  if (!carried) return;
  if (begin < kBlock / 4) reinterpret_cast<int4*>(region.spike_count + name.offset)[begin] = {0, 0, 0, 0};
  const int64_t fours = int64_t{region.history} * streams * (kBlock / 4);
  Real* const recent = static_cast<Real*>(state.recent) + panel * fours * 4;
  const float* const from = state.spikes + name.offset;
  for (int64_t first = begin; first < fours; first += kAtOnce * step) {  // several on their way
    float4 x[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = min(first + j * step, fours - 1);
      x[j] = load4(from + i / 8 * region.n + i % 8 * 4);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = first + j * step;
      if (i < fours) put4(recent + 4 * i, with_sign(pack<Real>(x[j]), negative));
    }
  }
}

}  // namespace

// Nothing may look like a spike of this call before it is one. Any launch can be told so by ~0 in every place. That
// of many streams with weights in registers looks at signs alone (by_sign), which spikes have to spare: those of one
// call are negative, those of the next are not, and nothing has to be written in between, but where rows have the wrong
// sign, as after a call with fewer rows. `base`, 64 x 512: 2.6 GB less to write, 0.6 ms.
void CudaModel::hush(bool by_sign) {
  if (signs_.empty()) signs_.push_back({capacity_, SpikeSign::positive});  // panels begin as zeros
  signs_before_ = signs_;
  note_spikes(rows_, SpikeSign::unknown);  // until the launch is under way
  const auto for_rows = [&](auto body) {   // body(first row, rows, their sign)
    int64_t begin = 0;
    for (const SignedRows& some : signs_before_) {
      if (begin < rows_) body(begin, std::min(some.end, rows_) - begin, some.sign);
      begin = some.end;
    }
  };
  int64_t ready = 0;  // for negative spikes more than for others
  for_rows([&](int64_t, int64_t rows, SpikeSign sign) {
    if (sign != SpikeSign::unknown) ready += sign == SpikeSign::positive ? rows : -rows;
  });
  negative_ = by_sign && ready > 0;
  const SpikeSign wanted = negative_ ? SpikeSign::positive : SpikeSign::negative;
  hush_rows(0, by_sign ? 0 : rows_, ~0u, true);
  for_rows([&](int64_t first, int64_t rows, SpikeSign sign) {
    if (by_sign && sign != wanted) hush_rows(first, rows, negative_ ? 0 : ~0u, false);
  });
}

void CudaModel::note_spikes(int64_t rows, SpikeSign sign) {
  const auto beyond =
      std::find_if(signs_.begin(), signs_.end(), [&](const SignedRows& some) { return some.end > rows; });
  signs_.erase(signs_.begin(), beyond);
  if (signs_.empty() || signs_.front().sign != sign) signs_.insert(signs_.begin(), {rows, sign});
}

void CudaModel::hush_rows(int64_t first, int64_t rows, uint32_t silence, bool carried) {
  // A thread of a tile for each 16 bytes of its spikes and each four it carries, up to kThreads; then more blocks, of
  // which there are enough when each thread has two of them.
  const int64_t kept = carried ? int64_t{*std::max_element(history_.begin(), history_.end())} * call_streams_ : 0,
                fours = std::max(rows, kept) * (kBlock / 4);
  int log_threads = 3;
  while (1 << log_threads < std::min<int64_t>(fours, kThreads)) ++log_threads;
  const int tiles_each = kThreads >> log_threads;
  const dim3 hush_grid((tiles_ + tiles_each - 1) / tiles_each,
                       static_cast<unsigned>(std::clamp<int64_t>(fours / (2 * kThreads), 1, 64)));
  with_real(spec_.bf16, [&](auto real) {
    hush_kernel<decltype(real)><<<hush_grid, kThreads, 0, stream_.get()>>>(region_views_, active_->views(), tile_names_,
                                                                           tiles_, first, rows, silence, carried,
                                                                           negative_, call_streams_, log_threads);
  });
  launched();
}

}  // namespace neurogen::cuda
