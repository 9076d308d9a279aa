// The decoder's three products in 8 bits, see eight_bits.cuh. Scales of a call:
//   W, broca   a power of two, so that the largest magnitude is in [128, 256): e4m3 ends at 448
//   errors     2^14 * divisor / largest weight, so that a target's error of a row with the largest weight is
//              -(1 - p) * 2^14: what weights and their sum are does not move it about between two numbers of e5m2
#include "eight_bits.cuh"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "model.h"

namespace neurogen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTopBlocks = 528;  // blocks of find_top_kernel at most

// *top = max(*top, largest |x|), as the bits of a float: these have the same order (and NaN is above all), so the order
// of the blocks is all one.
template <class T>
__global__ void __launch_bounds__(kThreads) find_top_kernel(const T* x, int64_t count, unsigned* top) {
  constexpr int kPieces = sizeof(uint4) / sizeof(T);
  unsigned most = 0;
  const auto look = [&](float value) { most = max(most, __float_as_uint(value) & 0x7fffffffu); };
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count / kPieces; i += gridDim.x * kThreads) {
    T piece[kPieces];
    *reinterpret_cast<uint4*>(piece) = reinterpret_cast<const uint4*>(x)[i];
    for (const T& value : piece) look(to_float(value));
  }
  if (blockIdx.x == 0) {
    for (int64_t i = count / kPieces * kPieces + threadIdx.x; i < count; i += kThreads) look(to_float(x[i]));
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (threadIdx.x % 32 == 0 && most) atomicMax(top, most);
}

__global__ void choose_scales_kernel(const Verdict* verdict, EightScale* of) {
  // Of what is not finite: 0 or NaN, which makes the loss NaN, though bytes saturate.
  const auto power = [](unsigned bits) { return bits ? exp2f(7.0f - floorf(log2f(__uint_as_float(bits)))) : 1.0f; };
  of[kDecoder8].up = power(of[kDecoder8].top);
  of[kBroca8].up = power(of[kBroca8].top);
  const double weight = __uint_as_float(of[kErrors8].top);
  of[kErrors8].up = weight > 0 && verdict->divisor > 0 ? static_cast<float>(verdict->divisor / weight * 16384) : 1.0f;
  for (int i = 0; i < kOperands8; ++i) of[i].back = 1.0f / of[i].up;
}

int64_t padded(int64_t size) { return (size + kTurnUnit - 1) / kTurnUnit * kTurnUnit; }

}  // namespace

void CudaModel::require_eight() const {
  int major = 0, minor = 0;
  NG_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, spec_.device));
  NG_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, spec_.device));
  if (major * 10 + minor >= 89) return;
  throw std::invalid_argument("precision: 'fp8' expects a GPU of compute capability 8.9 or newer, got " +
                              cuda_device(spec_.device).name + " of " + std::to_string(major) + "." +
                              std::to_string(minor));
}

void CudaModel::lay_out_eight() {
  const int64_t vocab = padded(spec_.vocab), rows = padded(logit_rows_), dim = spec_.dim;
  const auto take = [&](const char* part, int64_t bytes) { return arena_.take<uint8_t>(part, bytes); };
  eight_.scales = arena_.take<EightScale>("8-bit operands", kOperands8);
  eight_.decoder = take("8-bit operands", vocab * dim);
  eight_.decoder_turned = take("8-bit operands", vocab * dim);
  eight_.broca = take("8-bit operands", rows * dim);
  eight_.broca_turned = take("8-bit operands", rows * dim);
  eight_.errors = take("8-bit operands", rows * vocab);
  eight_.errors_turned = take("8-bit operands", rows * vocab);
}

