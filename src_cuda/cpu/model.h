// The CPU model. One call (calls.cpp) walks: tokens.cpp (staging) -> forward.cpp (regions, readout) -> decoder.cpp
// (loss)
// -> backward.cpp (batched e-prop) -> optimizer.cpp (AdamW) -> forward.cpp commit().
//
// Threads: OpenMP owns them. Work is cut into fixed tiles (32 neurons, slices of the vocabulary, rows) whose
// sums never cross a tile, so results do not depend on the number of threads. BLAS is called from inside the
// tiles and must run at one thread; the binding holds it there (neurogen_cy/threads.py).
#pragma once

#include <memory>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "neurogen/model.h"
#include "state.h"

namespace neurogen::cpu {

constexpr int64_t kParallelWork = 3'000'000;  // multiply-adds, about 0.1 ms
constexpr int64_t kUpdatePiece = 1 << 15;     // values of one unit of the optimizer's work

// Weights of one projection: the stored blocks, their transposes (the forward product reads 32 receivers at
// once), and the same blocks listed by source column (the backward product reads 32 sources at once).
struct Projection {
  const ProjectionSpec* spec = nullptr;
  int rows = 0, k = 0;  // rows of blocks, blocks per row
  float *blocks = nullptr, *gradient = nullptr, *panels = nullptr;
  const int32_t* cols = nullptr;    // [rows, k]
  int32_t* order = nullptr;         // [rows * k] = 0, 1, 2, ...: block numbers of a row are consecutive
  int32_t* by_col_start = nullptr;  // [width/32 + 1]
  int32_t* by_col_block = nullptr;  // [rows * k] block numbers, grouped by column
  int32_t* by_col_row = nullptr;    // [rows * k] their block rows
};

struct Region {
  int n = 0, tiles = 0, history = 0;
  int rank = 0;  // its level, gaps closed
  bool gated = false;
  float *bias = nullptr, *alpha = nullptr, *rho = nullptr, *a = nullptr, *b = nullptr;  // [n]
  float *dbias = nullptr, *input_gain = nullptr, *spike_count = nullptr;                // [n]
  std::vector<Projection*> from_embedding, drives, gates;                               // delay 0, into this region
  std::vector<Projection*> delayed, self_delayed;  // into this region, from others / from itself
  std::vector<Projection*> listeners;              // delay 0, out of this region
  std::vector<Projection*> later_listeners;        // delayed, out of this region
  // Saved by forward, [tiles, M, 32] (see Source in kernels.h). backward turns d into dg and g into dd where the region
  // is gated.
  float *u = nullptr, *s = nullptr, *dropped = nullptr, *d = nullptr, *g = nullptr;
  float* delta = nullptr;                                   // dE/dI; shares d where the region has no gate
  float *v = nullptr, *w = nullptr;                         // [S, n], staged: committed only on success
  float* error_drive() const { return gated ? g : delta; }  // after the adjoint walk
  float* error_gate() const { return d; }
};

class CpuModel final : public Model {
 public:
  CpuModel(const ModelSpec& spec, Sgemm sgemm);

  static MemoryPlan plan(const ModelSpec& spec);

  std::vector<Tensor>& tensors() override { return tensors_; }
  void read(const void* from, void* host, size_t bytes) override;
  void write(void* to, const void* host, size_t bytes) override;
  void parameters_written() override { derived_stale_ = true; }
  void gradients_exposed() override { scan_embedding_rows_ = true; }
  State& state() override { return *state_; }
  std::unique_ptr<State> new_state(int streams) override;

  void train(const Tokens&, const Targets&, const AdamW&, uint64_t call, StepStats*) override;
  void backward(const Tokens&, const Targets&, uint64_t call, bool accumulate, StepStats*) override;
  void update(const AdamW&, StepStats*) override;
  void advance(State& state, const Tokens&, float* broca) override;
  double evaluate(State& state, const Tokens&, const Input& targets) override;
  int generate(State& state, float* broca, const Sampling&, int count, int32_t* ids) override;
  void step(const Input& x, bool hold) override;
  void learn_held(const int32_t* ids, const Targets&, const AdamW&, StepStats*) override;
  void broca_output(const Output& out) override;
  void encode(const Input& ids, int64_t count, const Output& out) override;
  void logits(const Input& broca, int64_t rows, const Output& out) override;
  void sample(const Input& broca, int64_t rows, const Sampling&, const Output& ids) override;

