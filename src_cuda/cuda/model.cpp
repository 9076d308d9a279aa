// Construction of a CUDA model: what it allocates, and where everything lies.
#include "model.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace neurogen {

std::unique_ptr<Model> make_cuda_model(const ModelSpec& spec) { return std::make_unique<cuda::CudaModel>(spec); }

MemoryPlan cuda_memory_plan(const ModelSpec& spec) { return cuda::CudaModel::plan(spec); }

namespace cuda {

CudaModel::CudaModel(const ModelSpec& spec, MeasureOnly) : spec_(spec) {
  connect();
  lay_out();
}

CudaModel::CudaModel(const ModelSpec& spec) : CudaModel(spec, MeasureOnly{}) {
  if (panel_values() > INT32_MAX) {
    throw std::invalid_argument("streams * max_tokens: expected at most " +
                                std::to_string(INT32_MAX / kBlock - kSpareRows) + ", got " + std::to_string(capacity_));
  }
  const OnDevice scope(spec_.device);
  if (spec_.fp8) require_eight();
  memory_ = device_memory(arena_.bytes());
  arena_.bind(memory_.get());
  lay_out();
  stream_ = new_stream();
  done_ = new_event(spec_.spin);
  arrived_ = new_event(false);
  given_ = new_event(false);
  pinned_size_ =
      inbox_size_ + outbox_size_ + sizeof(float) * spec_.streams * spec_.dim + sizeof(int32_t) * drawn_room() + 4096;
  pinned_ = pinned_memory(pinned_size_);
  rates_.resize(regions_.size());
  build_lists();
  check_sort_bytes();
  state_->upload();
  cublas_ = std::make_unique<Cublas>(spec_.bf16, blas_workspace_, kBlasWorkspace);
  counters_.device_allocations = 1;
  counters_.host_allocations = 1;
}

CudaModel::~CudaModel() {
  if (stream_) cudaStreamSynchronize(stream_.get());
}

MemoryPlan CudaModel::plan(const ModelSpec& spec) { return CudaModel(spec, MeasureOnly{}).arena_.parts(); }

std::unique_ptr<State> CudaModel::new_state(int streams) {
  const OnDevice scope(spec_.device);
  auto out = std::make_unique<CudaState>(spec_, history_, streams);
  out->own_memory();
  ++counters_.device_allocations;
  return out;
}

void CudaModel::lay_out() {
  capacity_ = int64_t{spec_.streams} * spec_.max_tokens;
  lay_out_parameters();
  lay_out_connectome();
  lay_out_workspace();
  lay_out_decoder();
  if (!state_) state_ = std::make_unique<CudaState>(spec_, history_, spec_.streams);
  state_->lay_out(arena_);
}

void CudaModel::lay_out_parameters() {
  const int64_t vocab = spec_.vocab, dim = spec_.dim;
  const auto padded = [](int64_t values) { return (values + kUnit - 1) / kUnit * kUnit; };
  decoder_unit_ = blocks_;
  decoder_units_ = padded(vocab * dim) / kUnit;
  decay_units_ = blocks_ + (spec_.tied ? 0 : decoder_units_);
  const int64_t decoder_at = decoder_unit_ * kUnit, bias_at = decoder_at + padded(vocab * dim);
  int64_t end = bias_at + padded(vocab);
  std::vector<int64_t> region_at;
  for (const RegionView& region : regions_) {
    region_at.push_back(end);
    end += padded(region.n);
  }
  units_ = end / kUnit;
  const int64_t embedding_at = spec_.tied ? decoder_at : end;
  if (!spec_.tied) end += vocab * dim;
  weights_ = arena_.take<float>("parameters", end);
  gradients_ = arena_.take<float>("gradients", end);
  moment1_ = arena_.take<float>("optimizer moments", end);
  moment2_ = arena_.take<float>("optimizer moments", end);

  tensors_.clear();
  const auto trainable = [&](const std::string& key, std::vector<int64_t> shape, int64_t at, bool decay) {
    tensors_.push_back(
        {key, DType::f32, std::move(shape), weights_ + at, gradients_ + at, moment1_ + at, moment2_ + at, decay});
    return weights_ + at;
  };
  const auto constant = [&](const std::string& key, int64_t count) {
    float* data = arena_.take<float>("parameters", count);
    tensors_.push_back({key, DType::f32, {count}, data});
    return data;
  };
  embedding_ = trainable("embedding.weight", {vocab, dim}, embedding_at, false);
  d_embedding_ = gradients_ + embedding_at;
  decoder_ = spec_.tied ? embedding_ : trainable("decoder.weight", {vocab, dim}, decoder_at, true);
  d_decoder_ = gradients_ + decoder_at;
  decoder_bias_ = trainable("decoder.bias", {vocab}, bias_at, false);
  d_decoder_bias_ = gradients_ + bias_at;
  kappa_ = constant("broca.kappa", dim);
  for (size_t r = 0; r < regions_.size(); ++r) {
    RegionView& region = regions_[r];
    const std::string prefix = "region." + spec_.regions[r].name;
    region.bias = trainable(prefix + ".bias", {region.n}, region_at[r], false);
    region.dbias = gradients_ + region_at[r];
    region.alpha = constant(prefix + ".alpha", region.n);
    region.rho = constant(prefix + ".rho", region.n);
    region.a = constant(prefix + ".a", region.n);
    region.b = constant(prefix + ".b", region.n);
    region.constants = arena_.take<float>("parameters", int64_t{5} * region.n);
  }
  for (size_t p = 0; p < spec_.projections.size(); ++p) {
    const int64_t blocks = first_block_[p + 1] - first_block_[p];
    trainable(spec_.projections[p].key + ".blocks", {blocks, kBlock, kBlock}, first_block_[p] * kBlockArea, true);
  }

  const char* part = "copies of weights for products";
  transposed_blocks_ = take_real(part, blocks_ * kBlockArea);
  forward_blocks_ = spec_.bf16 ? take_real(part, blocks_ * kBlockArea) : weights_;
  decoder_real_ = spec_.bf16 ? take_real(part, decoder_units_ * kUnit) : decoder_;  // whole units are copied
  row_touched_ = arena_.take<uint8_t>("workspace", vocab);
}

void CudaModel::lay_out_workspace() {
  const char *part = "workspace", *saved = "saved activations";
  const int64_t rows = capacity_, dim = spec_.dim;
  for (RegionView& region : regions_) {
    region.stride = panel_values();
    region.u = take_panels(saved, region.n);
    region.s = take_panels(saved, region.n);
    region.emitted = spec_.dropout > 0 ? take_panels(saved, region.n) : region.s;
    region.d = take_panels(saved, region.n);
    region.g = region.gated ? take_panels(saved, region.n) : nullptr;
    region.delta = region.gated ? take_panels(saved, region.n) : region.d;
    region.dbias_part = arena_.take<float>(part, int64_t{spec_.streams} * region.n);
  }
  spike_counts_ = arena_.take<int>(part, total_neurons());
  for (RegionView& region : regions_) region.spike_count = spike_counts_ + region.first_tile * kBlock;
  region_views_ = arena_.take<RegionView>(part, regions_.size());
  region_part_ = arena_.take<double>(part, regions_.size());

  inbox_size_ = static_cast<size_t>(rows) * (3 * 4 + 1) + 4 * 256;
  outbox_size_ = sizeof(Verdict) + sizeof(double) * regions_.size() + sizeof(int32_t) * rows;
  inbox_ = arena_.take<char>(part, inbox_size_);
  char* outbox = arena_.take<char>(part, outbox_size_);
  verdict_ = reinterpret_cast<Verdict*>(outbox);
  rate_sums_ = reinterpret_cast<double*>(outbox + sizeof(Verdict));
  predictions_ = reinterpret_cast<int32_t*>(outbox + sizeof(Verdict) + sizeof(double) * regions_.size());
  ids_ = arena_.take<int32_t>(part, rows);
  target_ids_ = arena_.take<int32_t>(part, rows);
  target_weights_ = arena_.take<float>(part, rows);
  resets_ = arena_.take<uint8_t>(part, rows);
  age_ = arena_.take<int32_t>(part, rows);

  x_ = take_panels(part, dim);
  dx_ = arena_.take<float>(part, rows * dim);
  o_ = arena_.take<float>(part, rows * dim);
  broca_real_ = take_real(part, rows * dim);
  inverse_rms_ = arena_.take<float>(part, rows);
  d_broca_ = arena_.take<float>(part, rows * dim);
  readout_error_ = take_panels(part, dim);
  row_loss_ = arena_.take<float>(part, rows);
  row_best_ = arena_.take<int32_t>(part, rows);

  sort_keys_ = arena_.take<uint32_t>(part, rows);
  sorted_ids_ = arena_.take<uint32_t>(part, rows);
  sort_rows_ = arena_.take<uint32_t>(part, rows);
  sorted_rows_ = arena_.take<uint32_t>(part, rows);
  sort_scratch_ = arena_.take<char>(part, sort_bytes());
  const int64_t segments = (rows + kSegmentRows - 1) / kSegmentRows;
  head_part_ = arena_.take<float>(part, segments * dim);
  tail_part_ = arena_.take<float>(part, segments * dim);
  norm_part_ = arena_.take<double>(part, kNormBlocks);
  draw_ = arena_.take<Draw>(part, 1);
  faults_ = arena_.take<Faults>(part, 1);
  drawn_ = arena_.take<int32_t>(part, drawn_room());
}

void CudaModel::launched(int launches) {
  counters_.launches += launches;
  NG_CUDA(cudaGetLastError());
}

// Room in pinned memory until the next wait().
char* CudaModel::pinned(size_t bytes) {
  bytes = (bytes + 255) / 256 * 256;
  if (pinned_used_ + bytes > pinned_size_) throw std::logic_error("pinned staging: too small for this call");
  char* out = static_cast<char*>(pinned_.get()) + pinned_used_;
  pinned_used_ += bytes;
  return out;
}

void CudaModel::copy_in(void* to, const void* from, size_t bytes) {
  NG_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_.get()));
  counters_.h2d_bytes += static_cast<int64_t>(bytes);
}

void CudaModel::copy_out(void* to, const void* from, size_t bytes) {
  NG_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_.get()));
  counters_.d2h_bytes += static_cast<int64_t>(bytes);
}

void CudaModel::wait() {
  NG_CUDA(cudaEventRecord(done_.get(), stream_.get()));
  await_done();
}

void CudaModel::await_done() {
  ++counters_.syncs;
  pinned_used_ = 0;
  NG_CUDA(cudaEventSynchronize(done_.get()));
}

void CudaModel::rest() {
  const OnDevice scope(spec_.device);
  NG_CUDA(cudaStreamSynchronize(stream_.get()));
}

void CudaModel::read(const void* from, void* host, size_t bytes) {
  const OnDevice scope(spec_.device);
  copy_out(host, from, bytes);
  wait();
}

void CudaModel::write(void* to, const void* host, size_t bytes) {
  const OnDevice scope(spec_.device);
  copy_in(to, host, bytes);
  wait();
}

}  // namespace cuda
}  // namespace neurogen
