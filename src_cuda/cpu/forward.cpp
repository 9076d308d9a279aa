// The brain, forward. Per region and token t (ALIF with subthreshold adaptation, after Bellec et al. 2020):
//
//   d = bias + sum of drives,  G = 2 sigmoid(sum of gates),  I = G d + delayed
//   v = alpha v - (1-alpha) w + sqrt(1-alpha^2) I - s,  u = v - 1
//   s = H(u) min(1+u, max_spike),  w = rho w + (1-rho)(a v + b s)
//
// and o = kappa o + (1-kappa) r, broca = o / rms(o) for the readout r.
//
// Order of work: embedding products of all tokens at once, then one of two schedules.
//
// Groups, with as many streams as threads or a small brain: a thread takes a group of streams and runs, a chunk of
// tokens at a time, the regions from the lowest level up, each over the whole chunk. A chunk is no longer than the
// shortest feedback delay, so everything a region reads is there, and weights are reused while they are in the cache.
// Threads do not meet.
//
// Wavefront, with few streams of a large brain: at tick k the regions of level l work on token k - l, all of them at
// once, tiles shared among the threads, which meet once a tick. The delay rule sees to it that all reads are of earlier
// ticks.
//
// Results equal the token-by-token order bit for bit either way: a sum's order depends on neither.
// Products with spikes are event-driven: a silent source costs nothing.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "model.h"
#include "philox.h"

