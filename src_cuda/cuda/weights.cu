// Gradient of every stored block: dW[receiver, source] = sum over rows of error[row, receiver] * source[row, source], a
// sampled dense-dense product with K = all rows of the call. Reading is what it costs, so blocks that hear the same 32
// sources are done together: a block of threads takes 32 sources and up to kGroup of their weight blocks, one a warp.
// Rows pass through shared memory in pieces, the sources once for all warps. A delayed block meets source row r with
// the error `delay` tokens later; rows of earlier calls are the carried spikes.
// Blocks of dense projections are done in rectangles, which share the errors too (dense_product.cuh).
#include <cuda_pipeline.h>

#include "dense_product.cuh"
#include "model.h"

namespace neurogen::cuda {
namespace {

static_assert(kRectangleRows == kLeft && kRectangleColumns == kRight, "a rectangle is one dense product");

constexpr int kPieceBytes = 4096;  // of 32 columns: 64 rows of bf16, 32 of float

struct Gradients {
  const SourceGroup* groups;
  const Rectangle* rectangles;
  const RegionView* regions;
  const StateView* states;
  const int32_t* age;    // null = no resets
  float* out;            // [blocks, 32, 32]
  int64_t rows, stride;  // stride: values from a panel to the next
  int streams;
  bool accumulate;
  bool negative;  // spikes, see CudaModel::hush
};

// Where a row of the sources of earlier calls is, `back` rows before the call's first, among the carried ones of its
// panel: those are [K, S] rows, newest token first, streams in order.
__device__ inline int64_t carried_row(int64_t back, int streams) {
  return (back - 1) / streams * streams + (streams - 1 - (back - 1) % streams);
}

// A warp's sum over the rows of a piece.
template <class Real>
struct BlockSum;

template <>
struct BlockSum<bf16> {
  float sum[2][4][4] = {};  // [16 receivers][8 sources][values of a lane]

  static __device__ int slot(int row, int part) { return slot64(row, part); }

  __device__ void add(const uint4* errors, const uint4* sources) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kPieceBytes / 64; k += 16) {
      unsigned a[2][4], b[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // errors: matrices (rows 0-7, receivers 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
        load_matrices<true>(a[half],
                            shared_address(errors + slot(k + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2)));
        // sources: matrices (rows 0-7, sources 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
        load_matrices<true>(b[half],
                            shared_address(sources + slot(k + lane / 8 % 2 * 8 + lane % 8, half * 2 + lane / 16)));
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

  // Calls body(receiver, source, value) for the lane's part of the block.
  template <class Body>
  __device__ void each(Body body) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) body(i * 16 + g + k / 2 * 8, j * 8 + t * 2 + k % 2, sum[i][j][k]);
      }
    }
  }
};

template <>
struct BlockSum<float> {
  float sum[4][8] = {};  // receivers 4g .. 4g+3, sources 8t .. 8t+7

  static __device__ int slot(int row, int part) { return row * 8 + part; }

  __device__ void add(const uint4* errors, const uint4* sources) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int row = 0; row < kPieceBytes / 128; ++row) {
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

  template <class Body>
  __device__ void each(Body body) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) body(g * 4 + i, t * 8 + j, sum[i][j]);
    }
  }
};

