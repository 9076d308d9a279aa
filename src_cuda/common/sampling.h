// Drawing one token from a row of logits. Defined in double precision and in one order, so that every backend
// draws the same token from the same logits.
#pragma once

#include <cstdint>

#include "neurogen/model.h"

namespace neurogen {

// p = softmax(logits / temperature); top_k keeps the k most probable; top_p keeps the shortest prefix, most
// probable first, whose share reaches top_p; equal logits go by lower id. The draw inverts the cumulative sum of
// the kept tokens in id order at a Philox uniform keyed by (seed, position, row).
// logits: [vocab]; scratch: [vocab].
int32_t draw_token(const float* logits, int64_t vocab, const Sampling& sampling, int64_t row, int32_t* scratch);

}  // namespace neurogen
