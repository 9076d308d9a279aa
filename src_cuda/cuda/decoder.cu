// Vocabulary decoder. A chunk of rows at a time, so nothing of size M*V is ever held:
//   z = W broca^T + c                  logits, by cuBLASLt; the bias is added where they are read
//   loss = log(sum exp(z - max z)) + max z - z_target                                          [row]
//   dz = (softmax(z) - onehot(target)) * weight / divisor                     in place of z, as Real
//   dbroca = dz W      dW (+)= dz^T broca      dc (+)= column sums of dz
// Row lengths of the logits are rounded up to 8 values, which keeps every row aligned to 16 bytes; products are told
// the true V, so the padding behind a row never counts. Two kernels turn logits into errors: walk_rows_kernel
// (walk_rows.cuh) those of bf16 rows of 4,097 to 32,768 logits, score_rows_kernel all others. The latter moves 2V bytes
// in and 2V out in bf16 (4V each in float), reads 4V of bias a row from the L2 cache, and dc reads the errors once
// more. Logits without a loss, of a few rows in bf16, have a kernel of their own (few_logits.cuh). Where the model is
// "fp8" and the call learns, the three products are those of eight_bits.cu.
#include <algorithm>
#include <cmath>

#include "few_logits.cuh"
#include "logit_rows.cuh"
#include "model.h"
#include "numbers.cuh"
#include "walk_rows.cuh"

namespace neurogen::cuda {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 30;  // of logits at a time: dW is read and written once for so many
constexpr int kRowUnit = 128;                    // rows of a chunk come in multiples of this

constexpr int kHeld = 4;  // pieces a thread keeps in registers between its passes over a row, where it is long
constexpr int kMaxThreads = 1024;
constexpr int kThreads = 256;
constexpr int kColumns = 32 * kPiece;  // columns of one block of sum_columns_kernel

// The fast form is good to 1e-6, far below the rounding of bf16 logits.
__device__ inline float exp_of(float x, float) { return expf(x); }
__device__ inline float exp_of(float x, bf16) { return fast_exp2(x * kLog2E); }

__device__ inline float block_max(float x, float* room) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < blockDim.x / 32; ++i) x = fmaxf(x, room[i]);
  return x;
}

// Logits with the bias; what lies beyond the vocabulary, whole pieces too, is -inf. Without branches, so that the loads
// of several pieces are under way together.
template <class Real>
__device__ inline void load_logits(const Real* row, const float* bias, int vocab, int piece, float (&x)[kPiece]) {
  const int at = min(piece, (vocab - 1) / kPiece) * kPiece, inside = vocab - piece * kPiece;
  float c[kPiece];
  load_piece(row + at, x);
  load_piece(bias + at, c);
  for (int j = 0; j < kPiece; ++j) x[j] = j < inside ? x[j] + c[j] : -INFINITY;
}

