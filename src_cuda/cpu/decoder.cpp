// Vocabulary decoder: logits = W broca + c by BLAS, softmax cross-entropy and its gradient in place, sampling.
// Rows are taken a chunk at a time, so nothing of size M*V is ever held; inside a chunk, slices of the
// vocabulary and tiles of rows are the units of parallel work.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"
#include "sampling.h"

namespace neurogen::cpu {
namespace {

constexpr int64_t kSampleCost = 16;  // multiply-adds that one token's exponential is worth

// c[m, n] = op(a) op(b) + beta c, row-major, through the column-major BLAS (which sees the transposes).
void gemm(Sgemm sgemm, bool ta, bool tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
          int64_t ldb, float beta, float* c, int64_t ldc) {
  char transpose_a = ta ? 'T' : 'N', transpose_b = tb ? 'T' : 'N';
  int m_ = static_cast<int>(m), n_ = static_cast<int>(n), k_ = static_cast<int>(k);
  int lda_ = static_cast<int>(lda), ldb_ = static_cast<int>(ldb), ldc_ = static_cast<int>(ldc);
  float one = 1.0f;
  sgemm(&transpose_b, &transpose_a, &n_, &m_, &k_, &one, const_cast<float*>(b), &ldb_, const_cast<float*>(a), &lda_,
        &beta, c, &ldc_);
}

}  // namespace

// Columns of one slice of the vocabulary, without the bias. out: [rows, V].
void CpuModel::logits_slice(const float* broca, int64_t rows, int slice, float* out) {
  const int64_t begin = slice * vocab_slice_, width = std::min(vocab_slice_, spec_.vocab - begin);
  gemm(sgemm_, false, true, rows, width, spec_.dim, broca, spec_.dim, decoder_ + begin * spec_.dim, spec_.dim, 0.0f,
       out + begin, spec_.vocab);
}

// Adds this chunk's share to the rows of dW and dc of one slice of the vocabulary.
void CpuModel::decoder_gradient_slice(int64_t first, int64_t rows, int slice, bool add) {
  const int64_t begin = slice * vocab_slice_, width = std::min(vocab_slice_, spec_.vocab - begin);
  gemm(sgemm_, true, false, width, spec_.dim, rows, logits_ + begin, spec_.vocab, broca_ + first * spec_.dim, spec_.dim,
       add ? 1.0f : 0.0f, d_decoder_ + begin * spec_.dim, spec_.dim);
  float* bias = d_decoder_bias_ + begin;
  if (!add) std::fill_n(bias, width, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const float* error = logits_ + row * spec_.vocab + begin;
    for (int64_t i = 0; i < width; ++i) bias[i] += error[i];
  }
}

// Columns of dE/d broca of one slice of D, for the rows of this chunk.
void CpuModel::broca_gradient_slice(int64_t first, int64_t rows, int slice) {
  const int64_t begin = slice * dim_slice_, width = std::min(dim_slice_, spec_.dim - begin);
  gemm(sgemm_, false, false, rows, width, spec_.vocab, logits_, spec_.vocab, decoder_ + begin, spec_.dim, 0.0f,
       d_broca_ + first * spec_.dim + begin, spec_.dim);
}

// Cross-entropy of every row of the call; with the gradient: dE/d broca, dW and dc. Stops, and says false, at a chunk
// of rows with a non-finite loss that counts, before that chunk's gradient is written.
bool CpuModel::score(bool want_gradient, bool accumulate) {
  const int slices = vocab_slices(), dim_slices = static_cast<int>((spec_.dim + dim_slice_ - 1) / dim_slice_);
  for (int64_t first = 0; first < rows_; first += logit_rows_) {
    const int64_t rows = std::min(logit_rows_, rows_ - first);
    const bool add = accumulate || first > 0;
    bool finite = true;
#pragma omp parallel num_threads(workers(rows_* weights_))
    {
#pragma omp for schedule(dynamic)
      for (int slice = 0; slice < slices; ++slice) logits_slice(broca_ + first * spec_.dim, rows, slice, logits_);
#pragma omp for schedule(dynamic, 16)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = first + i;
        const float scale = divisor_ > 0 ? static_cast<float>(target_weights_[row] / divisor_) : 0.0f;
        SoftmaxRow job{
            logits_ + i * spec_.vocab, decoder_bias_, spec_.vocab, target_ids_[row], scale, want_gradient, 0.0, 0};
        kernels().softmax_row(job);
        row_loss_[row] = job.loss;
        row_best_[row] = job.best;
      }
#pragma omp single
      finite = losses_finite(first, rows);
      if (want_gradient && finite) {
#pragma omp for schedule(dynamic) nowait
        for (int slice = 0; slice < dim_slices; ++slice) broca_gradient_slice(first, rows, slice);
#pragma omp for schedule(dynamic)
        for (int slice = 0; slice < slices; ++slice) decoder_gradient_slice(first, rows, slice, add);
      }
    }
    if (!finite) return false;
  }
  return true;
}

bool CpuModel::losses_finite(int64_t first, int64_t rows) const {
  for (int64_t row = first; row < first + rows; ++row) {
    if (target_weights_[row] != 0.0f && !std::isfinite(row_loss_[row])) return false;
  }
  return true;
}

// Loss, accuracy and predictions from what score() left behind.
void CpuModel::summarize(const Targets& targets, StepStats* stats) {
  double loss = 0;
  stats->tokens = stats->correct = 0;
  for (int64_t row = 0; row < rows_; ++row) {
    if (targets.predictions.data) {
      targets.predictions.as<int32_t>()[row % streams_ * tokens_ + row / streams_] = row_best_[row];
    }
    if (target_weights_[row] == 0.0f) continue;
    loss += static_cast<double>(target_weights_[row]) * row_loss_[row];
    ++stats->tokens;
    stats->correct += row_best_[row] == target_ids_[row];
  }
  stats->loss = divisor_ > 0 ? loss / divisor_ : 0.0;
  stats->homeostasis = homeostasis();
  stats->finite = std::isfinite(loss) && std::isfinite(stats->homeostasis);
}

void CpuModel::logits(const Input& broca, int64_t rows, const Output& out) {
  logits_of(broca.host<float>(), rows, out.as<float>());
}

void CpuModel::logits_of(const float* broca, int64_t rows, float* out) {
  const int slices = vocab_slices();
#pragma omp parallel num_threads(workers(rows* spec_.vocab* spec_.dim))
  {
#pragma omp for schedule(static)
    for (int slice = 0; slice < slices; ++slice) logits_slice(broca, rows, slice, out);
#pragma omp for schedule(dynamic, 64)
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < spec_.vocab; ++i) out[row * spec_.vocab + i] += decoder_bias_[i];
    }
  }
}

void CpuModel::sample(const Input& broca, int64_t rows, const Sampling& sampling, const Output& ids) {
  for (int64_t first = 0; first < rows; first += logit_rows_) {
    const int64_t count = std::min(logit_rows_, rows - first);
    logits_of(broca.host<float>() + first * spec_.dim, count, logits_);
#pragma omp parallel for num_threads(workers(count* spec_.vocab* kSampleCost)) schedule(static)
    for (int64_t row = 0; row < count; ++row) {
      ids.as<int32_t>()[first + row] = draw_token(logits_ + row * spec_.vocab, spec_.vocab, sampling, first + row,
                                                  sort_ids_ + omp_get_thread_num() * int64_t{spec_.vocab});
    }
  }
}

}  // namespace neurogen::cpu
