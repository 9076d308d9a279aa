// Gradient of every stored block: dW[receiver, source] = sum over rows of error[row, receiver] * source[row, source], a
// sampled dense-dense product with K = all rows of the call. A block of four warps takes one weight block: rows pass
// through shared memory in pieces, each warp multiplies its share of a piece, and the four sums are added in one order.
// A delayed source is read `delay` tokens back, beyond the call's first token from the carried spikes.
#include "block_product.cuh"
#include "model.h"

namespace neurogen::cuda {
namespace {

constexpr int kWarps = 4;

struct Gradients {
  const BlockJob* jobs;
  const StateView* states;
  const int32_t* age;  // null = no resets
  float* out;          // [blocks, 32, 32]
  int64_t rows;
  int streams;
  bool accumulate;
};

// 16 bytes of the source of one row.
__device__ uint4 source_piece(const Gradients& p, const BlockJob& job, int64_t row, int piece, const bf16*) {
  const int64_t from = row - int64_t{job.delay} * p.streams;
  if (p.age && job.delay && p.age[row] < job.delay) return {0, 0, 0, 0};
  if (from >= 0) {
    return *reinterpret_cast<const uint4*>(static_cast<const bf16*>(job.source) + from * job.source_ld + piece * 8);
  }
  // Row -1-b' of the history [K, S, n], newest token first, streams in order.
  const int64_t back = -1 - from, carried = back / p.streams * p.streams + (p.streams - 1 - back % p.streams);
  const float* at = p.states[job.region].spikes + carried * job.source_ld + job.column + piece * 8;
  uint4 out;
  store4(reinterpret_cast<bf16*>(&out.x), load4(at));
  store4(reinterpret_cast<bf16*>(&out.z), load4(at + 4));
  return out;
}

__device__ uint4 source_piece(const Gradients& p, const BlockJob& job, int64_t row, int piece, const float*) {
  const int64_t from = row - int64_t{job.delay} * p.streams;
  if (p.age && job.delay && p.age[row] < job.delay) return {0, 0, 0, 0};
  if (from >= 0) {
    return *reinterpret_cast<const uint4*>(static_cast<const float*>(job.source) + from * job.source_ld + piece * 4);
  }
  const int64_t back = -1 - from, carried = back / p.streams * p.streams + (p.streams - 1 - back % p.streams);
  return *reinterpret_cast<const uint4*>(p.states[job.region].spikes + carried * job.source_ld + job.column +
                                         piece * 4);
}

// Four 8 x 8 matrices from shared memory, each transposed on the way.
__device__ void load_transposed(unsigned (&out)[4], const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at));
}

template <class Real>
struct Piece;  // rows that pass through shared memory at a time, and how a warp multiplies them

template <>
struct Piece<bf16> {
  static constexpr int kRowsAtOnce = 128;
  // 64-byte rows; 16-byte pieces are swapped so that eight rows of a matrix load meet different banks.
  static __device__ int slot(int row, int piece) { return row * 4 + (piece ^ (row / 2 % 4)); }

  float sum[2][4][4] = {};  // [16 receivers][8 sources][values of a lane]

  __device__ void multiply(const uint4* errors, const uint4* sources) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row0 = warp * 32 + k * 16;
      unsigned a[2][4], b[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // errors: matrices (rows 0-7, receivers 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
        load_transposed(a[half], errors + slot(row0 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
        // sources: matrices (rows 0-7, sources 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
        load_transposed(b[half], sources + slot(row0 + lane / 8 % 2 * 8 + lane % 8, half * 2 + lane / 16));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float (&c)[4] = sum[i][j];
          tensor_product(c[0], c[1], c[2], c[3], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][j % 2 * 2],
                         b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // The warp's sums as a plain [32, 32] block.
  __device__ void put(float* block) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        float* at = block + (i * 16 + g) * kBlock + j * 8 + t * 2;
        at[0] = sum[i][j][0], at[1] = sum[i][j][1];
        at[8 * kBlock] = sum[i][j][2], at[8 * kBlock + 1] = sum[i][j][3];
      }
    }
  }
};

