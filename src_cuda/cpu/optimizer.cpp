// AdamW with a global norm clip and a non-finite guard. The untied embedding is lazy: only rows that have a
// gradient are touched, moments of the others wait, bias correction goes by the global step.
#include <algorithm>
#include <cmath>

#include "model.h"

namespace neurogen::cpu {

// Rows of the embedding with a gradient, ascending. A user who was handed the gradient may have written any row.
void CpuModel::find_embedding_rows() {
  touched_count_ = 0;
  for (int32_t id = 0; id < spec_.vocab; ++id) {
    bool touched = row_touched_[id];
    for (int j = 0; scan_embedding_rows_ && !touched && j < spec_.dim; ++j) {
      touched = d_embedding_[int64_t{id} * spec_.dim + j] != 0.0f;
    }
    if (!touched) continue;
    row_touched_[id] = 1;
    touched_rows_[touched_count_++] = id;
  }
}

// Calls body(tensor, offset, count) for every piece of every trainable tensor: kUpdatePiece values, or one
// touched row of the lazy embedding. A piece's number is its place in this order.
template <class Body>
void CpuModel::for_pieces(Body body) {
  int64_t number = 0;
  for (Tensor& tensor : tensors_) {
    if (!tensor.gradient) continue;
    if (tensor.data == embedding_ && !spec_.tied) {
#pragma omp for schedule(dynamic, 16) nowait
      for (int64_t i = 0; i < touched_count_; ++i) {
        body(tensor, int64_t{touched_rows_[i]} * spec_.dim, int64_t{spec_.dim}, number + i);
      }
      number += touched_count_;
      continue;
    }
    const int64_t size = tensor.size(), pieces = (size + kUpdatePiece - 1) / kUpdatePiece;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < pieces; ++i) {
      body(tensor, i * kUpdatePiece, std::min(kUpdatePiece, size - i * kUpdatePiece), number + i);
    }
    number += pieces;
  }
#pragma omp single
  piece_count_ = number;
}

void CpuModel::update(const AdamW& adam, StepStats* stats) {
  if (!spec_.tied) find_embedding_rows();
#pragma omp parallel num_threads(threads_)
  for_pieces([&](const Tensor& tensor, int64_t offset, int64_t count, int64_t number) {
    piece_norms_[number] = kernels().sum_of_squares(tensor.gradient + offset, count);
  });
  double squares = 0;
  for (int64_t i = 0; i < piece_count_; ++i) squares += piece_norms_[i];
  stats->grad_norm = std::sqrt(squares);
  stats->finite = std::isfinite(stats->grad_norm);
  if (!stats->finite) return;

  const double correction1 = 1.0 - std::pow(adam.beta1, static_cast<double>(adam.step));
  const double correction2 = 1.0 - std::pow(adam.beta2, static_cast<double>(adam.step));
  const double clip = adam.clip > 0 && stats->grad_norm > adam.clip ? adam.clip / stats->grad_norm : 1.0;
#pragma omp parallel num_threads(threads_)
  for_pieces([&](const Tensor& tensor, int64_t offset, int64_t count, int64_t) {
    const double decay = tensor.decay ? 1.0 - adam.lr * adam.weight_decay : 1.0;
    kernels().adam({static_cast<float*>(tensor.data) + offset, tensor.moment1 + offset, tensor.moment2 + offset,
                    tensor.gradient + offset, count, static_cast<float>(clip), static_cast<float>(adam.beta1),
                    static_cast<float>(adam.beta2), static_cast<float>(adam.lr / correction1),
                    static_cast<float>(1.0 / correction2), static_cast<float>(adam.eps), static_cast<float>(decay)});
  });
  derived_stale_ = true;
}

}  // namespace neurogen::cpu
