#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "philox.h"

namespace neurogen {
namespace {

constexpr uint32_t kSamplingTag = 0x73616d70u;  // "samp": keeps these draws apart from dropout's

double uniform(const Sampling& sampling, int64_t row) {
  const Philox draw = philox(static_cast<uint32_t>(row), static_cast<uint32_t>(sampling.position),
                             static_cast<uint32_t>(sampling.position >> 32), kSamplingTag,
                             static_cast<uint32_t>(sampling.seed), static_cast<uint32_t>(sampling.seed >> 32));
  return ((draw.word[0] >> 5) * 67108864.0 + (draw.word[1] >> 6)) * 0x1p-53;
}

}  // namespace

int32_t draw_token(const float* logits, int64_t vocab, const Sampling& sampling, int64_t row, int32_t* scratch) {
  // NaN counts as impossible; it must not reach a sort, which needs an order.
  const auto value = [&](int32_t id) { return logits[id] == logits[id] ? logits[id] : -INFINITY; };
  const auto before = [&](int32_t x, int32_t y) { return value(x) != value(y) ? value(x) > value(y) : x < y; };
  int32_t best = 0;
  for (int32_t id = 1; id < vocab; ++id) {
    if (before(id, best)) best = id;
  }
  if (sampling.greedy) return best;

  const auto mass = [&](int32_t id) {
    return id == best ? 1.0 : std::exp((static_cast<double>(value(id)) - value(best)) / sampling.temperature);
  };
  int64_t kept = sampling.top_k > 0 ? std::min<int64_t>(sampling.top_k, vocab) : vocab;
  std::iota(scratch, scratch + vocab, 0);
  if (kept < vocab) std::nth_element(scratch, scratch + kept, scratch + vocab, before);
  if (sampling.top_p < 1.0f) {
    std::sort(scratch, scratch + kept, before);
    double all = 0, reached = 0;
    for (int64_t i = 0; i < kept; ++i) all += mass(scratch[i]);
    int64_t prefix = 0;
    do {
      reached += mass(scratch[prefix++]);
    } while (prefix < kept && reached < sampling.top_p * all);
    kept = prefix;
  }
  if (kept < vocab || sampling.top_p < 1.0f) std::sort(scratch, scratch + kept);  // back to id order
  double all = 0, reached = 0;
  for (int64_t i = 0; i < kept; ++i) all += mass(scratch[i]);
  const double goal = uniform(sampling, row) * all;
  for (int64_t i = 0; i < kept; ++i) {
    reached += mass(scratch[i]);
    if (reached > goal) return scratch[i];
  }
  return scratch[kept - 1];
}

}  // namespace neurogen
