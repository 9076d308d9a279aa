// Vocabulary decoder. A chunk of rows at a time, so nothing of size M*V is ever held:
//   z = W broca^T + c                  logits, by cuBLASLt; the bias is added where they are read
//   loss = log(sum exp(z - max z)) + max z - z_target                                          [row]
//   dz = (softmax(z) - onehot(target)) * weight / divisor                     in place of z, as Real
//   dbroca = dz W      dW (+)= dz^T broca      dc (+)= column sums of dz
// Row lengths of the logits are rounded up to 8 values, which keeps every row aligned to 16 bytes; products are told
// the true V, so the padding behind a row never counts. The row kernels move 2V bytes in and 2V out in bf16 (4V each in
// float). There are two. walk_rows_kernel is for bf16 rows of 4,097 to 32,768 logits: a block walks many rows, so that
// its columns' biases stay in shared memory and dc is summed in registers. score_rows_kernel takes every other row; it
// reads 4V of bias a row from the L2 cache, and dc reads the errors once more.
#include <algorithm>
#include <climits>
#include <cmath>

#include "model.h"
#include "numbers.cuh"

namespace neurogen::cuda {
namespace {

constexpr size_t kChunkBytes = size_t{256} << 20;  // of logits at a time: enough rows for products at full speed
constexpr int kRowUnit = 128;                      // rows of a chunk come in multiples of this

constexpr int kPiece = 8;  // neighbouring logits that a thread takes at once: one 16-byte load in bf16
constexpr int kHeld = 4;   // pieces a thread keeps in registers between its passes over a row, where it is long
constexpr int kMaxThreads = 1024;
constexpr int kThreads = 256;
constexpr int kColumns = 32 * kPiece;  // columns of one block of sum_columns_kernel

constexpr int kSlots = 8;  // pieces a thread of walk_rows_kernel owns: 64 sums and 32 words of logits in registers
constexpr int kWalkThreads = 512;      // of a multiprocessor, 128 registers each: all it has
constexpr int kFewestWalk = 128;       // of a block, for rows of more than 4,096
constexpr int kMostProcessors = 160;   // multiprocessors that walk; there is room for the sums of so many
constexpr float kLog2E = 1.44269504f;  // exp(x) = 2^(x log2 e)
constexpr float kLn2 = 0.69314718f;
constexpr float kBelowAll = -2e38f;  // below every logit that counts; times log2 e still finite
constexpr unsigned kWarp = 0xffffffffu;
constexpr size_t kWalkRoom = 2048;  // its shared memory beside the biases, and what the system keeps of a block's

__device__ inline void load_piece(const float* p, float (&x)[kPiece]) {
  const float4 lo = load4(p), hi = load4(p + 4);
  x[0] = lo.x, x[1] = lo.y, x[2] = lo.z, x[3] = lo.w;
  x[4] = hi.x, x[5] = hi.y, x[6] = hi.z, x[7] = hi.w;
}
__device__ inline void unpack(const uint4& raw, float (&x)[kPiece]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  for (int i = 0; i < 4; ++i) {
    const float2 pair = as_floats(words[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}
__device__ inline void load_piece(const bf16* p, float (&x)[kPiece]) { unpack(*reinterpret_cast<const uint4*>(p), x); }
__device__ inline void store_piece(float* p, const float (&x)[kPiece]) {
  store4(p, {x[0], x[1], x[2], x[3]});
  store4(p + 4, {x[4], x[5], x[6], x[7]});
}
__device__ inline uint4 pack_piece(const float (&x)[kPiece]) {
  uint4 raw;
  reinterpret_cast<__nv_bfloat162&>(raw.x) = __floats2bfloat162_rn(x[0], x[1]);
  reinterpret_cast<__nv_bfloat162&>(raw.y) = __floats2bfloat162_rn(x[2], x[3]);
  reinterpret_cast<__nv_bfloat162&>(raw.z) = __floats2bfloat162_rn(x[4], x[5]);
  reinterpret_cast<__nv_bfloat162&>(raw.w) = __floats2bfloat162_rn(x[6], x[7]);
  return raw;
}
__device__ inline void store_piece(bf16* p, const float (&x)[kPiece]) { *reinterpret_cast<uint4*>(p) = pack_piece(x); }

// Good to two bits of the last place; results below 2^-126 are 0. exp2f would take four instructions more to get those
// right, which as bf16 errors are 0 too.
__device__ inline float fast_exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

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

struct ScoreJob {
  int64_t ld;
  int vocab;
  bool want_gradient;
  const float* bias;       // [V], readable up to a whole piece (parameters are padded to kUnit)
  const int32_t* targets;  // [rows], inside 0 .. V-1
  const float* weights;    // [rows]
  float* losses;           // [rows]
  int32_t* best;           // [rows]
  Verdict* verdict;
};

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

// What a thread, a warp or a block knows of its logits z: the highest, the sum of 2^(z log2 e - top log2 e), and where
// the first piece with the highest begins.
struct Softmax {
  float top, sum;
  int first;
};

// __fmul_rn: the same number wherever it is computed; contracted to an FMA it would be another.
__device__ inline float base_of(float top) { return __fmul_rn(top, kLog2E); }

// A warp's together, in one order. The lowest piece with the top is the one with the lowest id.
__device__ inline Softmax merge(const Softmax& own) {
  const float top = warp_max(own.top);
  const float sum = warp_sum(own.sum * fast_exp2(base_of(own.top) - base_of(top)));
  return {top, sum, __reduce_min_sync(kWarp, own.top == top ? own.first : INT_MAX)};
}

// The same by another instruction: the compiler would see the same floats, keep all 64 of them from the first pass to
// the second, and spill.
__device__ inline void unpack_again(const uint4& raw, float (&x)[kPiece]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(__byte_perm(words[i], 0, 0x1044));
    x[2 * i + 1] = __uint_as_float(__byte_perm(words[i], 0, 0x3244));
  }
}

// Rows blockIdx.x, blockIdx.x + gridDim.x, ... of a chunk. A thread has the same pieces of every row: threadIdx.x,
// threadIdx.x + Threads, ... It keeps their logits as they are stored and computes the exponentials twice, once for the
// sum, once for the errors: kept as floats they would leave no register for the sums of columns. As soon as a piece has
// been turned into errors, the next row's takes its registers, and has the rest of this row to arrive.
// part[block, v]: column sums of the block's errors before they are rounded, since the first chunk (go_on: not this
// one). What lies behind a row must be a number: its bias is -inf here, as that of slots without a piece.
template <int Threads>
__global__ void __launch_bounds__(Threads, kWalkThreads / Threads)
    walk_rows_kernel(bf16* logits, int64_t rows, bool go_on, float* part, ScoreJob p) {
  constexpr int kNext = Threads * kPiece;  // from a thread's piece to its next
  extern __shared__ float4 biases[];       // two halves [kSlots, Threads]: neighbours read neighbouring banks
  __shared__ Softmax room[2][32];          // by turns, so that one barrier a row is enough
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, begin = threadIdx.x * kPiece;
  float4* const low = biases + threadIdx.x;
  float4* const high = low + kSlots * Threads;
  const int live = (static_cast<int>(p.ld) - begin + kNext - kPiece) / kNext;  // slots with a piece
  const int64_t leap = gridDim.x * p.ld;

  bf16* at = logits + blockIdx.x * p.ld + begin;  // this thread's first piece
  uint4 raw[kSlots] = {};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k < live && blockIdx.x < rows) raw[k] = *reinterpret_cast<const uint4*>(at + k * kNext);
  }
#pragma unroll 2
  for (int k = 0; k < kSlots; ++k) {  // a thread reads no other's: no barrier
    float c[kPiece] = {};
    const int first = begin + k * kNext;
    if (k < live) load_piece(p.bias + first, c);
    for (int j = 0; j < kPiece; ++j) c[j] = first + j < p.vocab ? c[j] : -INFINITY;
    low[k * Threads] = {c[0], c[1], c[2], c[3]};
    high[k * Threads] = {c[4], c[5], c[6], c[7]};
  }
  const auto with_bias = [&](const float (&x)[kPiece], int k, float (&z)[kPiece]) {
    const float4 lo = low[k * Threads], hi = high[k * Threads];
    z[0] = x[0] + lo.x, z[1] = x[1] + lo.y, z[2] = x[2] + lo.z, z[3] = x[3] + lo.w;
    z[4] = x[4] + hi.x, z[5] = x[5] + hi.y, z[6] = x[6] + hi.z, z[7] = x[7] + hi.w;
  };
  float* const sums_at = part + blockIdx.x * p.ld + begin;
  float sums[kSlots][kPiece] = {};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (go_on && k < live) load_piece(sums_at + k * kNext, sums[k]);
  }

