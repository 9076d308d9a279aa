// Construction: how the connectome, the parameters and the workspace of a CPU model are laid out.
#include "model.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <stdexcept>

namespace neurogen {

std::unique_ptr<Model> make_cpu_model(const ModelSpec& spec, Sgemm sgemm) {
  return std::make_unique<cpu::CpuModel>(spec, sgemm);
}

MemoryPlan cpu_memory_plan(const ModelSpec& spec) { return cpu::CpuModel::plan(spec); }

namespace cpu {
namespace {

// Logits of one decoder chunk, at most 64 MB: enough rows that packing the weights is a small part of a product.
constexpr int64_t kLogitFloats = int64_t{16} << 20;

int largest_delay_from(const ModelSpec& spec, int region) {
  int largest = 0;
  for (const ProjectionSpec& p : spec.projections) {
    if (p.src == region) largest = std::max(largest, p.delay);
  }
  return largest;
}

std::vector<int> histories(const ModelSpec& spec) {
  std::vector<int> out;
  for (size_t r = 0; r < spec.regions.size(); ++r) out.push_back(largest_delay_from(spec, static_cast<int>(r)));
  return out;
}

}  // namespace

CpuModel::CpuModel(const ModelSpec& spec) : spec_(spec), threads_(spec.threads) {
  connect();
  lay_out();
}

CpuModel::CpuModel(const ModelSpec& spec, Sgemm sgemm) : CpuModel(spec) {
  kernels();  // a wrong NEUROGEN_CPU_ISA is refused here, not inside a parallel region
  prepare_for_forks();
  sgemm_ = sgemm;
  arena_.allocate();
  lay_out();
  for (Projection& p : projections_) index_blocks(p);
  std::fill_n(slot_of_id_, spec_.vocab, -1);
  state_ = std::make_unique<CpuState>(spec_, histories(spec_), spec_.streams);
  counters_.host_allocations = 2;  // the model's arena and its state's
}

MemoryPlan CpuModel::plan(const ModelSpec& spec) {
  MemoryPlan parts = CpuModel(spec).arena_.parts();
  int64_t state = 0;
  for (size_t r = 0; r < spec.regions.size(); ++r) {
    state += int64_t{spec.streams} * spec.regions[r].neurons * (2 + largest_delay_from(spec, static_cast<int>(r)));
  }
  parts.emplace_back("neuron state", 4 * (state + int64_t{spec.streams} * spec.dim));
  return parts;
}

std::unique_ptr<State> CpuModel::new_state(int streams) {
  ++counters_.host_allocations;
  return std::make_unique<CpuState>(spec_, histories(spec_), streams);
}

void CpuModel::connect() {
  regions_.resize(spec_.regions.size());
  projections_.resize(spec_.projections.size());
  for (size_t r = 0; r < regions_.size(); ++r) {
    regions_[r].n = spec_.regions[r].neurons;
    regions_[r].tiles = regions_[r].n / kBlock;
    neurons_ += regions_[r].n;
    regions_[r].history = largest_delay_from(spec_, static_cast<int>(r));
    sequence_.push_back(static_cast<int>(r));
  }
  std::stable_sort(sequence_.begin(), sequence_.end(),
                   [&](int x, int y) { return spec_.regions[x].level < spec_.regions[y].level; });
  std::vector<int> position(regions_.size());
  for (size_t i = 0; i < sequence_.size(); ++i) {
    position[sequence_[i]] = static_cast<int>(i);
    const bool new_level = i == 0 || spec_.regions[sequence_[i]].level != spec_.regions[sequence_[i - 1]].level;
    ranks_ += new_level;
    regions_[sequence_[i]].rank = ranks_ - 1;
  }

  chunk_limit_ = INT_MAX;
  weights_ = int64_t{spec_.vocab} * spec_.dim;
  for (size_t i = 0; i < projections_.size(); ++i) {
    Projection& p = projections_[i];
    p.spec = &spec_.projections[i];
    p.rows = spec_.width(p.spec->dst) / kBlock;
    p.k = p.spec->blocks_per_row;
    weights_ += int64_t{p.rows} * p.k * kBlockArea;
    p.cols = p.spec->cols.data();
    const int src = p.spec->src, dst = p.spec->dst;
    if (dst == spec_.readout()) {
      readout_.push_back(&p);
    } else if (src == kFromEmbedding) {
      regions_[dst].from_embedding.push_back(&p);
    } else if (p.spec->delay == 0) {
      (p.spec->gate ? regions_[dst].gates : regions_[dst].drives).push_back(&p);
    } else if (src == dst) {
      regions_[dst].self_delayed.push_back(&p);
    } else {
      regions_[dst].delayed.push_back(&p);
      // A region that is fed back to may not run further ahead than the delay of what comes back.
      if (position[src] > position[dst]) chunk_limit_ = std::min(chunk_limit_, p.spec->delay);
    }
    if (dst != spec_.readout()) regions_[dst].gated |= p.spec->gate;
    if (src != kFromEmbedding) {
      (p.spec->delay ? regions_[src].later_listeners : regions_[src].listeners).push_back(&p);
    }
  }
}

void CpuModel::lay_out() {
  capacity_ = int64_t{spec_.streams} * spec_.max_tokens;
  lay_out_parameters();
  lay_out_workspace();
}

float* CpuModel::parameter(const std::string& key, std::vector<int64_t> shape, bool trainable, bool decay) {
  Tensor tensor{key, DType::f32, std::move(shape), nullptr, nullptr, nullptr, nullptr, decay};
  const size_t count = static_cast<size_t>(tensor.size());
  tensor.data = arena_.take<float>("parameters", count);
  if (trainable) {
    tensor.gradient = arena_.take<float>("gradients", count);
    tensor.moment1 = arena_.take<float>("optimizer moments", count);
    tensor.moment2 = arena_.take<float>("optimizer moments", count);
  }
  tensors_.push_back(tensor);
  return static_cast<float*>(tensor.data);
}

void CpuModel::lay_out_parameters() {
  tensors_.clear();
  const int64_t vocab = spec_.vocab, dim = spec_.dim;
  embedding_ = decoder_ = parameter("embedding.weight", {vocab, dim}, true, false);
  d_embedding_ = d_decoder_ = tensors_.back().gradient;
  if (!spec_.tied) {
    decoder_ = parameter("decoder.weight", {vocab, dim}, true, true);
    d_decoder_ = tensors_.back().gradient;
  }
  decoder_bias_ = parameter("decoder.bias", {vocab}, true, false);
  d_decoder_bias_ = tensors_.back().gradient;
  kappa_ = parameter("broca.kappa", {dim}, false, false);
  for (size_t r = 0; r < regions_.size(); ++r) {
    Region& region = regions_[r];
    const std::string prefix = "region." + spec_.regions[r].name;
    region.bias = parameter(prefix + ".bias", {region.n}, true, false);
    region.dbias = tensors_.back().gradient;
    region.alpha = parameter(prefix + ".alpha", {region.n}, false, false);
    region.rho = parameter(prefix + ".rho", {region.n}, false, false);
    region.a = parameter(prefix + ".a", {region.n}, false, false);
    region.b = parameter(prefix + ".b", {region.n}, false, false);
    region.input_gain = arena_.take<float>("parameters", region.n);
    region.spike_count = arena_.take<float>("workspace", region.n);
  }
  for (Projection& p : projections_) {
    const int64_t blocks = int64_t{p.rows} * p.k;
    p.blocks = parameter(p.spec->key + ".blocks", {blocks, kBlock, kBlock}, true, true);
    p.gradient = tensors_.back().gradient;
    p.panels = arena_.take<float>("transposed weights", blocks * kBlockArea);
    p.order = arena_.take<int32_t>("connectome", blocks);
    p.by_col_start = arena_.take<int32_t>("connectome", spec_.width(p.spec->src) / kBlock + 1);
    p.by_col_block = arena_.take<int32_t>("connectome", blocks);
    p.by_col_row = arena_.take<int32_t>("connectome", blocks);
  }
}

void CpuModel::lay_out_workspace() {
  const char* part = "workspace";
  const int64_t rows = capacity_, dim = spec_.dim, vocab = spec_.vocab;
  for (Region& region : regions_) {
    const int64_t cells = rows * region.n;
    region.u = arena_.take<float>(part, cells);
    region.s = arena_.take<float>(part, cells);
    region.dropped = spec_.dropout > 0 ? arena_.take<float>(part, cells) : nullptr;
    region.d = arena_.take<float>(part, cells);
    region.g = region.gated ? arena_.take<float>(part, cells) : nullptr;
    region.delta = region.gated ? arena_.take<float>(part, cells) : region.d;
    region.v = arena_.take<float>(part, cells);
    region.w = arena_.take<float>(part, cells);
  }
  slot_of_row_ = arena_.take<int32_t>(part, rows);
  slot_of_id_ = arena_.take<int32_t>(part, vocab);
  unique_ids_ = arena_.take<int32_t>(part, rows);
  x_ = arena_.take<float>(part, rows * dim);
  dx_ = arena_.take<float>(part, rows * dim);
  resets_ = arena_.take<uint8_t>(part, rows);
  age_ = arena_.take<int32_t>(part, rows);
  target_ids_ = arena_.take<int32_t>(part, rows);
  target_weights_ = arena_.take<float>(part, rows);
  row_loss_ = arena_.take<double>(part, rows);
  row_best_ = arena_.take<int32_t>(part, rows);
  o_ = arena_.take<float>(part, rows * dim);
  broca_ = arena_.take<float>(part, rows * dim);
  d_broca_ = arena_.take<float>(part, rows * dim);
  readout_error_ = arena_.take<float>(part, rows * dim);
  inverse_rms_ = arena_.take<float>(part, rows);
  logit_rows_ = std::min(rows, std::max<int64_t>(16, kLogitFloats / vocab));
  logits_ = arena_.take<float>(part, logit_rows_ * vocab);
  // Units of parallel work that do not starve the BLAS kernels: 16 slices of V of at least 128, 4 of D of at least 64.
  dim_slice_ = std::max<int64_t>(64, (dim / 4 + 31) / 32 * 32);
  vocab_slice_ = std::max<int64_t>(128, ((vocab + 15) / 16 + 31) / 32 * 32);
  tile_scratch_stride_ = (rows + 2 * spec_.streams) * kBlock;
  tile_scratch_ = arena_.take<float>(part, threads_ * tile_scratch_stride_);
  sort_ids_ = arena_.take<int32_t>(part, threads_ * vocab);
  row_touched_ = arena_.take<uint8_t>(part, vocab);
  touched_rows_ = arena_.take<int32_t>(part, vocab);
  int64_t pieces = vocab;
  for (const Tensor& tensor : tensors_) pieces += tensor.size() / kUpdatePiece + 1;
  piece_norms_ = arena_.take<double>(part, pieces);
}

void CpuModel::index_blocks(Projection& p) {
  const int columns = spec_.width(p.spec->src) / kBlock, blocks = p.rows * p.k;
  if (static_cast<int64_t>(p.spec->cols.size()) != blocks) {
    throw std::invalid_argument(p.spec->key + ".cols: expected " + std::to_string(blocks) + " entries, got " +
                                std::to_string(p.spec->cols.size()));
  }
  for (int block = 0; block < blocks; ++block) {
    p.order[block] = block;
    const int col = p.cols[block];
    if (col < 0 || col >= columns || (block % p.k && p.cols[block - 1] >= col)) {
      throw std::invalid_argument(p.spec->key + ".cols: expected ascending columns in 0.." +
                                  std::to_string(columns - 1) + " in every row of blocks, got " + std::to_string(col) +
                                  " at block " + std::to_string(block));
    }
    ++p.by_col_start[col + 1];
  }
  for (int col = 0; col < columns; ++col) p.by_col_start[col + 1] += p.by_col_start[col];
  std::vector<int32_t> next(p.by_col_start, p.by_col_start + columns);
  for (int block = 0; block < blocks; ++block) {
    const int32_t at = next[p.cols[block]]++;
    p.by_col_block[at] = block;
    p.by_col_row[at] = block / p.k;
  }
}

void CpuModel::refresh_derived() {
  if (!derived_stale_) return;
  for (Region& region : regions_) {
    for (int j = 0; j < region.n; ++j) region.input_gain[j] = std::sqrt(1.0f - region.alpha[j] * region.alpha[j]);
  }
#pragma omp parallel num_threads(threads_)
  for (Projection& p : projections_) {
    const int64_t blocks = int64_t{p.rows} * p.k;
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < blocks; ++block) {
      const float* from = p.blocks + block * kBlockArea;
      float* to = p.panels + block * kBlockArea;
      for (int i = 0; i < kBlock; ++i) {
        for (int j = 0; j < kBlock; ++j) to[j * kBlock + i] = from[i * kBlock + j];
      }
    }
  }
  derived_stale_ = false;
}

ExecutionPlan CpuModel::execution_plan() const {
  return {{"kernels", kernels().name},
          {"threads", std::to_string(threads_)},
          {"schedule", shares_ticks(spec_.streams) ? "wavefront: threads share the neurons of each tick"
                                                   : "groups: each thread takes streams of its own"},
          {"logits at a time", std::to_string(logit_rows_) + " rows"}};
}

double CpuModel::rate(int region) const {
  double spikes = 0;
  for (int j = 0; j < regions_[region].n; ++j) spikes += regions_[region].spike_count[j];
  return rows_ ? spikes / (static_cast<double>(rows_) * regions_[region].n) : 0.0;
}

}  // namespace cpu
}  // namespace neurogen
