// The public calls of the CUDA model: which of the stages each one runs, and when state is committed. Every call ends
// in one wait; what could go wrong on the device is known then, and nothing was changed if it did.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "model.h"
#include "ranges.h"

namespace neurogen::cuda {

namespace {

void require_finite(const Verdict& verdict) {
  if (!verdict.ok) throw std::overflow_error("neuron state: expected finite values, got NaN or infinity");
}

size_t prediction_bytes(const Targets& targets, int64_t rows) {
  return on_host(targets.predictions) ? sizeof(int32_t) * static_cast<size_t>(rows) : 0;
}

}  // namespace

// Loss, gradients and (with adam) the update of the forward pass that was just made. A gradient that is added to must
// not take up a bad call's share, so there the verdict is awaited before any gradient is written.
void CudaModel::score_and_learn(const Targets& targets, const AdamW* adam, bool accumulate, StepStats* stats) {
  stage_targets(targets);
  if (accumulate) {
    score(false, false);
    summarize({});
    if (!finish(0).ok) {
      report({}, stats);
      return;
    }
  }
  if (!accumulate) clear_embedding_gradient();
  in_range("decoder", [&] { score(true, accumulate); });
  summarize(targets.predictions);
  in_range("backward", [&] { learn(accumulate); });
  // What the host waits for is known before the update: so the next call is prepared while that is still under way.
  const bool awaited = !adam || adam->awaited || unheard_;
  if (adam) in_range("optimizer", [&] { decide_update(); });
  if (!awaited) {
    post(prediction_bytes(targets, rows_));
    NG_CUDA(cudaEventRecord(done_.get(), stream_.get()));
  }
  if (adam) in_range("optimizer", [&] { launch_update(*adam); });
  commit();
  if (!awaited) await_done();
  const Verdict& verdict = awaited ? finish(prediction_bytes(targets, rows_)) : heard();
  if (adam && (verdict.ok || !std::isfinite(verdict.squares))) stats->grad_norm = std::sqrt(verdict.squares);
  report(targets, stats);
}

void CudaModel::run(const Tokens& tokens, const Targets& targets, uint64_t call, const AdamW* adam, bool accumulate,
                    StepStats* stats) {
  const OnDevice scope(spec_.device);
  call_ = call;
  train_dropout_ = spec_.dropout > 0;
  stage(*state_, tokens);
  in_range("forward", [&] { forward(); });
  score_and_learn(targets, adam, accumulate, stats);
}

void CudaModel::train(const Tokens& tokens, const Targets& targets, const AdamW& adam, uint64_t call,
                      StepStats* stats) {
  run(tokens, targets, call, &adam, false, stats);
}

void CudaModel::backward(const Tokens& tokens, const Targets& targets, uint64_t call, bool accumulate,
                         StepStats* stats) {
  run(tokens, targets, call, nullptr, accumulate, stats);
}

void CudaModel::update(const AdamW& adam, StepStats* stats) {
  const OnDevice scope(spec_.device);
  set_verdict(true, false);
  decide_update();
  launch_update(adam);
  const Verdict& verdict = finish(0);
  stats->grad_norm = std::sqrt(verdict.squares);
  stats->finite = verdict.ok;
}

void CudaModel::advance(State& state, const Tokens& tokens, float* broca) {
  const OnDevice scope(spec_.device);
  train_dropout_ = false;
  stage(static_cast<CudaState&>(state), tokens);
  forward();
  commit(true);
  if (broca) {
    normalize_rows(o_ + (rows_ - call_streams_) * spec_.dim, call_streams_, d_broca_, nullptr, nullptr);
    copy_out(broca, d_broca_, sizeof(float) * call_streams_ * spec_.dim);
  }
  require_finite(finish(0));
}

double CudaModel::evaluate(State& state, const Tokens& tokens, const Input& targets) {
  const OnDevice scope(spec_.device);
  train_dropout_ = false;
  stage(static_cast<CudaState&>(state), tokens);
  Targets plain;
  plain.ids = targets;
  stage_targets(plain);
  forward();
  score(false, false);
  judge(true);
  commit();
  const Verdict& verdict = finish(0);
  require_finite(verdict);
  return verdict.loss;
}

// Without `hold` and with x on the device nobody waits: the verdict decides about the commit there.
void CudaModel::step(const Input& x, bool hold) {
  const OnDevice scope(spec_.device);
  train_dropout_ = false;
  if (x.device) check_rows(x, spec_.streams, &faults()->bad_x);
  begin(*state_, spec_.streams, 1);
  stage_rows(x);
  in_range("forward", [&] { forward(); });
  if (hold) {
    judge(false);
  } else {
    commit(true);
  }
  if (x.device && !hold) return remember_state();
  const Verdict& verdict = finish(0);
  if (!hold) require_finite(verdict);
  held_ = hold;
  held_sound_ = verdict.ok;
}

void CudaModel::learn_held(const int32_t* ids, const Targets& targets, const AdamW& adam, StepStats* stats) {
  if (!held_) throw std::runtime_error("learn_held: expected an open step, got none");
  const OnDevice scope(spec_.device);
  held_ = false;
  set_verdict(false, !held_sound_);  // other calls may have used it since
  Input heard;
  heard.data = ids;
  stage_ids(heard);
  score_and_learn(targets, &adam, false, stats);
}

void CudaModel::broca_output(const Output& out) {
  const OnDevice scope(spec_.device);
  // d_broca_ is free between calls.
  normalize_rows(held_ ? o_ : state_->o(), spec_.streams, d_broca_, nullptr, nullptr);
  give(out, 0, d_broca_, sizeof(float) * spec_.streams * spec_.dim);
  if (!out.device) settle();
}

void CudaModel::encode(const Input& ids, int64_t count, const Output& out) {
  const OnDevice scope(spec_.device);
  if (ids.device && !out.device) {  // where there is a wait anyway, nothing is written if an id is wrong
    check_ids(ids, count);
    settle();
  }
  unheard_ |= ids.device;
  const char* from = static_cast<const char*>(arrive(ids, static_cast<size_t>(count) * ids.itemsize));
  if (out.device) {
    encode_rows(from, ids.itemsize, count, out.as<float>());
  } else {
    for (int64_t first = 0; first < count; first += capacity_) {
      const int64_t some = std::min(capacity_, count - first), row = sizeof(float) * spec_.dim;
      encode_rows(from + first * ids.itemsize, ids.itemsize, some, dx_);
      give(out, first * row, dx_, some * row);
    }
  }
  if (!ids.device || !out.device) settle();
}

// Rows pass through workspace that an open step does not need.
void CudaModel::logits(const Input& broca, int64_t rows, const Output& out) {
  const OnDevice scope(spec_.device);
  const size_t row = sizeof(float) * spec_.vocab;
  for_logits(broca, rows, [&](int64_t first, int64_t count, const float* logits) {
    give(out, first * row, logits, count * row);
    if (!broca.device || !out.device) settle();
  });
}

void CudaModel::sample(const Input& broca, int64_t rows, const Sampling& sampling, const Output& ids) {
  const OnDevice scope(spec_.device);
  if (broca.device) {
    check_rows(broca, rows, &faults()->bad_broca);
    if (!ids.device) settle();  // as in encode()
  }
  set_draw(sampling);
  for_logits(broca, rows, [&](int64_t first, int64_t count, const float* logits) {
    draw(logits, count, first, drawn_);
    give(ids, sizeof(int32_t) * first, drawn_, sizeof(int32_t) * count);
    if (!broca.device || !ids.device) settle();
  });
}

// Calls body(first row, rows, logits [rows, V] on the device) for pieces of the caller's rows that fit.
template <class Body>
void CudaModel::for_logits(const Input& broca, int64_t rows, Body body) {
  refresh_derived();
  const int64_t most = std::min(sampling_rows(), capacity_), dim = spec_.dim;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    take(d_broca_, broca, sizeof(float) * first * dim, sizeof(float) * count * dim);
    to_real(d_broca_, count * dim, readout_error_);
    float* out = sampling_logits();
    logits_on_device(readout_error_, count, out);
    body(first, count, out);
  }
}

