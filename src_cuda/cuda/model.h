// The CUDA model. One call (calls.cpp) walks: tokens.cu (staging) -> forward.cu (embedding products, the persistent
// brain launch, readout) -> decoder.cu (loss) -> backward.cu (batched e-prop) -> weights.cu and embedding.cu
// (gradients) -> optimizer.cu (AdamW) -> tokens.cu commit(), all on one stream, and waits once: finish(), or for what
// optimizer.cu decides (score_and_learn).
//
// Layout: what a call keeps per neuron lies in panels of 32 neurons, [n/32][M + kSpareRows][32] in Real (numbers.cuh),
// M = T*S rows, row = t*S + b; so do the embedding's rows and the readout's errors. A tile of 32 neurons is the unit of
// work everywhere, and its rows are contiguous. Weights are 32 x 32 blocks, numbered across all projections;
// block_product.cuh says how a warp multiplies by one.
// Decisions that depend on results (is the loss finite? is an id in range?) are flags in `Verdict`, device memory: the
// optimizer and commit() look there, the host reads them at the end of the call.
// Sums have one order for given sizes: no float atomics, and no order that depends on how streams are grouped.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "arena.h"
#include "connectome.h"
#include "cublas.h"
#include "dense_brain.h"
#include "device.h"
#include "neurogen/model.h"
#include "register_brain.h"
#include "state.h"

namespace neurogen::cuda {

struct BrainCall;
struct Dropout;

// Operands of the decoder's products in 8 bits (eight_bits.cuh).
enum Operand8 { kDecoder8, kBroca8, kErrors8, kOperands8 };
struct alignas(16) EightScale {
  float back, up;  // what the library multiplies by, and its inverse
  unsigned top;    // largest magnitude, as the bits of a float; of errors: of the rows' weights
};

inline bool on_host(const Output& out) { return out.data && !out.device; }

// How one brain launch runs its streams.
struct BrainShape {
  int group, steps, columns;  // streams at a time, of a warp in units of kRows, of a lane in each of those
  int grid, slots;            // blocks of threads, resident blocks of weights
  double rounds;              // items of a warp in a tick
  bool local;                 // v, w and counts stay in shared memory
  size_t shared_bytes;
};

constexpr int kUnit = kBlockArea;     // values that the optimizer takes at a time
constexpr int kBrainThreads = 512;    // of a block of the brain launch
constexpr size_t kWorkBytes = 73984;  // of shared memory, for what the warps of the brain launch work on
constexpr size_t kNearBytes = 768;    // of shared memory: constants and biases of a tile
constexpr size_t kMostNear = 16384;   // ... of all tiles of a share, where that is not too much
constexpr int kSpareRows = 16;        // before and behind every panel: readable, of no meaning
constexpr int kNormBlocks = 1056;     // blocks that share the gradient's norm: fixed, so that its bits are
constexpr int kSegmentRows = 32;      // sorted rows that a block of threads adds up (embedding.cu)
constexpr int kTokensAtOnce = 8;      // of generation that one launch of a graph makes, where so many are wanted
constexpr int kTokensKept = 64;       // ... that drawn_ has room for at least, before the host waits
constexpr size_t kBlasWorkspace = size_t{32} << 20;

// An untied embedding, rows of which without a gradient are left alone.
struct LazyRows {
  float *weights, *gradients, *moment1, *moment2;  // [V, D]
  const uint8_t* touched;                          // null = no lazy rows
  int64_t vocab, dim;
};

// What the host learns of a call, and what later kernels of the call decide by.
struct Verdict {
  double divisor, loss, homeostasis, squares;  // squares: of the gradient's norm
  long long correct, tokens;
  int bad_id, bad_weight;  // 1 + position in [S, T] of a wrong value in a device array (the last one), 0 = none
  int state_not_finite, loss_not_finite;
  int faulty;  // there are Faults that the host has not heard of
  int ok;      // nothing above is wrong
  int heard;   // tokens of a generation that the state took in
};

// What went wrong in calls that did not wait; 0 = nothing. Positions: 1 + that of a wrong value (the last one).
struct Faults {
  unsigned long long bad_id, bad_x, bad_broca;  // of encode(), step() and sample()
  unsigned long long state_not_finite;
};

// Sampling arguments with the position of the next draw, in device memory so that a captured graph reads them.
struct Draw {
  Sampling sampling;
  int64_t kept;  // draws of every stream kept in drawn_
};

class CudaModel final : public Model {
 public:
  explicit CudaModel(const ModelSpec& spec);
  ~CudaModel() override;

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

