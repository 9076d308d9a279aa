// Gradient of every stored block: dW[receiver, source] = sum over rows of error[row, receiver] * source[row, source], a
// sampled dense-dense product with K = all rows of the call. Reading is what it costs, so a block of threads has a
// group of blocks that share panels (block_groups.cpp). Warps work in pairs: a pair has up to kEach of the blocks, a
// warp of it half of their receivers. All panels of the group pass through shared memory, some rows at a time. A
// delayed block meets source row r with the error `delay` tokens later; rows of earlier calls are the carried spikes.
// Blocks of dense projections are done in rectangles, which share the errors too (dense_product.cuh).
#include <cuda_pipeline.h>

#include "dense_product.cuh"
#include "model.h"

namespace neurogen::cuda {
namespace {

static_assert(kRectangleRows == kLeft && kRectangleColumns == kRight, "a rectangle is one dense product");

constexpr int kPairs = 2, kEach = kGroupBlocks / kPairs, kHalf = kBlock / 2;
static_assert(kEach * kPairs == kGroupBlocks);
constexpr int kPieceBytes = 1024;  // of a panel: 16 rows of bf16, 8 of float
constexpr int kGroupThreads = kPairs * 2 * 32;
constexpr int kPieceParts = kPieceBytes / sizeof(uint4), kRing = 3;  // pieces of a panel in shared memory

struct Gradients {
  const BlockGroup* groups;
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
__device__ inline int carried_row(int back, int streams) {
  return (back - 1) / streams * streams + (streams - 1 - (back - 1) % streams);
}

// A warp's sum over rows, for kHalf receivers of a block.
template <class Real>
struct HalfSum;

template <>
struct HalfSum<bf16> {
  float sum[4][4] = {};  // [8 sources][values of a lane]

  static __device__ int slot(int row, int part) { return slot64(row, part); }

  __device__ void add(const uint4* errors, const uint4* sources, int half) {
    const int lane = threadIdx.x % 32;
    unsigned a[4], b[2][4];
    // errors: matrices (rows 0-7, receivers 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
    load_matrices<true>(a, shared_address(errors + slot(lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2)));
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      // sources: matrices (rows 0-7, sources 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
      load_matrices<true>(b[right], shared_address(sources + slot(lane / 8 % 2 * 8 + lane % 8, right * 2 + lane / 16)));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float (&c)[4] = sum[j];
      tensor_product(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // Calls body(receiver of the half, source, values of it and of the next) for the lane's part of the block.
  template <class Body>
  __device__ void each(Body body) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) body(g + k * 8, j * 8 + t * 2, float2{sum[j][k * 2], sum[j][k * 2 + 1]});
    }
  }
};

template <>
struct HalfSum<float> {
  float sum[2][8] = {};  // receivers 2g, 2g+1 of the half, sources 8t .. 8t+7

  static __device__ int slot(int row, int part) { return row * 8 + part; }

  __device__ void add(const uint4* errors, const uint4* sources, int half) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int row = 0; row < kPieceBytes / 128; ++row) {
      const float2 e = reinterpret_cast<const float2*>(errors)[slot(row, 0) * 2 + half * 8 + g];
      const float4 lo = reinterpret_cast<const float4*>(sources)[slot(row, 2 * t)];
      const float4 hi = reinterpret_cast<const float4*>(sources)[slot(row, 2 * t + 1)];
      const float error[2] = {e.x, e.y}, source[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(error[i], source[j], sum[i][j]);
      }
    }
  }

  template <class Body>
  __device__ void each(Body body) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) body(g * 2 + i, t * 8 + j, float2{sum[i][j], sum[i][j + 1]});
    }
  }
};

// A panel on its way through shared memory.
struct Passing {
  const uint4* row0;   // of the first piece, which may lie before the panel
  int32_t end, delay;  // rows of all pieces; as in GroupPanel
};

struct GroupRoom {
  uint4 pieces[kRing][kGroupPanels][kPieceParts];
  Passing passing[kGroupPanels];
  BlockGroup group;
  int places[kPairs][(kEach + 3) / 4 * 4];  // of a pair's blocks in a piece: of errors + 65536 of sources, uint4
};

