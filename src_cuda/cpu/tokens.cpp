// Staging: the user's [S, T] tokens become time-major rows, distinct tokens are found once, state is copied.
#include <algorithm>
#include <climits>
#include <cstring>

#include "model.h"

namespace neurogen::cpu {

void CpuModel::stage(State& state, const Tokens& tokens) {
  stage_streams(static_cast<CpuState&>(state), tokens.streams, tokens.tokens, tokens.resets.host<uint8_t>());
  stage_ids(tokens.ids.host<int32_t>());
}

void CpuModel::stage_streams(CpuState& state, int streams, int tokens, const uint8_t* resets) {
  active_ = &state;
  streams_ = streams;
  tokens_ = tokens;
  rows_ = int64_t{streams} * tokens;
  held_ = false;
  has_resets_ = false;
  if (resets) {
    for (int64_t i = 0; i < rows_; ++i) has_resets_ |= resets[i] != 0;
  }
  if (has_resets_) {
    for (int stream = 0; stream < streams; ++stream) {
      int age = INT_MAX;
      for (int token = 0; token < tokens; ++token) {
        const bool reset = resets[int64_t{stream} * tokens + token] != 0;
        age = reset ? 0 : age == INT_MAX ? INT_MAX : age + 1;
        resets_[int64_t{token} * streams + stream] = reset;
        age_[int64_t{token} * streams + stream] = age;
      }
    }
  }
  for (size_t r = 0; r < regions_.size(); ++r) {
    Region& region = regions_[r];
    const size_t bytes = sizeof(float) * streams * region.n;
    std::memcpy(region.v, state.v(static_cast<int>(r)), bytes);
    std::memcpy(region.w, state.w(static_cast<int>(r)), bytes);
  }
}

// Products with the embedding are done once per distinct token, not once per row: bytes repeat a lot.
void CpuModel::stage_ids(const int32_t* ids) {
  unique_ = 0;
  for (int token = 0; token < tokens_; ++token) {
    for (int stream = 0; stream < streams_; ++stream) {
      const int64_t row = int64_t{token} * streams_ + stream;
      const int32_t id = ids[int64_t{stream} * tokens_ + token];
      if (slot_of_id_[id] < 0) {
        slot_of_id_[id] = unique_;
        unique_ids_[unique_++] = id;
      }
      slot_of_row_[row] = slot_of_id_[id];
    }
  }
  for (int i = 0; i < unique_; ++i) {
    slot_of_id_[unique_ids_[i]] = -1;
    std::memcpy(x_ + int64_t{i} * spec_.dim, embedding_ + int64_t{unique_ids_[i]} * spec_.dim,
                sizeof(float) * spec_.dim);
  }
}

void CpuModel::stage_rows(const float* x) {
  unique_ = static_cast<int>(rows_);
  for (int64_t row = 0; row < rows_; ++row) slot_of_row_[row] = static_cast<int32_t>(row);
  std::memcpy(x_, x, sizeof(float) * rows_ * spec_.dim);
}

void CpuModel::stage_targets(const Targets& targets) {
  const int32_t* ids = targets.ids.host<int32_t>();
  const float* weights = targets.weights.host<float>();
  double total = 0;
  for (int token = 0; token < tokens_; ++token) {
    for (int stream = 0; stream < streams_; ++stream) {
      const int64_t row = int64_t{token} * streams_ + stream, at = int64_t{stream} * tokens_ + token;
      const float weight = weights ? weights[at] : 1.0f;
      target_ids_[row] = ids[at];
      target_weights_[row] = weight;
      total += targets.normalize == Normalize::absolute ? std::abs(weight) : weight;
    }
  }
  divisor_ = targets.divisor >= 0 ? targets.divisor : total;
}

}  // namespace neurogen::cpu