  double rate(int region) const override { return rates_[region]; }
  void recorded(int region, float* u, float* s, float* gate) const override;
  uintptr_t stream() const override { return reinterpret_cast<uintptr_t>(stream_.get()); }
  void rest() override;
  void wait_for(uintptr_t stream) override;
  void hand_over(uintptr_t stream) override;
  uint64_t mark() override;
  uint64_t passed() override;
  Place place(const void* memory) const override;
  Counters counters() const override { return counters_; }
  ExecutionPlan execution_plan() const override;

 private:
  struct MeasureOnly {};
  CudaModel(const ModelSpec& spec, MeasureOnly);

  // model.cpp: sizes and memory
  void connect();
  void lay_out();
  void lay_out_parameters();
  void lay_out_workspace();
  void lay_out_connectome();
  float* parameter(const std::string& key, std::vector<int64_t> shape, bool trainable, bool decay);
  size_t real_size() const { return spec_.bf16 ? 2 : 4; }
  void* take_real(const char* part, int64_t count) { return arena_.take<char>(part, count * real_size()); }
  int64_t panel_values() const { return (capacity_ + kSpareRows) * kBlock; }
  int64_t drawn_room() const { return std::max(capacity_, int64_t{kTokensKept} * spec_.streams); }
  void* take_panels(const char* part, int64_t width) {
    char* at = static_cast<char*>(take_real(part, width / kBlock * panel_values() + kSpareRows * kBlock));
    return at + kSpareRows * kBlock * real_size();
  }