// One token of generation after hush(), on the device alone: logits of broca_real_, a draw, the token through the
// brain, state kept.
void CudaModel::speak() {
  float* logits = sampling_logits();
  const int64_t streams = call_streams_;
  for (int64_t first = 0; first < streams; first += sampling_rows()) {
    const int64_t count = std::min(sampling_rows(), streams - first);
    const char* rows = static_cast<const char*>(broca_real_) + first * spec_.dim * real_size();
    logits_on_device(rows, count, logits, true);
    draw(logits, count, first, ids_ + first, true);
  }
  forward(true);
  commit(true, true);
}

// Graphs know of such launches since driver 12.3.
bool CudaModel::starts_early() {
  int driver = 0;
  NG_CUDA(cudaDriverGetVersion(&driver));
  return driver >= 12030 && code_of_90();
}

// The first token runs launch by launch, which loads every kernel; the step is then captured and replayed: the host
// launches one graph a token or kTokensAtOnce, and waits once for as many tokens as drawn_ has room for. A graph reads
// what changes from device memory, so it serves later calls for the same state as well; it knows that by its arrays.
int CudaModel::generate(State& state, float* broca, const Sampling& sampling, int count, int32_t* ids) {
  const OnDevice scope(spec_.device);
  train_dropout_ = false;
  CudaState& own = static_cast<CudaState&>(state);
  refresh_derived();
  begin(own, own.streams(), 1);
  const size_t bytes = sizeof(float) * rows_ * spec_.dim;
  copy_in(d_broca_, broca, bytes);
  to_real(d_broca_, rows_ * spec_.dim, broca_real_);
  hush();
  const int64_t batch = drawn_room() / rows_;
  Sampling from = sampling;
  for (int64_t token = 0; token < count; token += batch) {
    const int64_t some = std::min(batch, count - token);
    from.position = sampling.position + token;
    set_draw(from);
    int64_t done = 0;
    const std::tuple graphs_of(static_cast<const void*>(own.views()), static_cast<const void*>(own.o()), own.streams(),
                               draws_from_all_);
    if (graphs_of_ != graphs_of) {
      graph_.reset();
      graph_of_many_.reset();
      speak();
      graphs_of_ = graphs_of;
      done = 1;
    }
    while (done < some) {
      const bool many = some - done >= kTokensAtOnce;
      const int tokens = many ? kTokensAtOnce : 1;
      GraphExec& graph = many ? graph_of_many_ : graph_;
      if (!graph) capture(tokens, graph);
      NG_CUDA(cudaGraphLaunch(graph.get(), stream_.get()));
      ++counters_.launches;
      done += tokens;
    }
    copy_out(ids + token * rows_, drawn_, sizeof(int32_t) * some * rows_);
    const Verdict& verdict = finish(0);
    if (!verdict.ok) return static_cast<int>(verdict.heard);
  }
  if (count > 0) normalize_rows(o_, rows_, d_broca_, nullptr, nullptr);
  copy_out(broca, d_broca_, bytes);
  wait();
  return count;
}