template <class Real>
__global__ void __launch_bounds__(kGroup * 32) multiply_errors_kernel(Gradients p) {
  constexpr int kParts = 32 * sizeof(Real) / 16;  // 16-byte parts of a row
  constexpr int kRowsAtOnce = kPieceBytes / 16 / kParts, kPieceParts = kPieceBytes / 16;
  extern __shared__ uint4 room[];  // [2 buffers][sources, then the errors of each warp][kPieceParts]
  const SourceGroup& group = p.groups[blockIdx.x];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const BlockJob job = group.jobs[warp];
  const bool busy = warp < group.count;
  const int64_t carried = int64_t{group.longest_delay} * p.streams, shift = int64_t{job.delay} * p.streams;
  const auto buffer = [&](int64_t piece, int which) { return room + (piece % 2 * (1 + kGroup) + which) * kPieceParts; };

  // Rows of the sources go from -carried (the oldest carried spike) to rows - 1.
  const auto fetch = [&](int64_t piece) {
    const int64_t first = piece * kRowsAtOnce - carried;
    if (threadIdx.x < kPieceParts) {
      const int row = threadIdx.x / kParts, part = threadIdx.x % kParts;
      const int64_t from = first + row;
      const Real* at = static_cast<const Real*>(group.source) + from * kBlock;
      if (from < 0) {
        const int64_t panel = int64_t{group.panel} * p.regions[group.region].history * p.streams;
        at = static_cast<const Real*>(p.states[group.region].recent) + (panel + carried_row(-from, p.streams)) * kBlock;
      }
      const bool there = from < p.rows;
      __pipeline_memcpy_async(buffer(piece, 0) + BlockSum<Real>::slot(row, part),
                              reinterpret_cast<const uint4*>(there ? at : group.source) + (there ? part : 0), 16,
                              there ? 0 : 16);
    }
#pragma unroll
    for (int i = 0; busy && i < kPieceParts / 32; ++i) {
      const int row = (i * 32 + lane) / kParts, part = (i * 32 + lane) % kParts;
      const int64_t at = first + row + shift;
      bool there = at >= 0 && at < p.rows;
      if (there && p.age && job.delay) there = p.age[at] >= job.delay;
      const Real* from = static_cast<const Real*>(job.error) + (there ? at * kBlock : 0);
      __pipeline_memcpy_async(buffer(piece, 1 + warp) + BlockSum<Real>::slot(row, part),
                              reinterpret_cast<const uint4*>(from) + part, 16, there ? 0 : 16);
    }
    __pipeline_commit();
  };

  BlockSum<Real> sum;
  const int64_t pieces = (carried + p.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  fetch(0);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    if (piece + 1 < pieces) {
      fetch(piece + 1);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    if (busy) sum.add(buffer(piece, 1 + warp), buffer(piece, 0));
    __syncthreads();
  }
  if (!busy) return;
  float* out = p.out + int64_t{job.block} * kBlockArea;
  const bool negative = p.negative && group.region >= 0;
  sum.each([&](int receiver, int source, float value) {
    float& to = out[receiver * kBlock + source];
    if (negative) value = 0.0f - value;
    to = p.accumulate ? to + value : value;
  });
}

// A block of threads takes a rectangle: the errors are the left operand, the sources the right one, and K runs over the
// rows of the errors; the sources' are `delay` tokens before them. Squares that a smaller rectangle lacks are zeros.
__global__ void __launch_bounds__(kRingThreads, 1) multiply_rectangle_kernel(Gradients p) {
  extern __shared__ __align__(128) uint4 ring[];
  const Rectangle job = p.rectangles[blockIdx.x];
  const int rows = static_cast<int>(p.rows), shift = job.delay * p.streams;
  const int32_t* ages = job.delay ? p.age : nullptr;
  // The thread's row of the next stage in its first square of each operand, and its age, which is read a stage ahead.
  int row = fill_row(), age = 0;
  const int64_t place = fill_square() * p.stride + row * kBlock + fill_part() * 8;
  const bf16* error = static_cast<const bf16*>(job.error) + place;
  const bf16* source = static_cast<const bf16*>(job.source) + place - int64_t{shift} * kBlock;
  const auto look = [&] {
    if (ages && row < rows) age = ages[row];
  };
  const auto fetch = [&](unsigned to) {
    const bool counts = row < rows && !(ages && age < job.delay);
    const auto bring = [&](int first, int squares, int present, const bf16* from, int64_t stride) {
#pragma unroll
      for (int i = 0; i < squares / kSquaresAtOnce; ++i, from += kSquaresAtOnce * stride) {
        fill(to + first * kSquareBytes + i * kFillStep, from, counts && i * kSquaresAtOnce + fill_square() < present);
      }
    };
    bring(0, kLeft, job.rows, error, p.stride);
    const bf16* from = source;
    int64_t stride = p.stride;
    if (row < shift) {  // carried
      stride = int64_t{p.regions[job.region].history} * p.streams * kBlock;
      from = static_cast<const bf16*>(p.states[job.region].recent) + (job.panel + fill_square()) * stride +
             carried_row(shift - row, p.streams) * kBlock + fill_part() * 8;
    }
    bring(kLeft, kRight, job.columns, from, stride);
    row += kBlock, error += kBlockArea, source += kBlockArea;
    look();
  };
  DenseProduct<true> product(ring);
  product.clear();
  look();
  product.begin(fetch);
  for (int done = 0; done < rows; done += kBlock) product.step(fetch);
  __pipeline_wait_prior(0);  // zeros beyond the last row

  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int down = product.first_left() / kBlock + i / 2, along = product.first_right() / kBlock + j / 4;
      if (down >= job.rows || along >= job.columns) continue;
      float* out = p.out + (int64_t{job.block} + down * job.row_blocks + along) * kBlockArea;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2& to = *reinterpret_cast<float2*>(out + (i % 2 * 16 + half * 8 + g) * kBlock + j % 4 * 8 + 2 * t);
        float2 sum = {product.sum[i][j][2 * half], product.sum[i][j][2 * half + 1]};
        if (p.negative && job.region >= 0) sum = {0.0f - sum.x, 0.0f - sum.y};
        if (p.accumulate) sum.x += to.x, sum.y += to.y;
        to = sum;
      }
    }
  }
}

}  // namespace

void CudaModel::weight_gradients(bool accumulate) {
  constexpr int kShared = 2 * (1 + kGroup) * kPieceBytes;
  const Gradients job{groups_,    rectangles_, region_views_,  active_->views(), has_resets_ ? age_ : nullptr,
                      gradients_, rows_,       panel_values(), call_streams_,    accumulate,
                      negative_};
  const auto launch = [&](auto kernel, int64_t grid, int threads, int shared) {
    if (!grid) return;
    NG_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<static_cast<unsigned>(grid), threads, shared, stream_.get()>>>(job);
    launched();
  };
  launch(multiply_rectangle_kernel, rectangle_count_, kRingThreads, kDenseBytes);
  launch(spec_.bf16 ? multiply_errors_kernel<bf16> : multiply_errors_kernel<float>, group_count_, kGroup * 32, kShared);
}

}  // namespace neurogen::cuda
