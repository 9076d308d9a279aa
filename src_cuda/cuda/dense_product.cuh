// The product of a block of threads: 128 x K times K x 256, for operands that many sums share. Both pass through shared
// memory in a ring of stages that cp.async fills: of K, 32 at a time. A stage is twelve squares of 32 x 32 bf16 values,
// four of the left operand and eight of the right; each of the eight warps has the 64 x 64 sums of two by two squares.
//
// A square is 32 contiguous 64-byte rows of global memory. Its rows are either outputs and its columns K (blocks of
// weights, rows of a panel as a product's right side), or the other way round (rows of panels that are summed over):
// then the matrix loads transpose it.
#pragma once

#include <cuda_pipeline.h>

#include "block_product.cuh"

namespace neurogen::cuda {

constexpr int kRingThreads = 256;
constexpr int kLeft = 4, kRight = 8;  // squares of a stage
constexpr int kStages = 4;
constexpr int kSquareBytes = kBlockArea * sizeof(bf16), kStageBytes = (kLeft + kRight) * kSquareBytes;
constexpr int kDenseBytes = kStages * kStageBytes;  // of shared memory: what every GPU from 8.0 on has

// Where 16 bytes of a 64-byte row lie, in units of 16 bytes: parts are swapped so that eight rows of a matrix load meet
// different banks.
__device__ inline int slot64(int row, int part) { return row * 4 + (part ^ (row / 2 % 4)); }

// Four 8 x 8 matrices from shared memory, each transposed on the way or not.
template <bool Transposed>
__device__ inline void load_matrices(unsigned (&out)[4], unsigned row) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  }
}

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// A thread's share of filling a stage: 16 bytes of the same row of squares fill_square(), fill_square() +
// kSquaresAtOnce, ... Squares 0 .. kLeft-1 are the left operand's.
constexpr int kSquaresAtOnce = kRingThreads * 16 / kSquareBytes;
constexpr int kFillStep = kSquaresAtOnce * kSquareBytes;  // from one of a thread's squares to the next
__device__ inline int fill_square() { return threadIdx.x / (kSquareBytes / 16); }
__device__ inline int fill_row() { return threadIdx.x / 4 % kBlock; }
__device__ inline int fill_part() { return threadIdx.x % 4; }

// Starts a copy of 16 bytes to shared memory; of zeros where it does not count, `from` is then not read.
__device__ inline void fill(unsigned to, const bf16* from, bool counts) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(counts ? 16 : 0)
               : "memory");
}

// Transposed: K runs along the rows of squares.
template <bool Transposed>
class DenseProduct {
 public:
  // [16 of the left][8 of the right][values of a lane], see first_left() and first_right()
  float sum[4][8][4];

  explicit __device__ DenseProduct(const uint4* ring) {
    const unsigned lane = threadIdx.x % 32, first = shared_address(ring);
    fill_ = first + fill_square() * kSquareBytes + slot64(fill_row(), fill_part()) * 16;
    // Matrices in the order (rows 0-7, part 0), (8-15, 0), (0-7, 1), (8-15, 1) of 16 rows and two parts, or with the
    // second and the third exchanged. The tensor core wants 8 outputs x 8 of K: the left's next eight outputs before
    // its next eight of K, the right's the other way round.
    const unsigned down = first + slot64(lane % 16, lane / 16) * 16,
                   across = first + slot64(lane / 16 * 8 + lane % 8, lane / 8 % 2) * 16;
    left_ = (Transposed ? across : down) + first_left() / kBlock * kSquareBytes;
    right_ = (Transposed ? down : across) + (kLeft + first_right() / kBlock) * kSquareBytes;
  }

  // The warp's first of 128 and of 256.
  static __device__ int first_left() { return threadIdx.x / 128 * 64; }
  static __device__ int first_right() { return threadIdx.x / 32 % 4 * 64; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j][0] = sum[i][j][1] = sum[i][j][2] = sum[i][j][3] = 0.0f;
    }
  }

  // fetch(to) starts the copies of the next 32 of K, to: this thread's place in its first square. It is called
  // kStages - 1 times more often than step().
  template <class Fetch>
  __device__ void begin(Fetch&& fetch) {
    for (at_ = 0; at_ < kStages - 1; ++at_) start(fetch);
    arrive();
    load(now_, 0);
  }

  // sum += 32 of K. One barrier: what was fetched three steps ago has arrived, and the stage that was read last is free
  // for the next fetch. The next operands are on their way from shared memory while these are multiplied.
  template <class Fetch>
  __device__ void step(Fetch&& fetch) {
    load(next_, 1);
    start(fetch);
    add(now_);
    at_ = (at_ + 1) % kStages;
    arrive();
    load(now_, 0);
    add(next_);
  }

 private:
  struct Operands {  // 16 of K
    unsigned left[4][4], right[4][4];
  };

  // at_: the stage to fill. The one to read is the next of the ring.
  template <class Fetch>
  __device__ void start(Fetch& fetch) {
    fetch(fill_ + at_ * kStageBytes);
    __pipeline_commit();
  }

  static __device__ void arrive() {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
  }

  // Half h of the 32 of K. Within a square 16 rows are 1024 bytes, and two parts are bit 5 (of addresses, too: the ring
  // is aligned to 128 bytes).
  __device__ void load(Operands& to, int h) const {
    const unsigned stage = (at_ + 1) % kStages * kStageBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int down = Transposed ? h : i % 2, across = Transposed ? i % 2 : h;
      const unsigned place = stage + i / 2 * kSquareBytes + down * kSquareBytes / 2;
      load_matrices<Transposed>(to.left[i], place + (left_ ^ across * 32));
      load_matrices<Transposed>(to.right[i], place + (right_ ^ across * 32));
    }
  }

  __device__ void add(const Operands& by) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float (&c)[4] = sum[i][j];
        const unsigned (&a)[4] = by.left[i];
        tensor_product(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], by.right[j / 2][j % 2 * 2],
                       by.right[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  unsigned at_ = 0;
  unsigned fill_, left_, right_;  // in the first stage: where the thread fills, and the lane's rows of matrices
  Operands now_, next_;
};

}  // namespace neurogen::cuda