void CudaModel::capture(int tokens, GraphExec& to) {
  const int64_t before = counters_.launches;
  cudaGraph_t graph = nullptr;
  NG_CUDA(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
  try {
    for (int i = 0; i < tokens; ++i) speak();
  } catch (...) {
    cudaStreamEndCapture(stream_.get(), &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  NG_CUDA(cudaStreamEndCapture(stream_.get(), &graph));
  counters_.launches = before;
  cudaGraphExec_t exec = nullptr;
  const cudaError_t code = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  NG_CUDA(code);
  to.reset(exec);
}

void CudaModel::recorded(int index, float* u, float* s, float* gate) const {
  const OnDevice scope(spec_.device);
  const RegionView& region = regions_[index];
  const size_t row = kBlock * real_size(), panel = rows_ * row, panels = region.n / kBlock;
  std::vector<char> raw(panels * panel);
  for (const auto& [from, to] : {std::pair(region.u, u), std::pair(region.s, s), std::pair(region.g, gate)}) {
    if (!to) continue;
    NG_CUDA(cudaMemcpy2D(raw.data(), panel, from, region.stride * real_size(), panel, panels, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < panels * rows_ * kBlock; ++i) {  // [n/32][M][32] -> [M, n]
      const size_t neuron = i / (rows_ * kBlock) * kBlock + i % kBlock, at = i / kBlock % rows_ * region.n + neuron;
      uint32_t bits = 0;  // a bf16 is the upper half of a float
      std::memcpy(reinterpret_cast<char*>(&bits) + sizeof(bits) - real_size(), raw.data() + i * real_size(),
                  real_size());
      if (from == region.s) bits &= 0x7fffffffu;  // see hush()
      std::memcpy(to + at, &bits, sizeof(bits));
    }
  }
}

}  // namespace neurogen::cuda