// Both forms of [rows, columns], or the turned one of bytes; turned_rows of that are wanted.
template <class From>
void CudaModel::turn(Operand8 which, const From* from, int64_t ld, int64_t rows, int64_t columns, uint8_t* straight,
                     uint8_t* turned, int64_t turned_rows) {
  TurnJob<From> job;
  job.from = from, job.from_ld = ld;
  job.rows = static_cast<int>(rows), job.columns = static_cast<int>(columns);
  job.up = &eight_.scales[which].up;
  job.format = which == kErrors8 ? __NV_E5M2 : __NV_E4M3;
  job.straight = straight, job.straight_ld = padded(columns);
  job.straight_rows = straight ? static_cast<int>(padded(rows)) : 0;
  job.turned = turned, job.turned_ld = padded(rows), job.turned_rows = static_cast<int>(turned_rows);
  const auto tiles = [](int64_t size) { return static_cast<unsigned>((size + kTurn - 1) / kTurn); };
  turn_kernel<<<dim3(tiles(job.straight_ld), tiles(job.turned_ld)), kTurnThreads, 0, stream_.get()>>>(job);
  launched();
}

// Scales of the call, and W.
void CudaModel::begin_eight() {
  EightScale* const scales = eight_.scales;
  const auto find_top = [&](auto* x, int64_t count, Operand8 which) {
    const int64_t pieces = (count * sizeof(*x) + sizeof(uint4) - 1) / sizeof(uint4);
    const auto blocks = std::min<int64_t>((pieces + kThreads - 1) / kThreads, kTopBlocks);
    find_top_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_.get()>>>(x, count, &scales[which].top);
    launched();
  };
  NG_CUDA(cudaMemsetAsync(scales, 0, kOperands8 * sizeof(*scales), stream_.get()));
  find_top(static_cast<const bf16*>(decoder_real_), int64_t{spec_.vocab} * spec_.dim, kDecoder8);
  find_top(static_cast<const bf16*>(broca_real_), rows_ * spec_.dim, kBroca8);
  find_top(static_cast<const float*>(target_weights_), rows_, kErrors8);
  choose_scales_kernel<<<1, 1, 0, stream_.get()>>>(verdict_, scales);
  launched();
  turn(kDecoder8, static_cast<const bf16*>(decoder_real_), spec_.dim, spec_.vocab, spec_.dim, eight_.decoder,
       eight_.decoder_turned, spec_.dim);
}

// Rows first .. first + rows of the call: z, as score() wants it.
void CudaModel::logits_of_eight(int64_t first, int64_t rows) {
  const bf16* const broca = static_cast<const bf16*>(broca_real_) + first * spec_.dim;
  turn(kBroca8, broca, spec_.dim, rows, spec_.dim, eight_.broca, eight_.broca_turned, spec_.dim);
  cublas_->multiply_eight(stream_.get(), rows, logit_ld_, spec_.dim,
                          {eight_.broca, spec_.dim, &eight_.scales[kBroca8].back},
                          {eight_.decoder, spec_.dim, &eight_.scales[kDecoder8].back}, 0.0f, logits_, logit_ld_, true);
  launched();
}

// dbroca and dW, from dz in place of z or, as_bytes, in eight_.errors.
void CudaModel::learn_of_eight(int64_t first, int64_t rows, bool as_bytes, bool add) {
  const int64_t dim = spec_.dim, vocab = padded(spec_.vocab), padded_rows = padded(rows);
  if (as_bytes) {
    turn<uint8_t>(kErrors8, eight_.errors, vocab, rows, vocab, nullptr, eight_.errors_turned, spec_.vocab);
  } else {
    turn(kErrors8, static_cast<const bf16*>(logits_), logit_ld_, rows, vocab, eight_.errors, eight_.errors_turned,
         spec_.vocab);
  }
  cublas_->multiply_eight(stream_.get(), rows, dim, vocab, {eight_.errors, vocab, &eight_.scales[kErrors8].back, true},
                          {eight_.decoder_turned, vocab, &eight_.scales[kDecoder8].back}, 0.0f, d_broca_ + first * dim,
                          dim, false);
  launched();
  cublas_->multiply_eight(stream_.get(), spec_.vocab, dim, padded_rows,
                          {eight_.errors_turned, padded_rows, &eight_.scales[kErrors8].back, true},
                          {eight_.broca_turned, padded_rows, &eight_.scales[kBroca8].back}, add ? 1.0f : 0.0f,
                          d_decoder_, dim, false);
  launched();
}

}  // namespace neurogen::cuda