  const double divisor = p.verdict->divisor;
  const float share = divisor > 0 ? static_cast<float>(1.0 / divisor) : 0.0f;
  const int count = static_cast<int>(rows);
  int next_target = blockIdx.x < count ? p.targets[blockIdx.x] : 0;
  float next_weight = blockIdx.x < count ? p.weights[blockIdx.x] : 0.0f;
  for (int row = blockIdx.x, turn = 0; row < count; row += gridDim.x, at += leap, turn ^= 1) {
    const int target = next_target;
    const float weight = next_weight;
    float target_logit = 0.0f;  // of thread 0; it is asked for here, before any error can take its place
    if (threadIdx.x == 0) target_logit = to_float(at[target]) + p.bias[target];

    Softmax own{kBelowAll, 0.0f, begin};
    float base = base_of(kBelowAll);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      float z[kPiece];
      unpack(raw[k], z);
      with_bias(z, k, z);
      const float most =
          fmaxf(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), fmaxf(fmaxf(z[4], z[5]), fmaxf(z[6], z[7])));
      const float before = base;
      if (most > own.top) own.top = most, own.first = begin + k * kNext;
      base = base_of(own.top);
      own.sum *= fast_exp2(before - base);
      for (int j = 0; j < kPiece; ++j) own.sum += fast_exp2(fmaf(z[j], kLog2E, -base));
    }
    const Softmax of_warp = merge(own);
    if (lane == 0) room[turn][warp] = of_warp;
    const bool more = row + gridDim.x < count;
    if (more) next_target = p.targets[row + gridDim.x], next_weight = p.weights[row + gridDim.x];
    __syncthreads();
    const Softmax whole = merge(lane < Threads / 32 ? room[turn][lane] : Softmax{kBelowAll, 0.0f, INT_MAX});
    base = base_of(whole.top);