// One block a row. Up to Held pieces a thread are read once; the loose ones of a longer row, which no register holds,
// are read again in each pass.
template <class Real, int Held>
__global__ void __launch_bounds__(kMaxThreads) score_rows_kernel(Real* logits, ScoreJob p) {
  __shared__ float max_room[32];
  __shared__ double sum_room[32];
  __shared__ float scale, target_logit;
  __shared__ int best;
  Real* const row = logits + blockIdx.x * p.ld;
  const int pieces = (p.vocab + kPiece - 1) / kPiece;
  const int first_loose = threadIdx.x + Held * blockDim.x;
  if (threadIdx.x == 0) {
    const double divisor = p.verdict->divisor;
    const int target = p.targets[blockIdx.x];
    scale = divisor > 0 ? static_cast<float>(p.weights[blockIdx.x] / divisor) : 0.0f;
    target_logit = to_float(row[target]) + p.bias[target];
    best = p.vocab - 1;
  }

  float x[Held][kPiece], top = -INFINITY;
#pragma unroll
  for (int k = 0; k < Held; ++k) {
    load_logits(row, p.bias, p.vocab, threadIdx.x + k * blockDim.x, x[k]);
    for (int j = 0; j < kPiece; ++j) top = fmaxf(top, x[k][j]);
  }
  float loose[kPiece];
  for (int piece = first_loose; piece < pieces; piece += blockDim.x) {
    load_logits(row, p.bias, p.vocab, piece, loose);
    for (int j = 0; j < kPiece; ++j) top = fmaxf(top, loose[j]);
  }

  const float own_top = top;
  top = block_max(top, max_room);
  if (own_top == top) {  // few threads: the lowest id wins
    int id = p.vocab - 1;
    for (int piece = first_loose; piece < pieces; piece += blockDim.x) {
      load_logits(row, p.bias, p.vocab, piece, loose);
      for (int j = 0; j < kPiece; ++j) id = loose[j] == top ? min(id, piece * kPiece + j) : id;
    }
#pragma unroll
    for (int k = 0; k < Held; ++k) {
      const int begin = (threadIdx.x + k * blockDim.x) * kPiece;
      for (int j = 0; j < kPiece; ++j) id = x[k][j] == top ? min(id, begin + j) : id;
    }
    atomicMin(&best, id);
  }

  float held_sum = 0.0f;
#pragma unroll
  for (int k = 0; k < Held; ++k) {
    for (int j = 0; j < kPiece; ++j) held_sum += x[k][j] = exp_of(x[k][j] - top, Real{});
  }
  double total = held_sum;
  for (int piece = first_loose; piece < pieces; piece += blockDim.x) {
    load_logits(row, p.bias, p.vocab, piece, loose);
    float sum = 0.0f;
    for (int j = 0; j < kPiece; ++j) sum += exp_of(loose[j] - top, Real{});
    total += sum;
  }
  total = block_sum(total, sum_room);
  if (threadIdx.x == 0) {
    const float loss = static_cast<float>(log(total) + top - target_logit);
    p.losses[blockIdx.x] = loss;
    p.best[blockIdx.x] = best;
    if (p.weights[blockIdx.x] != 0.0f && !isfinite(loss)) atomicOr(&p.verdict->loss_not_finite, 1);
  }
  if (!p.want_gradient) return;

  // A row without weight gets exact zeros, whatever its logits are.
  const float weight = scale, factor = weight / static_cast<float>(total);
  const int target = p.targets[blockIdx.x];
  const auto finish = [&](int piece, float (&e)[kPiece]) {
    for (int j = 0; j < kPiece; ++j) {
      e[j] = e[j] * factor - (piece * kPiece + j == target ? weight : 0.0f);
      if (weight == 0.0f) e[j] = 0.0f;
    }
    store_piece(row + piece * kPiece, e);
  };
#pragma unroll
  for (int k = 0; k < Held; ++k) {
    const int piece = threadIdx.x + k * blockDim.x;
    if (piece < pieces) finish(piece, x[k]);
  }
  for (int piece = first_loose; piece < pieces; piece += blockDim.x) {
    load_logits(row, p.bias, p.vocab, piece, loose);
    for (int j = 0; j < kPiece; ++j) loose[j] = exp_of(loose[j] - top, Real{});
    finish(piece, loose);
  }
}

// part[slice, v] = sum of a slice of kRowUnit rows. One block: kColumns columns, its eight warps every eighth row.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    sum_columns_kernel(const Real* errors, int64_t ld, int64_t rows, int vocab, float* part) {
  __shared__ float room[kThreads / 32][kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = int64_t{blockIdx.y} * kColumns, column = begin + lane * kPiece;
  const int64_t slice = blockIdx.x, end = min((slice + 1) * kRowUnit, rows);
  float sum[kPiece] = {};
  if (column < ld) {
#pragma unroll 4
    for (int64_t row = slice * kRowUnit + warp; row < end; row += kThreads / 32) {
      float x[kPiece];
      load_piece(errors + row * ld + column, x);
      for (int j = 0; j < kPiece; ++j) sum[j] += x[j];
    }
  }
  store_piece(room[warp] + lane * kPiece, sum);
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < kThreads / 32; ++i) total += room[i][threadIdx.x];
  if (begin + threadIdx.x < vocab) part[slice * ld + begin + threadIdx.x] = total;
}
static_assert(kColumns == kThreads, "a thread finishes one column");

