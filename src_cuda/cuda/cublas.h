// Matrix products by cuBLASLt, which is loaded at run time (load_cublas in neurogen/model.h) and never linked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace neurogen::cuda {

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

 private:
  struct Plans;
  std::unique_ptr<Plans> plans_;
};

}  // namespace neurogen::cuda