template <>
struct Piece<float> {
  static constexpr int kRowsAtOnce = 64;
  static __device__ int slot(int row, int piece) { return row * 8 + piece; }

  float sum[4][8] = {};  // receivers 4g .. 4g+3, sources 8t .. 8t+7

  __device__ void multiply(const uint4* errors, const uint4* sources) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
    for (int row = warp * 16; row < warp * 16 + 16; ++row) {
      const float4 e = reinterpret_cast<const float4*>(errors)[slot(row, g)];
      const float4 lo = reinterpret_cast<const float4*>(sources)[slot(row, 2 * t)];
      const float4 hi = reinterpret_cast<const float4*>(sources)[slot(row, 2 * t + 1)];
      const float error[4] = {e.x, e.y, e.z, e.w}, source[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(error[i], source[j], sum[i][j]);
      }
    }
  }

  __device__ void put(float* block) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 8; ++j) block[(g * 4 + i) * kBlock + t * 8 + j] = sum[i][j];
    }
  }
};

template <class Real>
__global__ void __launch_bounds__(kWarps * 32) multiply_errors_kernel(Gradients p) {
  constexpr int kAtOnce = Piece<Real>::kRowsAtOnce, kPieces = 32 * sizeof(Real) / 16;  // 16-byte pieces of a row
  constexpr int kLoads = kAtOnce * kPieces / (kWarps * 32);
  __shared__ uint4 room[2 * kAtOnce * kPieces];  // errors, sources; later the four warps' sums
  static_assert(sizeof(room) == kWarps * kBlockArea * sizeof(float));
  uint4 *errors = room, *sources = room + kAtOnce * kPieces;
  const BlockJob job = p.jobs[blockIdx.x];
  Piece<Real> sums;
  uint4 error_ahead[kLoads], source_ahead[kLoads];
  const auto fetch = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = i * kWarps * 32 + threadIdx.x, piece = at % kPieces;
      const int64_t row = first + at / kPieces;
      error_ahead[i] = source_ahead[i] = uint4{0, 0, 0, 0};
      if (row >= p.rows) continue;
      error_ahead[i] = *reinterpret_cast<const uint4*>(static_cast<const Real*>(job.error) + row * job.error_ld +
                                                       piece * (16 / sizeof(Real)));
      source_ahead[i] = source_piece(p, job, row, piece, static_cast<const Real*>(nullptr));
    }
  };
  fetch(0);
  for (int64_t first = 0; first < p.rows; first += kAtOnce) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = i * kWarps * 32 + threadIdx.x, slot = Piece<Real>::slot(at / kPieces, at % kPieces);
      errors[slot] = error_ahead[i];
      sources[slot] = source_ahead[i];
    }
    __syncthreads();
    if (first + kAtOnce < p.rows) fetch(first + kAtOnce);
    sums.multiply(errors, sources);
  }
  __syncthreads();
  float* parts = reinterpret_cast<float*>(room);
  sums.put(parts + threadIdx.x / 32 * kBlockArea);
  __syncthreads();
  float* out = p.out + int64_t{blockIdx.x} * kBlockArea;
  for (int i = threadIdx.x; i < kBlockArea; i += kWarps * 32) {
    const float sum = parts[i] + parts[kBlockArea + i] + parts[2 * kBlockArea + i] + parts[3 * kBlockArea + i];
    out[i] = p.accumulate ? out[i] + sum : sum;
  }
}

}  // namespace

void CudaModel::weight_gradients(bool accumulate) {
  if (!blocks_) return;
  const Gradients job{jobs_,         active_->views(), has_resets_ ? age_ : nullptr, gradients_, rows_,
                      call_streams_, accumulate};
  with_real(spec_.bf16, [&](auto real) {
    multiply_errors_kernel<decltype(real)><<<static_cast<unsigned>(blocks_), kWarps * 32, 0, stream_.get()>>>(job);
  });
  launched();
}

}  // namespace neurogen::cuda