namespace neurogen::cpu {
namespace {

constexpr int kChunkRows = 256;  // rows of a chunk: a region's slice of it stays in the L2 cache
constexpr int64_t kReadoutRows = 32;
constexpr int kTeamNeurons = 8192;   // a smaller brain's tick is too short to be worth a barrier
constexpr int kGroupsPerThread = 2;  // groups of streams: a thread that is held up leaves some to the others
constexpr double kRmsEpsilon = 1e-5;

}  // namespace

// A piece of work in the token loop: some streams of every tile, or every stream of some tiles.
struct CpuModel::Share {
  int first_stream, streams;
  int rank, team;  // tiles [n*rank/team, n*(rank+1)/team) of each region
  int first_tile(int tiles) const { return tiles * rank / team; }
  int last_tile(int tiles) const { return tiles * (rank + 1) / team; }
};

bool CpuModel::shares_ticks(int streams) const { return streams < threads_ && neurons_ >= kTeamNeurons; }

void CpuModel::forward() {
  refresh_derived();
  const int chunk = std::min({chunk_limit_, tokens_, std::max(1, kChunkRows / streams_)});
  const int readout_tiles = spec_.dim / kBlock, groups = std::min(streams_, kGroupsPerThread * threads_);
  const int64_t readout_pieces = (rows_ + kReadoutRows - 1) / kReadoutRows;
  const bool together = shares_ticks(streams_);
#pragma omp parallel num_threads(workers(rows_* weights_))
  {
    float* scratch = tile_scratch_ + omp_get_thread_num() * tile_scratch_stride_;
    for (Region& region : regions_) {
#pragma omp for schedule(dynamic) nowait
      for (int tile = 0; tile < region.tiles; ++tile) embed_region(region, tile, scratch);
    }
#pragma omp barrier
    if (together) {
      const Share mine{0, streams_, omp_get_thread_num(), omp_get_num_threads()};
      for (int tick = 0; tick < tokens_ + ranks_ - 1; ++tick) {
        for (int index : sequence_) {
          const int token = tick - regions_[index].rank;
          if (token >= 0 && token < tokens_) run_region(index, mine, token, 1);
        }
#pragma omp barrier
      }
    } else {
#pragma omp for schedule(dynamic)
      for (int group = 0; group < groups; ++group) {
        const int stream = streams_ * group / groups;
        const Share mine{stream, streams_ * (group + 1) / groups - stream, 0, 1};
        for (int first = 0; first < tokens_; first += chunk) {
          for (int index : sequence_) run_region(index, mine, first, std::min(chunk, tokens_ - first));
        }
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < readout_pieces; ++piece) {
      hear_regions(piece * kReadoutRows, std::min(kReadoutRows, rows_ - piece * kReadoutRows));
    }
#pragma omp for schedule(dynamic)
    for (int tile = 0; tile < readout_tiles; ++tile) read_out(tile, scratch);
#pragma omp for schedule(dynamic, 64)
    for (int64_t row = 0; row < rows_; ++row) {
      inverse_rms_[row] = normalize(o_ + row * spec_.dim, broca_ + row * spec_.dim);
    }
  }
}

// Tokens [first, first + count) of this thread's share of a region.
void CpuModel::run_region(int index, const Share& mine, int first, int count) {
  Region& region = regions_[index];
  const int begin = mine.first_tile(region.tiles), end = mine.last_tile(region.tiles);
  feed_region(region, mine, begin, end, first, count);
  for (int token = first; token < first + count; ++token) {
    for (const Projection* p : region.self_delayed) add_delayed(*p, mine, begin, end, token);
    for (int tile = begin; tile < end; ++tile) tick_region(index, mine, tile, token);
  }
}

// d and g of all rows start as bias + the embedding's share. table: scratch [unique, 32].
void CpuModel::embed_region(Region& region, int tile, float* table) {
  const float* bias = region.bias + tile * kBlock;
  bool driven = false, gated = false;
  for (const Projection* p : region.from_embedding) {
    kernels().block_product({table,
                             kBlock,
                             {x_, spec_.dim, kBlock},
                             unique_,
                             p->panels,
                             p->order + int64_t{tile} * p->k,
                             p->cols + int64_t{tile} * p->k,
                             p->k,
                             false});
    float* out = (p->spec->gate ? region.g : region.d) + tile * slab();
    for (int64_t row = 0; row < rows_; ++row, out += kBlock) {
      const float* from = table + int64_t{slot_of_row_[row]} * kBlock;
      for (int j = 0; j < kBlock; ++j) out[j] = p->spec->gate ? from[j] : bias[j] + from[j];
    }
    (p->spec->gate ? gated : driven) = true;
  }
  for (int64_t row = 0; !driven && row < rows_; ++row) {
    std::memcpy(region.d + tile * slab() + row * kBlock, bias, sizeof(float) * kBlock);
  }
  if (region.gated && !gated) std::fill_n(region.g + tile * slab(), slab(), 0.0f);
}

// Everything tiles [begin, end) of a region hear in tokens [first, first + count), but its own recurrence. The
// delayed input is summed where u will be written.
void CpuModel::feed_region(Region& region, const Share& mine, int begin, int end, int first, int count) {
  // Rows of all tokens at once where this thread has every stream, else token by token.
  const bool whole = mine.streams == streams_;
  const int64_t rows = whole ? int64_t{count} * streams_ : mine.streams;
  const auto for_tokens = [&](auto body) {
    for (int token = first; token < first + (whole ? 1 : count); ++token) {
      body(int64_t{token} * streams_ + mine.first_stream);
    }
  };
  for (const auto& [projections, target] : {std::pair(&region.drives, region.d), std::pair(&region.gates, region.g)}) {
    for (const Projection* p : *projections) {
      for_tokens([&, to = target](int64_t row) {
        add_spikes(*p, begin, end, emitted(p->spec->src).from_row(row), rows, {to + row * kBlock, kBlock, slab()});
      });
    }
  }
  for_tokens([&](int64_t row) {
    for (int tile = begin; tile < end; ++tile) {
      const int64_t at = tile * slab() + row * kBlock;
      if (region.gated) kernels().gate_row(region.g + at, rows * kBlock);
      std::fill_n(region.u + at, rows * kBlock, 0.0f);
    }
  });
  for (const Projection* p : region.delayed) {
    for (int token = first; token < first + count; ++token) add_delayed(*p, mine, begin, end, token);
  }
}

// out += W s for tiles [begin, end) of the receiver.
void CpuModel::add_spikes(const Projection& p, int begin, int end, const Source& source, int64_t rows,
                          const Sink& out) const {
  const bool dense = p.k * kBlock == spec_.width(p.spec->src);  // then all tiles hear the same columns
  for (int tile = begin; tile < end; tile += dense ? end - begin : 1) {
    const int64_t block = int64_t{tile} * p.k;
    kernels().spike_product({{out.data + tile * out.tile, out.row, out.tile},
                             source,
                             rows,
                             p.panels + block * kBlockArea,
                             p.cols + block,
                             p.k,
                             dense ? end - begin : 1,
                             true});
  }
}

// The same for a delayed projection, into u's rows of one token.
void CpuModel::add_delayed(const Projection& p, const Share& mine, int begin, int end, int token) {
  const Region& region = regions_[p.spec->dst];
  for_source_rows(p, token, 1, mine.first_stream, mine.streams, [&](int64_t row, int64_t rows, const Source& source) {
    add_spikes(p, begin, end, source, rows, {region.u + row * kBlock, kBlock, slab()});
  });
}

void CpuModel::tick_region(int index, const Share& mine, int tile, int token) {
  Region& region = regions_[index];
  const int offset = tile * kBlock;
  const int64_t row = int64_t{token} * streams_ + mine.first_stream, at = tile * slab() + row * kBlock;
  float* v = region.v + int64_t{mine.first_stream} * region.n + offset;
  float* w = region.w + int64_t{mine.first_stream} * region.n + offset;
  for (int i = 0; has_resets_ && i < mine.streams; ++i) {
    if (!resets_[row + i]) continue;
    std::fill_n(v + int64_t{i} * region.n, kBlock, 0.0f);
    std::fill_n(w + int64_t{i} * region.n, kBlock, 0.0f);
  }
  kernels().neuron_tick({mine.streams, region.alpha + offset, region.rho + offset, region.a + offset, region.b + offset,
                         region.input_gain + offset, v, w, region.n, region.d + at,
                         region.gated ? region.g + at : nullptr, region.u + at, region.u + at, region.s + at,
                         spec_.graded, spec_.max_spike});
  for (int i = 0; train_dropout_ && i < mine.streams; ++i) {
    const int64_t from = at + int64_t{i} * kBlock;
    float mask[kBlock];
    dropout_mask(index, tile, token, mine.first_stream + i, mask);
    for (int j = 0; j < kBlock; ++j) region.dropped[from + j] = region.s[from + j] * mask[j];
  }
}

// Inverted dropout of one tile, stream and token: 0 or 1/(1-p). Keys: philox.h.
void CpuModel::dropout_mask(int region, int tile, int token, int stream, float* mask) const {
  const uint32_t key0 = static_cast<uint32_t>(spec_.seed);
  const uint32_t key1 = static_cast<uint32_t>(spec_.seed >> 32) ^ static_cast<uint32_t>(call_);
  const float kept = static_cast<float>(1.0 / (1.0 - static_cast<double>(spec_.dropout)));
  for (int four = 0; four < kBlock / 4; ++four) {
    const Philox draw = philox(static_cast<uint32_t>(tile * kBlock / 4 + four), static_cast<uint32_t>(token),
                               static_cast<uint32_t>(stream), static_cast<uint32_t>(region), key0, key1);
    for (int i = 0; i < 4; ++i) {
      mask[four * 4 + i] = philox_uniform(draw.word[i]) >= spec_.dropout ? kept : 0.0f;
    }
  }
}

// Summed readout input of some rows, in o.
void CpuModel::hear_regions(int64_t first, int64_t count) {
  float* o = o_ + first * spec_.dim;
  std::fill_n(o, count * spec_.dim, 0.0f);
  for (const Projection* p : readout_) {
    if (p->spec->src == kFromEmbedding) continue;
    add_spikes(*p, 0, p->rows, emitted(p->spec->src).from_row(first), count, {o, spec_.dim, kBlock});
  }
}

// Integrates one tile of it over time, in place, with what the embedding says to Broca. table: scratch [unique, 32].
void CpuModel::read_out(int tile, float* table) {
  const int offset = tile * kBlock;
  const int64_t dim = spec_.dim;
  for (const Projection* p : readout_) {
    if (p->spec->src != kFromEmbedding) continue;
    const int64_t block = int64_t{tile} * p->k;
    kernels().block_product(
        {table, kBlock, {x_, dim, kBlock}, unique_, p->panels, p->order + block, p->cols + block, p->k, false});
    for (int64_t row = 0; row < rows_; ++row) {
      const float* from = table + int64_t{slot_of_row_[row]} * kBlock;
      for (int j = 0; j < kBlock; ++j) o_[row * dim + offset + j] += from[j];
    }
  }
  static const float zeros[kBlock] = {};
  const float* kappa = kappa_ + offset;
  for (int64_t row = 0; row < rows_; ++row) {
    const float* before = row < streams_ ? active_->o() + row * dim + offset : o_ + (row - streams_) * dim + offset;
    if (has_resets_ && resets_[row]) before = zeros;
    float* o = o_ + row * dim + offset;
    for (int j = 0; j < kBlock; ++j) o[j] = kappa[j] * before[j] + (1.0f - kappa[j]) * o[j];
  }
}

// broca = o / sqrt(mean(o^2) + eps); returns the factor.
float CpuModel::normalize(const float* o, float* broca) const {
  double squares = 0;
  for (int j = 0; j < spec_.dim; ++j) squares += static_cast<double>(o[j]) * o[j];
  const float factor = static_cast<float>(1.0 / std::sqrt(squares / spec_.dim + kRmsEpsilon));
  for (int j = 0; j < spec_.dim; ++j) broca[j] = o[j] * factor;
  return factor;
}

// Rows [row, row + count) of a region's array, [count, n].
void CpuModel::copy_rows(const Region& region, const float* array, int64_t row, int64_t count, float* out) const {
  for (int tile = 0; tile < region.tiles; ++tile) {
    const float* from = array + tile * slab() + row * kBlock;
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(out + i * region.n + tile * kBlock, from + i * kBlock, sizeof(float) * kBlock);
    }
  }
}

void CpuModel::recorded(int index, float* u, float* s, float* gate) const {
  const Region& region = regions_[index];
  copy_rows(region, region.u, 0, rows_, u);
  copy_rows(region, region.s, 0, rows_, s);
  if (gate) copy_rows(region, region.g, 0, rows_, gate);
}

// Whether the state that the call leaves is fit to be kept: no NaN, no infinity, nothing above 1e19.
bool CpuModel::staged_finite() const {
  double squares = kernels().sum_of_squares(o_ + (rows_ - streams_) * spec_.dim, int64_t{streams_} * spec_.dim);
  for (const Region& region : regions_) {
    squares += kernels().sum_of_squares(region.v, int64_t{streams_} * region.n);
    squares += kernels().sum_of_squares(region.w, int64_t{streams_} * region.n);
  }
  return std::isfinite(squares);
}

// The staged state becomes the state of the call's streams.
void CpuModel::commit() {
  for (size_t r = 0; r < regions_.size(); ++r) {
    const Region& region = regions_[r];
    const int id = static_cast<int>(r);
    const int64_t cells = int64_t{streams_} * region.n;
    std::memcpy(active_->v(id), region.v, sizeof(float) * cells);
    std::memcpy(active_->w(id), region.w, sizeof(float) * cells);
    for (int k = region.history - 1; k >= 0; --k) {
      float* to = active_->spikes(id) + k * cells;
      if (k < tokens_) {
        copy_rows(region, region.s, rows_ - int64_t{k + 1} * streams_, streams_, to);
      } else {
        std::memcpy(to, active_->spikes(id) + (k - tokens_) * cells, sizeof(float) * cells);
      }
      for (int stream = 0; has_resets_ && stream < streams_; ++stream) {
        if (age_[rows_ - streams_ + stream] < k) std::fill_n(to + int64_t{stream} * region.n, region.n, 0.0f);
      }
    }
  }
  std::memcpy(active_->o(), o_ + (rows_ - streams_) * spec_.dim, sizeof(float) * streams_ * spec_.dim);
  held_ = false;
}

}  // namespace neurogen::cpu
