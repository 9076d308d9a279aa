// Matrix products by cuBLASLt, which is loaded at run time (load_cublas in neurogen/model.h) and never linked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace neurogen::cuda {

// A matrix of 8-bit numbers, e4m3 or e5m2; row-major. What it stands for is *scale times that, in device memory.
struct Bytes {
  const void* data;
  int64_t ld;  // a multiple of 16
  const float* scale;
  bool e5m2 = false;
};

// Products of one model, on one stream. Algorithms are chosen once per shape and then kept: same inputs, same bits.
class Cublas {
 public:
  // bf16: operands are bf16 (sums are float); otherwise everything is float and never TF32.
  Cublas(bool bf16, void* workspace, size_t workspace_bytes);
  ~Cublas();

  // c[m, n] = op(a) op(b) + beta * c, all row-major: op(a) is [m, k], op(b) is [k, n]. `transpose_a`: a is stored
  // [k, m]. a and b are Real; c is float or, with `real_c`, Real.
  void multiply(cudaStream_t stream, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const void* a,
                int64_t lda, const void* b, int64_t ldb, float beta, void* c, int64_t ldc, bool real_c);
  // c[m, n] = a b^T + beta * c: a is [m, k], b is [n, k] and e4m3; n and k are multiples of 16. c is float or, with
  // `real_c`, Real.
  void multiply_eight(cudaStream_t stream, int64_t m, int64_t n, int64_t k, const Bytes& a, const Bytes& b, float beta,
                      void* c, int64_t ldc, bool real_c);

 private:
  struct Plans;
  std::unique_ptr<Plans> plans_;
};

}  // namespace neurogen::cuda