    if (own.first == whole.first) {  // one thread; a row of NaN has no best id, and gets the last
      uint4 words = raw[0];
      int slot = 0;
#pragma unroll
      for (int k = 1; k < kSlots; ++k) {
        if (own.first == begin + k * kNext) words = raw[k], slot = k;
      }
      float z[kPiece];
      unpack(words, z);
      with_bias(z, slot, z);
      int id = p.vocab - 1;
      for (int j = kPiece - 1; j >= 0; --j) id = z[j] == whole.top ? own.first + j : id;
      p.best[row] = id;
    }
    if (threadIdx.x == 0) {  // from the base that the sum counts from
      const float loss = logf(whole.sum) - kLn2 * fmaf(target_logit, kLog2E, -base);
      p.losses[row] = loss;
      if (weight != 0.0f && !isfinite(loss)) atomicOr(&p.verdict->loss_not_finite, 1);
    }

    const int coming = more ? live : 0;
    const auto bring = [&](int k) {
      if (k < coming) raw[k] = *reinterpret_cast<const uint4*>(at + leap + k * kNext);
    };
    const float scale = weight * share;
    if (!p.want_gradient || scale == 0.0f) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        // A row without weight gets exact zeros, whatever its logits are.
        if (p.want_gradient && k < live) *reinterpret_cast<uint4*>(at + k * kNext) = {};
        bring(k);
      }
      continue;
    }
    const float factor = __fdividef(scale, whole.sum);  // the sum is at most V, or not finite
    const int ahead = target - begin;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      float e[kPiece];
      unpack_again(raw[k], e);
      with_bias(e, k, e);
      for (int j = 0; j < kPiece; ++j) e[j] = fast_exp2(fmaf(e[j], kLog2E, -base)) * factor;
      const int hit = ahead - k * kNext;
      if (0 <= hit && hit < kPiece) {
        for (int j = 0; j < kPiece; ++j) e[j] -= hit == j ? scale : 0.0f;
      }
      for (int j = 0; j < kPiece; ++j) sums[k][j] += e[j];
      const uint4 errors = pack_piece(e);  // not where the store is, which would make a branch of it
      if (k < live) *reinterpret_cast<uint4*>(at + k * kNext) = errors;
      bring(k);
    }
  }
  if (!p.want_gradient) return;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k < live) store_piece(sums_at + k * kNext, sums[k]);
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

