// Gradient of the embedding: dE/dx of every row, then the sum of the rows of each token, in row order and without float
// atomics. Rows are sorted by token id (stable); a block of threads walks kSegmentRows sorted rows and adds up runs of
// equal ids. A run that crosses from one piece to the next leaves its part there, and a second launch joins the parts.
#include <cub/device/device_radix_sort.cuh>

#include "batched_product.cuh"

namespace neurogen::cuda {
namespace {

constexpr int kRunThreads = 128;

struct Segments {
  const uint32_t *ids, *rows;  // sorted, [M]
  const float* dx;             // [M, D]
  float *head, *tail;          // [pieces, D]: of the run a piece begins in the midst of, and of the one it leaves open
  float* gradient;             // [V, D], added to
  uint8_t* touched;            // [V]
  int64_t count, dim;
};

__global__ void name_rows_kernel(const int32_t* ids, int64_t rows, uint32_t* keys, uint32_t* numbers) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  keys[row] = static_cast<uint32_t>(ids[row]);
  numbers[row] = static_cast<uint32_t>(row);
}

__device__ inline float4 sum_of(const float4& x, const float4& y) {
  return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
}

// A thread four columns; all rows of the piece are on their way before the first is added.
__global__ void __launch_bounds__(kRunThreads) add_runs_kernel(Segments p) {
  const int64_t first = int64_t{blockIdx.x} * kSegmentRows, j = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * 4;
  const int count = static_cast<int>(min(int64_t{kSegmentRows}, p.count - first));
  if (j >= p.dim) return;
  float4 ahead[kSegmentRows];
#pragma unroll
  for (int i = 0; i < kSegmentRows; ++i) ahead[i] = load4(p.dx + p.rows[first + min(i, count - 1)] * p.dim + j);
  float4 sum = {0, 0, 0, 0};
  bool begun_before = first > 0 && p.ids[first - 1] == p.ids[first];
#pragma unroll
  for (int i = 0; i < kSegmentRows; ++i) {
    if (i >= count) break;
    const uint32_t id = p.ids[first + i];
    sum = sum_of(sum, ahead[i]);
    const bool run_ends = first + i + 1 == p.count || p.ids[first + i + 1] != id;
    if (!run_ends && i + 1 < count) continue;
    if (begun_before) {
      store4(p.head + blockIdx.x * p.dim + j, sum);
    } else if (!run_ends) {
      store4(p.tail + blockIdx.x * p.dim + j, sum);
    } else {
      float* const to = p.gradient + id * p.dim + j;
      store4(to, sum_of(load4(to), sum));
      if (j == 0) p.touched[id] = 1;
    }
    sum = {0, 0, 0, 0};
    begun_before = false;
  }
}

// Joins the run that piece blockIdx.x leaves open, if it begins there.
__global__ void join_runs_kernel(Segments p) {
  const int64_t first = int64_t{blockIdx.x} * kSegmentRows, next = first + kSegmentRows;
  if (next >= p.count) return;
  const uint32_t id = p.ids[next - 1];
  if (p.ids[next] != id) return;
  if (first > 0 && p.ids[first] == id && p.ids[first - 1] == id) return;  // began earlier
  for (int64_t j = threadIdx.x; j < p.dim; j += blockDim.x) {
    float sum = p.tail[blockIdx.x * p.dim + j];
    for (int64_t piece = blockIdx.x + 1, begin = next; begin < p.count && p.ids[begin] == id;
         ++piece, begin += kSegmentRows) {
      sum += p.head[piece * p.dim + j];
    }
    p.gradient[id * p.dim + j] += sum;
    if (j == 0) p.touched[id] = 1;
  }
}

// A warp a row of the embedding: rows with a gradient (or all) become zero.
__global__ void clear_rows_kernel(float* gradient, uint8_t* touched, int64_t vocab, int64_t dim, bool all) {
  const int64_t id = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (id >= vocab || !(all || touched[id])) return;
  for (int64_t j = threadIdx.x % 32 * 4; j < dim; j += 128) store4(gradient + id * dim + j, {0, 0, 0, 0});
  __syncwarp();
  if (threadIdx.x % 32 == 0) touched[id] = 0;
}

struct StoreError {
  float* out;
  int64_t dim;
  __device__ auto open(int tile, int lane) const {
    return [to = out + tile * kBlock + lane, dim = dim](int64_t row, float4 sums) { store4(to + row * dim, sums); };
  }
};

int id_bits(int vocab) {
  int bits = 1;
  while ((int64_t{1} << bits) < vocab) ++bits;
  return bits;
}

}  // namespace

// Alternates of keys and rows, and the sort's tables; known before there is a device, and checked once there is one.
size_t CudaModel::sort_bytes() const { return static_cast<size_t>(16 * capacity_ + (1 << 20)); }

void CudaModel::check_sort_bytes() const {
  size_t bytes = 0;
  NG_CUDA(cub::DeviceRadixSort::SortPairs(nullptr, bytes, sort_keys_, sorted_ids_, sort_rows_, sorted_rows_,
                                          static_cast<int>(capacity_), 0, id_bits(spec_.vocab)));
  if (bytes > sort_bytes()) {
    throw std::logic_error("sort scratch: expected at most " + std::to_string(sort_bytes()) + " bytes, got " +
                           std::to_string(bytes));
  }
}

// Tied: the decoder's gradient has just overwritten it, or is being added to.
void CudaModel::clear_embedding_gradient() {
  if (spec_.tied) return;
  const int64_t threads = int64_t{spec_.vocab} * 32;
  clear_rows_kernel<<<static_cast<int>((threads + 255) / 256), 256, 0, stream_.get()>>>(
      d_embedding_, row_touched_, spec_.vocab, spec_.dim, scan_embedding_rows_);
  launched();
}

void CudaModel::embedding_gradient(bool accumulate) {
  if (const int ranges = embedding_ranges()) {
    credit_embedding(ranges, accumulate);
  } else {
    with_real(spec_.bf16, [&](auto real) {
      launched(multiply_blocks<decltype(real)>(stream_.get(), embed_pull_, transposed_blocks_, rows_, 0,
                                               spec_.dim / kBlock, StoreError{dx_, spec_.dim}));
    });
  }
  name_rows_kernel<<<static_cast<int>((rows_ + 255) / 256), 256, 0, stream_.get()>>>(ids_, rows_, sort_keys_,
                                                                                     sort_rows_);
  launched();
  size_t bytes = sort_bytes();
  NG_CUDA(cub::DeviceRadixSort::SortPairs(sort_scratch_, bytes, sort_keys_, sorted_ids_, sort_rows_, sorted_rows_,
                                          static_cast<int>(rows_), 0, id_bits(spec_.vocab), stream_.get()));
  launched();
  const Segments job{sorted_ids_,  sorted_rows_, dx_,   head_part_, tail_part_,
                     d_embedding_, row_touched_, rows_, spec_.dim};
  const int pieces = static_cast<int>((rows_ + kSegmentRows - 1) / kSegmentRows);
  add_runs_kernel<<<dim3(pieces, (spec_.dim / 4 + kRunThreads - 1) / kRunThreads), kRunThreads, 0, stream_.get()>>>(
      job);
  launched();
  join_runs_kernel<<<pieces, 256, 0, stream_.get()>>>(job);
  launched();
}

}  // namespace neurogen::cuda