// out[v] (+)= sum of part[slice, v]. One block: 32 columns, its warps every 32nd slice.
__global__ void __launch_bounds__(1024)
    add_slices_kernel(const float* part, int64_t ld, int slices, int vocab, bool add, float* out) {
  __shared__ float room[32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  float sum = 0.0f;
  if (column < vocab) {
    for (int64_t slice = warp; slice < slices; slice += 32) sum += part[slice * ld + column];
  }
  room[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= vocab) return;
  float total = 0.0f;
  for (int i = 0; i < 32; ++i) total += room[i][lane];
  out[column] = add ? out[column] + total : total;
}

__global__ void __launch_bounds__(kThreads) add_bias_kernel(float* logits, const float* bias, int64_t rows, int vocab) {
  const int column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= vocab) return;
  const float c = bias[column];
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) logits[row * vocab + column] += c;
}

// Four values a thread; both arrays are aligned to four values.
template <class Real>
__global__ void __launch_bounds__(kThreads) convert_kernel(const float* from, int64_t count, Real* to) {
  const int64_t i = 4 * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (i + 4 <= count) {
    store4(to + i, load4(from + i));
  } else {
    for (int64_t j = i; j < count; ++j) to[j] = from_float<Real>(from[j]);
  }
}

template <class T>
T divide_up(T count, T by) {
  return (count + by - 1) / by;
}

}  // namespace

// Threads of a block of walk_rows_kernel; 0: it is not for this model.
int CudaModel::walk_threads() const { return spec_.bf16 ? threads_to_walk(logit_ld_) : 0; }

void CudaModel::lay_out_decoder() {
  const int64_t unit = spec_.fp8 ? 2 * kPiece : kPiece;  // rows of bytes are aligned to 16 too
  logit_ld_ = divide_up(int64_t{spec_.vocab}, unit) * unit;
  const int64_t row_bytes = logit_ld_ * static_cast<int64_t>(real_size());
  const int64_t units = static_cast<int64_t>(kChunkBytes) / (kRowUnit * row_bytes);
  // Generation wants float logits of every stream at a time in the same memory.
  const int64_t wanted = std::max(capacity_, spec_.streams * static_cast<int64_t>(sizeof(float) / real_size()));
  logit_rows_ = std::min(wanted, std::max<int64_t>(units, 1) * kRowUnit);
  logits_ = take_real("logits", logit_rows_ * logit_ld_);
  const int64_t walks = walk_threads() ? int64_t{kMostProcessors} * (kWalkThreads / walk_threads()) : 0;
  const int64_t parts = std::max(divide_up(logit_rows_, int64_t{kRowUnit}), std::min(walks, logit_rows_));
  bias_part_ = arena_.take<float>("logits", parts * logit_ld_);
  blas_workspace_ = arena_.take<char>("cuBLAS workspace", kBlasWorkspace);
  if (spec_.fp8) lay_out_eight();
}