  double rate(int region) const override;
  void recorded(int region, float* u, float* s, float* gate) const override;
  uintptr_t stream() const override { return 0; }
  void wait_for(uintptr_t stream) override;
  void hand_over(uintptr_t stream) override { wait_for(stream); }
  void rest() override {}
  uint64_t mark() override { return ++marks_; }
  uint64_t passed() override { return marks_; }
  Place place(const void*) const override;
  Counters counters() const override { return counters_; }
  ExecutionPlan execution_plan() const override;

 private:
  explicit CpuModel(const ModelSpec& spec);  // measures only

  // model.cpp
  void connect();
  void lay_out();
  void lay_out_parameters();
  void lay_out_workspace();
  void index_blocks(Projection& projection);
  void refresh_derived();
  float* parameter(const std::string& key, std::vector<int64_t> shape, bool trainable, bool decay);

  // Threads for a job of so many multiply-adds: one where waking the others would take longer than the job.
  int workers(int64_t multiply_adds) const { return multiply_adds < kParallelWork ? 1 : threads_; }

  // tokens.cpp
  void stage(State& state, const Tokens& tokens);
  void stage_streams(CpuState& state, int streams, int tokens, const uint8_t* resets);
  void stage_ids(const int32_t* ids);
  void stage_rows(const float* x);
  void stage_targets(const Targets& targets);

  // forward.cpp
  bool shares_ticks(int streams) const;  // which of the two schedules calls of so many streams take
  void forward();
  void embed_region(Region& region, int tile, float* table);
  struct Share;
  void run_region(int index, const Share& mine, int first, int count);
  void feed_region(Region& region, const Share& mine, int begin, int end, int first, int count);
  void tick_region(int index, const Share& mine, int tile, int token);
  void add_spikes(const Projection& p, int begin, int end, const Source& source, int64_t rows, const Sink& out) const;
  void add_delayed(const Projection& p, const Share& mine, int begin, int end, int token);
  void dropout_mask(int region, int tile, int token, int stream, float* mask) const;
  void hear_regions(int64_t first, int64_t count);
  void read_out(int tile, float* table);
  float normalize(const float* o, float* broca) const;
  void copy_rows(const Region& region, const float* array, int64_t row, int64_t count, float* out) const;
  bool staged_finite() const;
  void commit();
  int64_t slab() const { return rows_ * kBlock; }  // one tile of a region in all rows of the call
  // Spikes as delay-0 receivers and the readout see them: through the dropout mask.
  Source emitted(int region) const {
    return {train_dropout_ ? regions_[region].dropped : regions_[region].s, kBlock, slab()};
  }
  template <class Body>
  void for_source_rows(const Projection& p, int token, int tokens, int stream, int streams, Body body) const;

  // decoder.cpp
  int vocab_slices() const { return static_cast<int>((spec_.vocab + vocab_slice_ - 1) / vocab_slice_); }
  void logits_slice(const float* broca, int64_t rows, int slice, float* out);
  void logits_of(const float* broca, int64_t rows, float* out);
  void decoder_gradient_slice(int64_t first, int64_t rows, int slice, bool add);
  void broca_gradient_slice(int64_t first, int64_t rows, int slice);
  bool score(bool want_gradient, bool accumulate);
  bool losses_finite(int64_t first, int64_t rows) const;
  void summarize(const Targets& targets, StepStats* stats);

  // backward.cpp
  void learn(bool accumulate);
  void unnormalize_row(int64_t row);
  void readout_error(int tile, float* carry);
  void learn_tile(int index, int tile, float* scratch, bool accumulate);
  void pull(const Projection& p, int col, int64_t rows, float* out, int64_t ldo, bool add) const;
  float* error_of(const Projection& p) const;
  void embedding_weights(const Projection& p, int row, bool accumulate);
  void source_weights(int index, int tile, bool accumulate);
  void segment(float* error, float* table) const;
  void clear_embedding_gradient();
  void embedding_gradient(int tile);
  void count_spikes(Region& region, int tile) const;
  double homeostasis() const;

  // optimizer.cpp
  void find_embedding_rows();
  template <class Body>
  void for_pieces(Body body);

  // calls.cpp
  void run(const Targets& targets, uint64_t call, bool accumulate, StepStats* stats);
  void commit_finite();
  void score_and_learn(const Targets& targets, bool accumulate, StepStats* stats);

