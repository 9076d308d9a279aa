// The public calls of the CPU model: which of the steps above each one runs, and when state is committed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "model.h"

namespace neurogen::cpu {

// Loss and gradients of the forward pass that was just made.
// A non-finite loss or state is found before any gradient is written: what was accumulated before stays.
void CpuModel::score_and_learn(const Targets& targets, bool accumulate, StepStats* stats) {
  stage_targets(targets);
  const bool finite =
      staged_finite() && (rows_ <= logit_rows_ || !accumulate || score(false, false)) && score(true, accumulate);
#pragma omp parallel num_threads(workers(rows_* weights_))
  for (Region& region : regions_) {
#pragma omp for schedule(static) nowait
    for (int tile = 0; tile < region.tiles; ++tile) count_spikes(region, tile);
  }
  summarize(targets, stats);
  stats->finite = stats->finite && finite;
  if (stats->finite) learn(accumulate);
}

void CpuModel::run(const Targets& targets, uint64_t call, bool accumulate, StepStats* stats) {
  call_ = call;
  train_dropout_ = spec_.dropout > 0;
  forward();
  score_and_learn(targets, accumulate, stats);
  train_dropout_ = false;
}

void CpuModel::train(const Tokens& tokens, const Targets& targets, const AdamW& adam, uint64_t call, StepStats* stats) {
  stage(*state_, tokens);
  run(targets, call, false, stats);
  if (stats->finite) update(adam, stats);
  if (stats->finite) commit();
}

void CpuModel::backward(const Tokens& tokens, const Targets& targets, uint64_t call, bool accumulate,
                        StepStats* stats) {
  stage(*state_, tokens);
  run(targets, call, accumulate, stats);
  if (stats->finite) commit();
}

void CpuModel::commit_finite() {
  if (!staged_finite()) throw std::overflow_error("neuron state: expected finite values, got NaN or infinity");
  commit();
}

void CpuModel::step(const Input& x, bool hold) {
  stage_streams(*state_, spec_.streams, 1, nullptr);
  stage_rows(x.host<float>());
  forward();
  if (!hold) commit_finite();
  held_ = hold;
}

void CpuModel::learn_held(const int32_t* ids, const Targets& targets, const AdamW& adam, StepStats* stats) {
  if (!held_) throw std::runtime_error("learn_held: expected an open step, got none");
  for (int64_t row = 0; row < rows_; ++row) unique_ids_[row] = ids[row];
  score_and_learn(targets, false, stats);
  if (stats->finite) update(adam, stats);
  if (stats->finite) commit();
  held_ = false;
}

void CpuModel::advance(State& state, const Tokens& tokens, float* broca) {
  stage(state, tokens);
  forward();
  commit_finite();
  if (broca) {
    std::memcpy(broca, broca_ + (rows_ - streams_) * spec_.dim, sizeof(float) * streams_ * spec_.dim);
  }
}

double CpuModel::evaluate(State& state, const Tokens& tokens, const Input& targets) {
  stage(state, tokens);
  Targets plain;
  plain.ids = targets;
  stage_targets(plain);
  forward();
  score(false, false);
  commit_finite();
  double total = 0;
  for (int64_t row = 0; row < rows_; ++row) total += row_loss_[row];
  return total;
}

int CpuModel::generate(State& state, float* broca, const Sampling& sampling, int count, int32_t* ids) {
  Sampling draw = sampling;
  Tokens said;
  said.streams = state.streams();
  said.tokens = 1;
  Input rows;
  rows.data = broca;
  for (int i = 0; i < count; ++i, ++draw.position) {
    int32_t* now = ids + int64_t{i} * said.streams;
    sample(rows, said.streams, draw, Output{now});
    said.ids.data = now;
    try {
      advance(state, said, broca);
    } catch (const std::overflow_error&) {
      return i;
    }
  }
  return count;
}

void CpuModel::broca_output(const Output& out) {
  for (int stream = 0; stream < spec_.streams; ++stream) {
    const int64_t at = int64_t{stream} * spec_.dim;
    normalize((held_ ? o_ : state_->o()) + at, out.as<float>() + at);
  }
}

void CpuModel::encode(const Input& ids, int64_t count, const Output& out) {
  for (int64_t i = 0; i < count; ++i) {
    const float* row = embedding_ + int64_t{ids.host<int32_t>()[i]} * spec_.dim;
    std::memcpy(out.as<float>() + i * spec_.dim, row, sizeof(float) * spec_.dim);
  }
}

void CpuModel::read(const void* from, void* host, size_t bytes) { std::memcpy(host, from, bytes); }

// The host array may be the model's own.
void CpuModel::write(void* to, const void* host, size_t bytes) { std::memmove(to, host, bytes); }

void CpuModel::wait_for(uintptr_t stream) {
  throw std::invalid_argument("stream: expected none, the CPU has no streams, got " + std::to_string(stream));
}

Place CpuModel::place(const void*) const {
  Place here;
  here.known = here.host = true;
  return here;
}

}  // namespace neurogen::cpu