void CudaModel::score(bool want_gradient, bool accumulate) {
  const int64_t vocab = spec_.vocab, dim = spec_.dim;
  const int64_t pieces = logit_ld_ / kPiece;
  const int held = pieces <= kThreads ? 1 : kHeld;
  const int threads = static_cast<int>(std::min<int64_t>(divide_up<int64_t>(pieces, 32 * held) * 32, kMaxThreads));
  const int walkers = walk_threads();
  const bool walk = walkers > 0 && walk_bytes(walkers, false) + kWalkRoom <= shared_limit_;
  const bool ahead = walk && (walk_bytes(walkers, true) + kWalkRoom) * (kWalkThreads / walkers) <= shared_limit_;
  // As many blocks as are resident at a time, and the same ones in every chunk: each goes on with its sums.
  const int64_t walks =
      walk ? std::min({int64_t{std::min(processors_, kMostProcessors)} * (kWalkThreads / walkers), logit_rows_, rows_})
           : 0;
  const bool eight = spec_.fp8 && want_gradient;
  const auto walk_rows = walk ? walk_kernel(walkers, ahead, eight) : nullptr;
  const auto add_slices = [&](int64_t slices, bool add) {
    add_slices_kernel<<<static_cast<unsigned>(divide_up<int64_t>(vocab, 32)), 1024, 0, stream_.get()>>>(
        bias_part_, logit_ld_, static_cast<int>(slices), spec_.vocab, add, d_decoder_bias_);
    launched();
  };
  if (eight) begin_eight();
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    Real* const logits = static_cast<Real*>(logits_);
    for (int64_t first = 0; first < rows_; first += logit_rows_) {
      const int64_t rows = std::min(logit_rows_, rows_ - first);
      const Real* const broca = static_cast<const Real*>(broca_real_) + first * dim;
      if (eight) {
        logits_of_eight(first, rows);
      } else {
        cublas_->multiply(stream_.get(), false, true, rows, vocab, dim, broca, dim, decoder_real_, dim, 0.0f, logits,
                          logit_ld_, true);
        launched();
      }
      const ScoreJob job{logit_ld_,
                         spec_.vocab,
                         want_gradient,
                         decoder_bias_,
                         target_ids_ + first,
                         target_weights_ + first,
                         row_loss_ + first,
                         row_best_ + first,
                         verdict_,
                         eight ? eight_.errors : nullptr,
                         eight ? &eight_.scales[kErrors8].up : nullptr};
      if (walk) {
        if (logit_ld_ > vocab) {  // the walk takes whole pieces
          NG_CUDA(cudaMemset2DAsync(logits + vocab, logit_ld_ * sizeof(Real), 0, (logit_ld_ - vocab) * sizeof(Real),
                                    rows, stream_.get()));
        }
        walk_rows<<<static_cast<unsigned>(walks), walkers, walk_bytes(walkers, ahead), stream_.get()>>>(
            static_cast<bf16*>(logits_), rows, want_gradient && first > 0, bias_part_, job);
      } else {
        const auto kernel = held == 1 ? score_rows_kernel<Real, 1> : score_rows_kernel<Real, kHeld>;
        kernel<<<static_cast<unsigned>(rows), threads, 0, stream_.get()>>>(logits, job);
      }
      launched();
      if (!want_gradient) continue;

      const bool add = accumulate || first > 0;
      if (eight) {
        learn_of_eight(first, rows, walk, add);
      } else {
        cublas_->multiply(stream_.get(), false, false, rows, dim, vocab, logits, logit_ld_, decoder_real_, dim, 0.0f,
                          d_broca_ + first * dim, dim, false);
        launched();
        cublas_->multiply(stream_.get(), true, false, vocab, dim, rows, logits, logit_ld_, broca, dim,
                          add ? 1.0f : 0.0f, d_decoder_, dim, false);
        launched();
      }
      if (walk) continue;
      const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(rows, kRowUnit)),
                      static_cast<unsigned>(divide_up<int64_t>(vocab, kColumns)));
      sum_columns_kernel<<<grid, kThreads, 0, stream_.get()>>>(logits, logit_ld_, rows, spec_.vocab, bias_part_);
      launched();
      add_slices(grid.x, add);
    }
  });
  if (walk && want_gradient) add_slices(walks, accumulate);
}

void CudaModel::logits_on_device(const void* broca_real, int64_t rows, float* out, bool speak) {
  const bool with_bias = !speak || !draw_spreads();
  if (spec_.bf16 && rows <= kRows && few_logits_fit(spec_.dim, shared_limit_)) {
    const FewLogits job{static_cast<const bf16*>(decoder_real_),
                        static_cast<const bf16*>(broca_real),
                        with_bias ? decoder_bias_ : nullptr,
                        out,
                        spec_.vocab,
                        spec_.dim,
                        static_cast<int>(rows)};
    launch_few_logits(stream_.get(), job, processors_, shared_limit_, speak && starts_early());
    launched();
    return;
  }
  cublas_->multiply(stream_.get(), false, true, rows, spec_.vocab, spec_.dim, broca_real, spec_.dim, decoder_real_,
                    spec_.dim, 0.0f, out, spec_.vocab, false);
  launched();
  if (!with_bias) return;
  const dim3 grid(divide_up(spec_.vocab, kThreads), static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
  add_bias_kernel<<<grid, kThreads, 0, stream_.get()>>>(out, decoder_bias_, rows, spec_.vocab);
  launched();
}

void CudaModel::to_real(const float* from, int64_t count, void* to) {
  const unsigned grid = static_cast<unsigned>(divide_up<int64_t>(count, 4 * kThreads));
  with_real(spec_.bf16, [&](auto real) {
    convert_kernel<<<grid, kThreads, 0, stream_.get()>>>(from, count, static_cast<decltype(real)*>(to));
  });
  launched();
}

}  // namespace neurogen::cuda