  // connectome.cpp: the lists of terms, tiles and jobs
  bool wide(const ProjectionSpec& p, int64_t row, int64_t col) const;
  const void* error_of(const ProjectionSpec& p) const;
  const void* heard_by(const ProjectionSpec& p) const;
  void build_lists();
  BrainTile brain_tile(const TileName& name) const;
  void divide_brain();
  void plan_launch(BrainPlan& plan, const std::vector<TileName>& names,
                   const std::vector<std::array<std::vector<Term>, 3>>& brain);
  template <class T>
  void upload(T* to, const std::vector<T>& from) {
    if (!from.empty()) NG_CUDA(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }

  // dense_plan.cpp and dense_brain.cu: the brain launch of dense connectomes
  void lay_out_dense(int64_t terms);
  std::vector<DenseSource> dense_sources(const TileName& name, const std::array<std::vector<Term>, kSums>& terms,
                                         const std::vector<size_t>& work) const;
  void plan_dense(const std::vector<TileName>& names, const std::vector<std::array<std::vector<Term>, kSums>>& brain,
                  const std::vector<std::vector<int>>& owned);
  size_t dense_bytes(int steps, bool with_weights) const;
  void describe_dense(const DenseShape& shape, ExecutionPlan& plan) const;
  DenseShape dense_shape(int streams) const;
  bool run_dense_brain();  // false: not a call for it

  // register_brain.cu: the brain launches of sparse connectomes where a tile has a warp
  RegisterShape register_shape(const BrainPlan& plan, int streams) const;
  void describe_registers(const RegisterShape& shape, const BrainPlan& plan, ExecutionPlan& out) const;
  RegisterShape call_shape(const BrainPlan& plan) const;  // of this call
  bool run_register_brain(const BrainPlan& plan);         // false: not a call for it

  // tokens.cu
  void begin(CudaState& state, int streams, int tokens);
  void set_verdict(bool ok, bool state_not_finite);
  const void* arrive(const Input& input, size_t bytes);
  void stage(CudaState& state, const Tokens& tokens);
  void stage_ids(const Input& ids);
  void stage_targets(const Targets& targets);
  void gather_rows();  // x_ = embedding rows of the staged ids
  void gather_rows(const float* table, const int32_t* ids);
  void summarize(const Output& predictions);  // Verdict: loss, rates, homeostasis, ok
  void judge(bool with_losses);               // Verdict of a call that does not learn
  // Where ok. judging: gives the verdict itself, as judge(false). drawn: a token of generation; the next draw is
  // another one, and hush() is done for it.
  void commit(bool judging = false, bool drawn = false);
  const Verdict& finish(size_t prediction_bytes);  // one copy back, the one wait, errors of device arrays
  void post(size_t prediction_bytes);              // ... the copy back
  const Verdict& heard();                          // ... the errors
  void report(const Targets& targets, StepStats* stats);
  void set_draw(const Sampling& sampling);

  // callers.cu: the caller's device arrays where they are, and errors of calls that do not wait
  void stage_rows(const Input& x);  // x_ = the caller's rows
  void encode_rows(const void* ids, int itemsize, int64_t count, float* out);
  void check_ids(const Input& ids, int64_t count);
  void check_rows(const Input& rows, int64_t count, unsigned long long* fault);
  void take(void* to, const Input& from, size_t offset, size_t bytes);
  void give(const Output& to, size_t offset, const void* from, size_t bytes);
  Faults* faults();       // where the launches of this call may leave one
  void remember_state();  // Faults: the state that this step would have left was not finite
  void settle();          // wait(), and throws what calls that did not wait have left

  // hush.cu
  void hush(bool by_sign = false);  // before the brain launch: no spike of the call is written yet
  void hush_rows(int64_t first, int64_t rows, uint32_t silence, bool carried);
  void note_spikes(int64_t rows, SpikeSign sign);

  // forward.cu
  void forward(bool hushed = false);
  BrainCall brain_call(const BrainPlan& plan) const;
  void run_brain(bool hushed);
  void launch_brain(const BrainPlan& plan);
  const BrainPlan& brain_plan(int streams) const;
  BrainShape shape_of(const BrainPlan& plan, int group, int tokens) const;
  BrainShape brain_shape(const BrainPlan& plan, int streams, int tokens) const;
  void count_spikes();
  Dropout dropout() const;
  void normalize_rows(float* o, int64_t rows, float* broca, void* broca_real, float* inverse_rms);
  template <class Input>
  void normalize_rows(float* o, int64_t rows, float* broca, void* broca_real, float* inverse_rms, Input input,
                      bool early = false);

  // decoder.cu
  void lay_out_decoder();
  int walk_threads() const;
  void score(bool want_gradient, bool accumulate);  // row_loss_, row_best_; with the gradient d_broca_, dW, dc
  // float [rows, V]; speak: of a token of generation, for draw(), which adds the bias where it spreads.
  void logits_on_device(const void* broca_real, int64_t rows, float* out, bool speak = false);
  void to_real(const float* from, int64_t count, void* to);

  // eight_bits.cu: the products of score() in 8 bits, where it learns
  void require_eight() const;  // throws where the device cannot
  void lay_out_eight();
  void begin_eight();
  template <class From>
  void turn(Operand8 which, const From* from, int64_t ld, int64_t rows, int64_t columns, uint8_t* straight,
            uint8_t* turned, int64_t turned_rows);
  void logits_of_eight(int64_t first, int64_t rows);
  void learn_of_eight(int64_t first, int64_t rows, bool as_bytes, bool add);

  // sampling.cu
  void draw(const float* logits, int64_t rows, int64_t first_row, int32_t* ids, bool speak = false);
  bool draw_spreads();  // whether several blocks of threads draw a row
  bool code_of_90();    // whether what runs was compiled for 9.0 or later
  float* sampling_logits() const { return static_cast<float*>(logits_); }
  int64_t sampling_rows() const {  // float rows that fit there
    return logit_rows_ * logit_ld_ * static_cast<int64_t>(real_size()) /
           (static_cast<int64_t>(sizeof(float)) * spec_.vocab);
  }

  // backward.cu
  void learn(bool accumulate);
  void readout_errors();
  void learn_level(int level);

  // weights.cu
  void weight_gradients(bool accumulate);
  void bias_gradients(bool accumulate);

  // embedding.cu
  void clear_embedding_gradient();
  void embedding_gradient(bool accumulate);
  int embedding_ranges() const;
  void credit_embedding(int ranges, bool accumulate);
  size_t sort_bytes() const;
  void check_sort_bytes() const;

  // optimizer.cu
  void refresh_derived();
  LazyRows lazy_rows() const;
  void decide_update();                   // norm and decision
  void launch_update(const AdamW& adam);  // AdamW, derived copies

  // calls.cpp
  void run(const Tokens& tokens, const Targets& targets, uint64_t call, const AdamW* adam, bool accumulate,
           StepStats* stats);
  void score_and_learn(const Targets& targets, const AdamW* adam, bool accumulate, StepStats* stats);
  template <class Body>
  void for_logits(const Input& broca, int64_t rows, Body body);
  void speak();
  bool starts_early();  // whether kernels of generation do (dependent.cuh)
  void capture(int tokens, GraphExec& graph);

  void wait();
  void await_done();                                        // once done_ was recorded
  void launched(int launches = 1);                          // counts them and checks the last
  void copy_in(void* to, const void* from, size_t bytes);   // from pinned memory
  void copy_out(void* to, const void* from, size_t bytes);  // to pinned memory
  char* pinned(size_t bytes);                               // staging of this call; throws when it would not fit

  ModelSpec spec_;
  Arena arena_;
  DeviceMemory memory_;
  PinnedMemory pinned_;
  size_t pinned_size_ = 0, pinned_used_ = 0, inbox_size_ = 0, outbox_size_ = 0;
  const char* result_ = nullptr;  // the outbox in pinned memory, after post()
  Stream stream_;
  Event done_, arrived_, given_;
  std::deque<Event> marks_;   // not yet passed, the oldest first
  std::vector<Event> spare_;  // to mark with
  uint64_t marked_ = 0, passed_ = 0;
  // Generation, captured: one token, and kTokensAtOnce; and what they were captured for.
  GraphExec graph_, graph_of_many_;
  std::tuple<const void*, const void*, int, bool> graphs_of_;
  mutable Counters counters_;
  std::unique_ptr<Cublas> cublas_;
  std::vector<Tensor> tensors_;
  std::unique_ptr<CudaState> state_;
  bool derived_stale_ = true, scan_embedding_rows_ = false;

  // Connectome (host side).
  std::vector<RegionView> regions_;  // in the order of the spec
  std::vector<int> sequence_,
      level_begin_;                   // regions by level; tiles of level i: [level_begin_[i], level_begin_[i + 1])
  std::vector<int64_t> first_block_;  // of every projection, and the total
  std::vector<int> history_;
  int tiles_ = 0, levels_ = 0;
  int64_t total_neurons() const { return int64_t{tiles_} * kBlock; }
  int64_t blocks_ = 0;
  // The same on the device.
  RegionView* region_views_ = nullptr;
  TileName* tile_names_ = nullptr;                            // [tiles]
  ProductList embed_drive_, embed_gate_, pull_, embed_pull_;  // receivers: tiles, tiles, tiles, D/32
  ProductList hear_;                                          // receivers: D/32
  BlockGroup* groups_ = nullptr;
  Rectangle* rectangles_ = nullptr;
  int64_t group_count_ = 0, rectangle_count_ = 0;
  int64_t embedded_groups_ = 0, embedded_terms_ = 0;  // the last groups: what hears the embedding; its blocks
  int most_embedded_ = 0;                             // of 32 values
  bool embedded_in_rectangles_ = false;               // some of their gradients are
  std::vector<int> most_pulled_;                      // of every level: terms of pull_ of a tile, at most
  // Brain launch: base_grid_ shares, each worked on by up to replicas_ blocks of threads that divide the streams.
  std::string brain_wanted_, credit_wanted_;  // NEUROGEN_BRAIN, NEUROGEN_CREDIT
  int processors_ = 0, base_grid_ = 0, replicas_ = 0, stream_group_ = 0;
  size_t shared_limit_ = 0;
  BrainPlan outside_, inside_;  // the embedding's blocks are multiplied outside the launch, inside it
  // The same for dense connectomes; null for others.
  DenseTile* dense_tiles_ = nullptr;
  DenseSource* dense_sources_ = nullptr;
  DenseShare* dense_shares_ = nullptr;
  int32_t* dense_blocks_ = nullptr;          // share by share
  void* dense_weights_ = nullptr;            // room for the kernel's copy of what it streams
  std::vector<DenseShare> shares_of_dense_;  // on the host

  // Parameters: [blocks | decoder | decoder bias | region biases | embedding], each padded to kUnit values, so that one
  // launch updates them all; gradients and moments have the same offsets.
  float *weights_ = nullptr, *gradients_ = nullptr, *moment1_ = nullptr, *moment2_ = nullptr;
  int64_t units_ = 0;  // without an untied embedding
  int64_t decoder_unit_ = 0, decoder_units_ = 0, decay_units_ = 0;
  float *embedding_ = nullptr, *d_embedding_ = nullptr;            // [V, D]
  float *decoder_ = nullptr, *d_decoder_ = nullptr;                // [V, D]; the embedding's where tied
  float *decoder_bias_ = nullptr, *d_decoder_bias_ = nullptr;      // [V]
  float* kappa_ = nullptr;                                         // [D]
  void *forward_blocks_ = nullptr, *transposed_blocks_ = nullptr;  // Real [blocks, 32, 32], see block_product.cuh
  void* decoder_real_ = nullptr;                                   // Real [V, D]
  uint8_t* row_touched_ = nullptr;                                 // [V] embedding rows with a gradient

  // The call under way.
  CudaState* active_ = nullptr;
  int call_streams_ = 0, call_tokens_ = 0;
  int64_t capacity_ = 0, rows_ = 0;
  bool train_dropout_ = false, held_ = false, held_sound_ = false, has_resets_ = false;
  uint64_t call_ = 0;
  Verdict* verdict_ = nullptr;  // the outbox: verdict, rates, predictions
  Faults* faults_ = nullptr;
  bool unheard_ = false;                            // there may be faults
  double* rate_sums_ = nullptr;                     // [regions] spikes of the call per neuron and token
  int32_t* predictions_ = nullptr;                  // [S, T]
  double* region_part_ = nullptr;                   // [regions]
  int* spike_counts_ = nullptr;                     // [N]
  char* inbox_ = nullptr;                           // host arrays of the call, as the user has them
  int32_t *ids_ = nullptr, *target_ids_ = nullptr;  // [M]
  float* target_weights_ = nullptr;                 // [M]
  uint8_t* resets_ = nullptr;                       // [M]
  int32_t* age_ = nullptr;  // [M] tokens since the stream's last reset in this call, large without one
  std::vector<double> rates_;
  std::vector<SignedRows> signs_;                           // of the spikes that panels hold, from the first row on
  std::vector<SignedRows> signs_before_;                    // hush()'s: kept, so that a call allocates nothing
  bool negative_ = false, output_hears_embedding_ = false;  // spikes of this call; there is such a projection

  void* x_ = nullptr;              // Real, panels
  float* dx_ = nullptr;            // [M, D]
  float* o_ = nullptr;             // [M, D] summed readout input, then o in place
  void* broca_real_ = nullptr;     // Real [M, D]
  float* inverse_rms_ = nullptr;   // [M]
  float* d_broca_ = nullptr;       // [M, D] dE/d broca, then dE/d o in place; broca as float on its way to the caller
  void* readout_error_ = nullptr;  // Real, panels: dE/d(summed readout input)
  float* row_loss_ = nullptr;      // [M]
  int32_t* row_best_ = nullptr;    // [M]

  // Decoder.
  int64_t logit_rows_ = 0, logit_ld_ = 0;
  void* logits_ = nullptr;  // Real [logit_rows, logit_ld] (score), or float [logit_rows/2, V] (sampling)
  void* blas_workspace_ = nullptr;
  float* bias_part_ = nullptr;     // scratch of dc: rows of logit_ld
  struct {                         // sizes rounded up to 16: V, M of a chunk; turned: [columns, rows]
    EightScale* scales = nullptr;  // [kOperands8]
    uint8_t *decoder = nullptr, *broca = nullptr, *errors = nullptr;  // [V, D], [M, D], [M, V]
    uint8_t *decoder_turned = nullptr, *broca_turned = nullptr, *errors_turned = nullptr;
  } eight_;

  // Embedding gradient.
  uint32_t *sort_keys_ = nullptr, *sorted_ids_ = nullptr, *sort_rows_ = nullptr, *sorted_rows_ = nullptr;  // [M]
  void* sort_scratch_ = nullptr;
  float *head_part_ = nullptr, *tail_part_ = nullptr;  // [M / kSegmentRows, D]

  double* norm_part_ = nullptr;
  Draw* draw_ = nullptr;
  int32_t* drawn_ = nullptr;     // tokens of generation, at least kTokensKept of every stream
  bool draws_from_all_ = false;  // neither top_k nor top_p leaves anything out
  int code_of_90_ = -1;          // code_of_90(), once that is known
};

}  // namespace neurogen::cuda