// Threads of a block of walk_rows_kernel, by the length of a row; 0: it is not for this model.
int CudaModel::walk_threads() const {
  const int64_t pieces = logit_ld_ / kPiece;
  if (!spec_.bf16 || pieces <= kFewestWalk * kSlots / 2 || pieces > kWalkThreads * kSlots) return 0;
  int threads = kWalkThreads;
  while (threads > kFewestWalk && pieces <= threads / 2 * kSlots) threads /= 2;
  return threads;
}

void CudaModel::lay_out_decoder() {
  logit_ld_ = divide_up(int64_t{spec_.vocab}, int64_t{kPiece}) * kPiece;
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
}

void CudaModel::score(bool want_gradient, bool accumulate) {
  const int64_t vocab = spec_.vocab, dim = spec_.dim;
  const int64_t pieces = logit_ld_ / kPiece;
  const int held = pieces <= kThreads ? 1 : kHeld;
  const int threads = static_cast<int>(std::min<int64_t>(divide_up<int64_t>(pieces, 32 * held) * 32, kMaxThreads));
  const int walkers = walk_threads();
  const size_t walk_bytes = size_t{2} * kSlots * walkers * sizeof(float4);
  const bool walk = walkers > 0 && walk_bytes + kWalkRoom <= shared_limit_;
  // As many blocks as are resident at a time, and the same ones in every chunk: each goes on with its sums.
  const int64_t walks =
      walk ? std::min({int64_t{std::min(processors_, kMostProcessors)} * (kWalkThreads / walkers), logit_rows_, rows_})
           : 0;
  const auto walk_rows = walkers == 512   ? walk_rows_kernel<512>
                         : walkers == 256 ? walk_rows_kernel<256>
                                          : walk_rows_kernel<128>;
  if (walk) {
    NG_CUDA(cudaFuncSetAttribute(walk_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(walk_bytes)));
  }
  const auto add_slices = [&](int64_t slices, bool add) {
    add_slices_kernel<<<static_cast<unsigned>(divide_up<int64_t>(vocab, 32)), 1024, 0, stream_.get()>>>(
        bias_part_, logit_ld_, static_cast<int>(slices), spec_.vocab, add, d_decoder_bias_);
    launched();
  };
  with_real(spec_.bf16, [&](auto real) {
    using Real = decltype(real);
    Real* const logits = static_cast<Real*>(logits_);
    for (int64_t first = 0; first < rows_; first += logit_rows_) {
      const int64_t rows = std::min(logit_rows_, rows_ - first);
      const Real* const broca = static_cast<const Real*>(broca_real_) + first * dim;
      cublas_->multiply(stream_.get(), false, true, rows, vocab, dim, broca, dim, decoder_real_, dim, 0.0f, logits,
                        logit_ld_, true);
      launched();
      const ScoreJob job{logit_ld_,         spec_.vocab,         want_gradient,
                         decoder_bias_,     target_ids_ + first, target_weights_ + first,
                         row_loss_ + first, row_best_ + first,   verdict_};
      if (walk) {
        if (logit_ld_ > vocab) {  // the walk takes whole pieces
          NG_CUDA(cudaMemset2DAsync(logits + vocab, logit_ld_ * sizeof(Real), 0, (logit_ld_ - vocab) * sizeof(Real),
                                    rows, stream_.get()));
        }
        walk_rows<<<static_cast<unsigned>(walks), walkers, walk_bytes, stream_.get()>>>(
            static_cast<bf16*>(logits_), rows, want_gradient && first > 0, bias_part_, job);
      } else {
        const auto kernel = held == 1 ? score_rows_kernel<Real, 1> : score_rows_kernel<Real, kHeld>;
        kernel<<<static_cast<unsigned>(rows), threads, 0, stream_.get()>>>(logits, job);
      }
      launched();
      if (!want_gradient) continue;

      const bool add = accumulate || first > 0;
      cublas_->multiply(stream_.get(), false, false, rows, dim, vocab, logits, logit_ld_, decoder_real_, dim, 0.0f,
                        d_broca_ + first * dim, dim, false);
      launched();
      cublas_->multiply(stream_.get(), true, false, vocab, dim, rows, logits, logit_ld_, broca, dim, add ? 1.0f : 0.0f,
                        d_decoder_, dim, false);
      launched();
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

void CudaModel::logits_on_device(const void* broca_real, int64_t rows, float* out, bool with_bias) {
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