  ModelSpec spec_;
  Sgemm sgemm_ = nullptr;
  Arena arena_;
  Counters counters_;
  std::vector<Tensor> tensors_;
  std::vector<Region> regions_;
  std::vector<Projection> projections_;
  std::vector<Projection*> readout_;  // into broca_out
  std::vector<int> sequence_;         // regions in order of level
  int64_t neurons_ = 0;               // N
  int64_t weights_ = 0;               // trainable values but the embedding
  int ranks_ = 0;                     // different levels
  int chunk_limit_ = 0;               // tokens one region may run ahead of the others
  std::unique_ptr<CpuState> state_;
  uint64_t marks_ = 0;
  int threads_ = 1;
  bool derived_stale_ = true, scan_embedding_rows_ = false;

  float *embedding_ = nullptr, *d_embedding_ = nullptr;        // [V, D]
  float *decoder_ = nullptr, *d_decoder_ = nullptr;            // [V, D]; the embedding's where tied
  float *decoder_bias_ = nullptr, *d_decoder_bias_ = nullptr;  // [V]
  float* kappa_ = nullptr;                                     // [D]

  // The call under way: S, T, M = S*T and its staged inputs, rows time-major.
  CpuState* active_ = nullptr;
  int streams_ = 0, tokens_ = 0, unique_ = 0;
  int64_t capacity_ = 0, rows_ = 0;
  bool train_dropout_ = false, held_ = false, has_resets_ = false;
  uint64_t call_ = 0;
  int32_t* slot_of_row_ = nullptr;   // [M] row of x_ that feeds this row
  int32_t* slot_of_id_ = nullptr;    // [V], -1 outside a call
  int32_t* unique_ids_ = nullptr;    // [unique]
  float* x_ = nullptr;               // [unique, D] distinct embedding rows of the call
  float* dx_ = nullptr;              // [unique, D]
  uint8_t* resets_ = nullptr;        // [M]
  int32_t* age_ = nullptr;           // [M] tokens since the stream's last reset in this call, large without one
  int32_t* target_ids_ = nullptr;    // [M]
  float* target_weights_ = nullptr;  // [M]
  double divisor_ = 0.0;
  double* row_loss_ = nullptr;   // [M]
  int32_t* row_best_ = nullptr;  // [M]

  float *o_ = nullptr, *broca_ = nullptr, *inverse_rms_ = nullptr, *d_broca_ = nullptr;  // [M, D] ([M])
  float* readout_error_ = nullptr;  // dE/d(summed readout input), [D/32, M, 32]
  float* logits_ = nullptr;         // [logit_rows, V]
  int64_t logit_rows_ = 0, vocab_slice_ = 0, dim_slice_ = 0;
  float* tile_scratch_ = nullptr;  // [threads, M + 2S, 32]
  int64_t tile_scratch_stride_ = 0;
  int32_t* sort_ids_ = nullptr;      // [threads, V] for top-k and top-p
  uint8_t* row_touched_ = nullptr;   // [V] embedding rows with a gradient
  int32_t* touched_rows_ = nullptr;  // [V] their numbers, ascending
  int64_t touched_count_ = 0;
  int64_t piece_count_ = 0;
  double* piece_norms_ = nullptr;  // sums of squares, a fixed piece of the gradients each
};

// Calls body(row, rows, source) for the rows of some tokens and streams that hear a delayed projection: source
// holds the spikes `delay` tokens before `row`. Rows whose source lies before their stream's reset are left out.
// Several tokens at once only with all streams.
template <class Body>
void CpuModel::for_source_rows(const Projection& p, int token, int tokens, int stream, int streams, Body body) const {
  const int delay = p.spec->delay, n = regions_[p.spec->src].n;
  for (const int last = token + tokens; token < last;) {
    const bool carried = token < delay;  // spoken in an earlier call
    const int some = carried ? 1 : last - token;
    const Source spikes =
        carried ? Source{active_->spikes(p.spec->src) + int64_t{delay - 1 - token} * streams_ * n, n, kBlock}
                : Source{regions_[p.spec->src].s + int64_t{token - delay} * streams_ * kBlock, kBlock, slab()};
    const int64_t begin = int64_t{token} * streams_ + stream;
    const int64_t end = begin + (some == 1 ? streams : int64_t{some} * streams_);
    for (int64_t row = begin; row < end;) {
      int64_t stop = end;
      if (has_resets_) {
        while (row < end && age_[row] < delay) ++row;
        for (stop = row; stop < end && age_[stop] >= delay;) ++stop;
      }
      if (stop > row) body(row, stop - row, spikes.from_row(row - begin + stream));
      row = stop;
    }
    token += some;
  }
}

// Called once or more: from then on a forked child can compute, with as many threads as its parent (fork.cpp).
void prepare_for_forks();

}  // namespace neurogen::cpu