template <class Real>
__global__ void __launch_bounds__(kGroupThreads, kGroupsAtOnce) multiply_errors_kernel(Gradients p) {
  constexpr int kParts = 32 * sizeof(Real) / 16;  // 16-byte parts of a row
  constexpr int kRowsAtOnce = kPieceParts / kParts;
  extern __shared__ uint4 dynamic[];
  GroupRoom& room = *reinterpret_cast<GroupRoom*>(dynamic);
  const BlockGroup& group = room.group;
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(BlockGroup) / sizeof(int)); i += blockDim.x) {
    reinterpret_cast<int*>(&room.group)[i] = reinterpret_cast<const int*>(p.groups + blockIdx.x)[i];
  }
  __syncthreads();
  // Rows of the sources go from -carried (the oldest carried spike) to p.rows - 1, those of pieces from 0 on.
  const int carried = group.longest_delay * p.streams, rows = carried + static_cast<int>(p.rows);
  const int pieces = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  if (threadIdx.x < kGroupPanels) {
    const GroupPanel& panel = group.panel[threadIdx.x];
    const int shift = panel.delay * p.streams;
    room.passing[threadIdx.x] = {static_cast<const uint4*>(panel.row0) + int64_t{shift - carried} * kParts,
                                 rows - shift, panel.delay};
  }
  if (threadIdx.x < kGroupBlocks) {  // blocks that are not there meet panel 0 with itself
    const GroupBlock block = group.block[threadIdx.x];
    room.places[threadIdx.x % kPairs][threadIdx.x / kPairs] = (block.error + block.source * 65536) * kPieceParts;
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = warp / 2, half = warp % 2;

  // Where a row of panel i comes from, and whether it counts: for rows of earlier calls, and for resets.
  const auto look_closer = [&](int i, int row, const uint4*& from, bool& there) {
    const int delay = room.passing[i].delay, back = carried - row;
    if (i >= group.sources) {
      there = there && delay * p.streams >= back;
      if (p.age && delay) there = there && p.age[delay * p.streams - back] >= delay;
    } else if (back > 0) {
      const GroupPanel& source = group.panel[i];
      const int held = p.regions[source.region].history * p.streams;
      from = static_cast<const uint4*>(p.states[source.region].recent) +
             (int64_t{source.panel} * held + carried_row(back, p.streams)) * kParts + lane % kParts;
      there = back <= held;  // the group may have longer delays than the source
    }
  };
  // A warp brings every fourth panel.
  const auto fetch = [&](int piece) {
    const int first = piece * kRowsAtOnce;
    const auto bring = [&](bool plain) {
#pragma unroll 1
      for (int i = warp; i < group.panels; i += kGroupThreads / 32) {
        const Passing panel = room.passing[i];
        const unsigned to =
            shared_address(room.pieces[piece % kRing][i] + HalfSum<Real>::slot(lane / kParts, lane % kParts));
#pragma unroll
        for (int k = 0; k < kPieceParts; k += 32) {
          const int row = first + (lane + k) / kParts;
          const uint4* from = panel.row0 + (int64_t{first} * kParts + lane + k);
          bool there = row < panel.end;
          if (!plain) look_closer(i, row, from, there);
          fill(to + k * static_cast<int>(sizeof(uint4)), reinterpret_cast<const bf16*>(from), there);
        }
      }
    };
    if (first >= rows) {
    } else if (first >= carried && !p.age) {
      bring(true);
    } else {
      bring(false);
    }
    __pipeline_commit();
  };

  HalfSum<Real> sums[kEach];
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) fetch(i);
#pragma unroll 1
  for (int piece = 0; piece < pieces; ++piece) {
    __pipeline_wait_prior(kRing - 2);
    __syncthreads();
    fetch(piece + kRing - 1);  // to where all have read
    const uint4* const all = &room.pieces[piece % kRing][0][0];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = room.places[pair][i];
      sums[i].add(all + place % 65536, all + place / 65536, half);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * kPairs + pair;
    if (at >= group.blocks) break;
    const GroupBlock block = group.block[at];
    float* const out = p.out + int64_t{block.block} * kBlockArea + half * kHalf * kBlock;
    const bool negative = p.negative && group.panel[block.source].region >= 0;
    sums[i].each([&](int receiver, int source, float2 value) {
      float2& to = *reinterpret_cast<float2*>(out + receiver * kBlock + source);
      if (negative) value = {0.0f - value.x, 0.0f - value.y};
      if (p.accumulate) value.x += to.x, value.y += to.y;
      to = value;
    });
  }
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
  const int64_t groups = group_count_ - (embedding_ranges() ? embedded_groups_ : 0);  // else credit_embedding's
  launch(spec_.bf16 ? multiply_errors_kernel<bf16> : multiply_errors_kernel<float>, groups, kGroupThreads,
         sizeof(GroupRoom));
}

}  // namespace neurogen::cuda
