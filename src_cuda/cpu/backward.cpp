// Batched e-prop (Bellec et al. 2020, with exact spatial credit): the gradient of the loss with delayed spikes and the
// soft reset held constant. With the learning signal L = dE/ds of a region, walk t from T-1 down,
//   lw = rho lw' - (1-alpha) lv',   ls = L + (1-rho) b lw,
//   lv = alpha lv' + (1-rho) a lw + ls ds/du + rate term,   delta = sqrt(1-alpha^2) lv = dE/dI
// then dW[block] = sum over rows of e s^T with e = dd (drive), dg (gate) or delta (delayed).
// Regions go from the highest level down; the work inside a region is parallel over tiles of 32 neurons.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "model.h"

namespace neurogen::cpu {

void CpuModel::learn(bool accumulate) {
  const int dim_tiles = spec_.dim / kBlock;
  if (!accumulate) clear_embedding_gradient();
#pragma omp parallel num_threads(workers(rows_* weights_))
  {
    float* scratch = tile_scratch_ + omp_get_thread_num() * tile_scratch_stride_;
#pragma omp for schedule(dynamic, 64)
    for (int64_t row = 0; row < rows_; ++row) unnormalize_row(row);
#pragma omp for schedule(dynamic)
    for (int tile = 0; tile < dim_tiles; ++tile) readout_error(tile, scratch);
    for (auto index = sequence_.rbegin(); index != sequence_.rend(); ++index) {
#pragma omp for schedule(dynamic)
      for (int tile = 0; tile < regions_[*index].tiles; ++tile) learn_tile(*index, tile, scratch, accumulate);
    }
    for (size_t index = 0; index < regions_.size(); ++index) {
#pragma omp for schedule(dynamic) nowait
      for (int tile = 0; tile < regions_[index].tiles; ++tile) {
        source_weights(static_cast<int>(index), tile, accumulate);
      }
    }
#pragma omp barrier
    for (const Projection& p : projections_) {
      if (p.spec->src != kFromEmbedding) continue;
#pragma omp for schedule(dynamic) nowait
      for (int row = 0; row < p.rows; ++row) segment(error_of(p) + row * slab(), scratch);
    }
#pragma omp barrier
    for (const Projection& p : projections_) {
      if (p.spec->src != kFromEmbedding) continue;
#pragma omp for schedule(dynamic) nowait
      for (int row = 0; row < p.rows; ++row) embedding_weights(p, row, accumulate);
    }
#pragma omp for schedule(dynamic)
    for (int tile = 0; tile < dim_tiles; ++tile) embedding_gradient(tile);
  }
}

// dE/d broca -> dE/d o, in place: broca = f o with f = 1/rms.
void CpuModel::unnormalize_row(int64_t row) {
  const int64_t dim = spec_.dim;
  float* error = d_broca_ + row * dim;
  const float* broca = broca_ + row * dim;
  double overlap = 0;
  for (int64_t j = 0; j < dim; ++j) overlap += static_cast<double>(error[j]) * broca[j];
  const float mean = static_cast<float>(overlap / dim);
  for (int64_t j = 0; j < dim; ++j) error[j] = inverse_rms_[row] * (error[j] - broca[j] * mean);
}

// dE/d o -> dE/d(summed readout input): the integrator's adjoint. carry: scratch [S, 32].
void CpuModel::readout_error(int tile, float* carry) {
  const float* kappa = kappa_ + tile * kBlock;
  std::fill_n(carry, int64_t{streams_} * kBlock, 0.0f);
  for (int64_t row = rows_ - 1; row >= 0; --row) {
    float* lo = carry + row % streams_ * kBlock;
    const float* error = d_broca_ + row * spec_.dim + tile * kBlock;
    float* out = readout_error_ + tile * slab() + row * kBlock;
    const bool cut = has_resets_ && resets_[row];
    for (int j = 0; j < kBlock; ++j) {
      const float adjoint = error[j] + lo[j];
      out[j] = (1.0f - kappa[j]) * adjoint;
      lo[j] = cut ? 0.0f : kappa[j] * adjoint;
    }
  }
}

// What a projection's weights are multiplied with: the error at its receiver, [tiles of dst, M, 32].
float* CpuModel::error_of(const Projection& p) const {
  if (p.spec->dst == spec_.readout()) return readout_error_;
  const Region& region = regions_[p.spec->dst];
  return p.spec->gate ? region.error_gate() : p.spec->delay ? region.delta : region.error_drive();
}

// out (+)= W^T e for one block column: the error that reaches 32 sources through this projection.
void CpuModel::pull(const Projection& p, int col, int64_t rows, float* out, int64_t ldo, bool add) const {
  const int32_t begin = p.by_col_start[col], end = p.by_col_start[col + 1];
  kernels().block_product({out,
                           ldo,
                           {error_of(p), kBlock, slab()},
                           rows,
                           p.blocks,
                           p.by_col_block + begin,
                           p.by_col_row + begin,
                           end - begin,
                           add});
}

void CpuModel::learn_tile(int index, int tile, float* scratch, bool accumulate) {
  Region& region = regions_[index];
  const int offset = tile * kBlock;
  float* learning = scratch;
  bool add = false;
  for (const Projection* p : region.listeners) {
    pull(*p, tile, rows_, learning, kBlock, add);
    add = true;
  }
  if (!add) std::fill_n(learning, rows_ * kBlock, 0.0f);
  for (int64_t row = 0; train_dropout_ && row < rows_; ++row) {
    float mask[kBlock];
    dropout_mask(index, tile, static_cast<int>(row / streams_), static_cast<int>(row % streams_), mask);
    for (int j = 0; j < kBlock; ++j) learning[row * kBlock + j] *= mask[j];
  }
  float rate_signal[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    const float rate = region.spike_count[offset + j] / static_cast<float>(rows_);
    rate_signal[j] = static_cast<float>(spec_.rate_weight * 2.0 * (rate - spec_.rate_target) /
                                        (static_cast<double>(region.n) * static_cast<double>(rows_)));
  }
  if (!accumulate) std::fill_n(region.dbias + offset, kBlock, 0.0f);
  float* adjoints = scratch + rows_ * kBlock;
  const int64_t at = tile * slab();
  kernels().adjoint_scan({streams_,
                          tokens_,
                          region.alpha + offset,
                          region.rho + offset,
                          region.a + offset,
                          region.b + offset,
                          region.input_gain + offset,
                          region.u + at,
                          learning,
                          rate_signal,
                          has_resets_ ? resets_ : nullptr,
                          adjoints,
                          adjoints + int64_t{streams_} * kBlock,
                          region.delta + at,
                          region.gated ? region.d + at : nullptr,
                          region.gated ? region.g + at : nullptr,
                          region.dbias + offset,
                          spec_.surrogate_k,
                          spec_.graded,
                          spec_.max_spike});
}

// dW of one row of blocks of an embedding projection; its errors were summed per distinct token.
void CpuModel::embedding_weights(const Projection& p, int row, bool accumulate) {
  for (int q = 0; q < p.k; ++q) {
    const int64_t block = int64_t{row} * p.k + q;
    kernels().outer_product({p.gradient + block * kBlockArea, error_of(p) + row * slab(), x_ + p.cols[block] * kBlock,
                             spec_.dim, unique_, accumulate});
  }
}

namespace {

void transpose(float* block) {
  for (int i = 0; i < kBlock; ++i) {
    for (int j = 0; j < i; ++j) std::swap(block[i * kBlock + j], block[j * kBlock + i]);
  }
}

}  // namespace

// dW of every block that hears these 32 neurons. Their spikes are listed once, a piece of the call at a time, and
// each block adds up only rows with a spike; meanwhile it is held transposed, so that a spike adds to one row.
void CpuModel::source_weights(int index, int tile, bool accumulate) {
  const Region& region = regions_[index];
  const auto for_blocks = [&](const Projection& p, auto body) {
    for (int32_t at = p.by_col_start[tile]; at < p.by_col_start[tile + 1]; ++at) {
      body(p.gradient + int64_t{p.by_col_block[at]} * kBlockArea, error_of(p) + p.by_col_row[at] * slab());
    }
  };
  const auto begin = [&](float* dw, float*) {
    if (accumulate) return transpose(dw);
    std::fill_n(dw, kBlockArea, 0.0f);
  };
  const auto end = [&](float* dw, float*) { transpose(dw); };
  SpikeList list;
  // Adds the products of `rows` rows of spikes with the errors `row` rows into the call, for each projection given.
  const auto add = [&](const Source& source, int64_t row, int64_t rows, Projection* const* projections, size_t count) {
    for (int64_t first = 0; first < rows; first += kListRows) {
      const int64_t some = std::min<int64_t>(kListRows, rows - first);
      kernels().list_spikes(source.from_row(first).data + tile * source.tile, source.row, some, &list);
      for (size_t i = 0; i < count; ++i) {
        for_blocks(*projections[i], [&](float* dw, float* error) {
          kernels().spike_outer({dw, error + (row + first) * kBlock, some, &list});
        });
      }
    }
  };
  for (const Projection* p : region.listeners) for_blocks(*p, begin);
  for (const Projection* p : region.later_listeners) for_blocks(*p, begin);
  add(emitted(index), 0, rows_, region.listeners.data(), region.listeners.size());
  for (Projection* p : region.later_listeners) {
    for_source_rows(*p, 0, tokens_, 0, streams_,
                    [&](int64_t row, int64_t rows, const Source& source) { add(source, row, rows, &p, 1); });
  }
  for (const Projection* p : region.listeners) for_blocks(*p, end);
  for (const Projection* p : region.later_listeners) for_blocks(*p, end);
}

// Sums the errors of rows that share a token, in row order, into the first `unique` rows. table: [unique, 32].
void CpuModel::segment(float* error, float* table) const {
  std::fill_n(table, int64_t{unique_} * kBlock, 0.0f);
  for (int64_t row = 0; row < rows_; ++row) {
    float* to = table + int64_t{slot_of_row_[row]} * kBlock;
    for (int j = 0; j < kBlock; ++j) to[j] += error[row * kBlock + j];
  }
  std::copy_n(table, int64_t{unique_} * kBlock, error);
}

void CpuModel::clear_embedding_gradient() {
  if (spec_.tied) return;  // the decoder's gradient has just overwritten it
  for (int64_t id = 0; id < spec_.vocab; ++id) {
    if (row_touched_[id] || scan_embedding_rows_) std::fill_n(d_embedding_ + id * spec_.dim, spec_.dim, 0.0f);
    row_touched_[id] = 0;
  }
}

// Columns of dE of this tile, from the summed errors of the embedding's projections.
void CpuModel::embedding_gradient(int tile) {
  const int64_t dim = spec_.dim;
  bool add = false;
  for (const Projection& p : projections_) {
    if (p.spec->src != kFromEmbedding) continue;
    pull(p, tile, unique_, dx_ + tile * kBlock, dim, add);
    add = true;
  }
  if (!add) return;
  for (int i = 0; i < unique_; ++i) {
    float* to = d_embedding_ + int64_t{unique_ids_[i]} * dim + tile * kBlock;
    const float* from = dx_ + int64_t{i} * dim + tile * kBlock;
    for (int j = 0; j < kBlock; ++j) to[j] += from[j];
    if (tile == 0) row_touched_[unique_ids_[i]] = 1;
  }
}

// How often each neuron spiked in this call (u > 0; exact in float up to 2^24 rows).
void CpuModel::count_spikes(Region& region, int tile) const {
  float count[kBlock] = {};
  for (int64_t row = 0; row < rows_; ++row) {
    const float* u = region.u + tile * slab() + row * kBlock;
    for (int j = 0; j < kBlock; ++j) count[j] += u[j] > 0 ? 1.0f : 0.0f;
  }
  std::copy(count, count + kBlock, region.spike_count + tile * kBlock);
}

// c_rate * sum over regions of mean over neurons of (rate - target)^2.
double CpuModel::homeostasis() const {
  double total = 0;
  for (const Region& region : regions_) {
    double squares = 0;
    for (int j = 0; j < region.n; ++j) {
      const double gap = region.spike_count[j] / static_cast<double>(rows_) - spec_.rate_target;
      squares += gap * gap;
    }
    total += squares / region.n;
  }
  return spec_.rate_weight * total;
}

}  // namespace neurogen::cpu
