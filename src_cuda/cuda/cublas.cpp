// cuBLASLt at run time: the library comes from dlopen, so the package neither links it nor needs it for import, and
// every call goes through a table of function pointers whose types are those of <cublasLt.h>.
//
// cuBLASLt is column-major. A row-major [r, c] array of row length ld is its column-major [c, r] matrix of the same ld,
// so c = op(a) op(b) is asked for as c^T = op(b)^T op(a)^T: the operands change places, the transpose flags stay.
//
// Same inputs, same bits: the algorithm of a shape is chosen once, by the library's heuristic alone, on a workspace of
// our own. A sum over k that is split may only be put together from parts in the workspace, in a separate step
// (CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, which also keeps the parts in float). INPLACE adds the parts to the output
// one after the other, but in the order in which they finish.
#include "cublas.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "neurogen/model.h"

namespace neurogen {
namespace cuda {
namespace {

// Every function of cuBLASLt that is called here, without the prefix "cublasLt".
#define NG_CUBLAS_FUNCTIONS(X)                                                                                       \
  X(Create)                                                                                                          \
  X(Destroy)                                                                                                         \
  X(GetStatusName)                                                                                                   \
  X(MatmulDescCreate)                                                                                                \
  X(MatmulDescDestroy) X(MatmulDescSetAttribute) X(MatrixLayoutCreate) X(MatrixLayoutDestroy)                        \
      X(MatmulPreferenceCreate) X(MatmulPreferenceDestroy) X(MatmulPreferenceSetAttribute) X(MatmulAlgoGetHeuristic) \
          X(Matmul)

struct Library {
#define NG_DECLARE(name) decltype(&cublasLt##name) name = nullptr;
  NG_CUBLAS_FUNCTIONS(NG_DECLARE)
#undef NG_DECLARE
  bool loaded = false;
};

std::mutex loading;
Library library;  // written once, under the lock, before any Cublas exists

constexpr const char* kAdvice = "install it with: pip install nvidia-cublas";

std::string last_dl_error() {
  const char* text = dlerror();
  return text ? text : "unknown error";
}

// Fills `out` from the file; what went wrong, or an empty string. A library that does not fit is closed again, one that
// does stays open for the life of the process.
std::string open_library(const std::string& path, Library* out) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) return last_dl_error();
  std::string missing;
  const auto find = [&](const char* name) {
    void* const symbol = dlsym(handle, name);
    if (!symbol) missing = name;
    return symbol;
  };
#define NG_FIND(name) out->name = reinterpret_cast<decltype(out->name)>(find("cublasLt" #name));
  NG_CUBLAS_FUNCTIONS(NG_FIND)
#undef NG_FIND
  if (missing.empty()) return missing;
  dlclose(handle);
  return path + ": has no " + missing;
}

void check_status(cublasStatus_t status, const char* expression, const char* file, int line) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  cudaGetLastError();  // a failed launch must not be reported again by the next check
  throw std::runtime_error(std::string("cuBLASLt: ") + library.GetStatusName(status) + " in " + expression + " at " +
                           file + ":" + std::to_string(line));
}
#define NG_CUBLAS(expression) check_status((expression), #expression, __FILE__, __LINE__)

struct DestroyHandle {
  void operator()(cublasLtContext* handle) const { library.Destroy(handle); }
};
struct DestroyProduct {
  void operator()(cublasLtMatmulDescOpaque_t* product) const { library.MatmulDescDestroy(product); }
};
struct DestroyLayout {
  void operator()(cublasLtMatrixLayoutOpaque_t* layout) const { library.MatrixLayoutDestroy(layout); }
};
struct DestroyPreference {
  void operator()(cublasLtMatmulPreferenceOpaque_t* preference) const { library.MatmulPreferenceDestroy(preference); }
};
using Handle = std::unique_ptr<cublasLtContext, DestroyHandle>;
using Product = std::unique_ptr<cublasLtMatmulDescOpaque_t, DestroyProduct>;
using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t, DestroyLayout>;
using Preference = std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, DestroyPreference>;

Handle new_handle() {
  {
    const std::lock_guard<std::mutex> lock(loading);
    if (!library.loaded) throw std::runtime_error(std::string("cuBLASLt is not loaded; ") + kAdvice);
  }
  cublasLtHandle_t handle = nullptr;
  NG_CUBLAS(library.Create(&handle));
  return Handle(handle);
}

Layout new_layout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t ld) {
  cublasLtMatrixLayout_t layout = nullptr;
  NG_CUBLAS(library.MatrixLayoutCreate(&layout, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), ld));
  return Layout(layout);
}

Product new_product(bool transpose_left, bool transpose_right) {
  cublasLtMatmulDesc_t product = nullptr;
  // float throughout; COMPUTE_32F never rounds float operands to TF32.
  NG_CUBLAS(library.MatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  Product out(product);
  const cublasOperation_t left = transpose_left ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t right = transpose_right ? CUBLAS_OP_T : CUBLAS_OP_N;
  NG_CUBLAS(library.MatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &left, sizeof(left)));
  NG_CUBLAS(library.MatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &right, sizeof(right)));
  return out;
}

// Largest power of two that divides the address, up to the 256 bytes beyond which the library does not ask.
uint32_t alignment(const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}

// Everything that the choice of an algorithm may depend on.
struct Shape {
  cudaDataType_t a, b, c;
  bool transpose_a, transpose_b;
  int64_t m, n, k, lda, ldb, ldc;
  uint32_t align_a, align_b, align_c;
  const float *scale_a = nullptr, *scale_b = nullptr;  // of bytes

  auto tie() const {
    return std::make_tuple(a, b, c, transpose_a, transpose_b, m, n, k, lda, ldb, ldc, align_a, align_b, align_c,
                           scale_a, scale_b);
  }
  bool operator<(const Shape& other) const { return tie() < other.tie(); }
};

// A product in the library's terms: left = our b, right = our a.
struct Plan {
  Product product;
  Layout left, right, out;
  cublasLtMatmulAlgo_t algorithm;
};

}  // namespace

struct Cublas::Plans {
  Plans(bool bf16, void* workspace, size_t workspace_bytes)
      : real(bf16 ? CUDA_R_16BF : CUDA_R_32F), workspace(workspace), workspace_bytes(workspace_bytes) {}

  const Plan& find(const Shape& shape) {
    const auto known = plans.find(shape);
    return known != plans.end() ? known->second : plans.emplace(shape, make(shape)).first->second;
  }

  Plan make(const Shape& s) const {
    Plan plan;
    plan.product = new_product(s.transpose_b, s.transpose_a);
    const auto scale = [&](cublasLtMatmulDescAttributes_t which, const float* by) {
      if (by) NG_CUBLAS(library.MatmulDescSetAttribute(plan.product.get(), which, &by, sizeof(by)));
    };
    scale(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, s.scale_b);
    scale(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, s.scale_a);
    plan.left = s.transpose_b ? new_layout(s.b, s.k, s.n, s.ldb) : new_layout(s.b, s.n, s.k, s.ldb);
    plan.right = s.transpose_a ? new_layout(s.a, s.m, s.k, s.lda) : new_layout(s.a, s.k, s.m, s.lda);
    plan.out = new_layout(s.c, s.n, s.m, s.ldc);

    cublasLtMatmulPreference_t wish = nullptr;
    NG_CUBLAS(library.MatmulPreferenceCreate(&wish));
    const Preference owner(wish);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      NG_CUBLAS(library.MatmulPreferenceSetAttribute(wish, attribute, &value, sizeof(value)));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{workspace_bytes});
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, s.align_b);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, s.align_a);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, s.align_c);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, s.align_c);

    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    NG_CUBLAS(library.MatmulAlgoGetHeuristic(handle.get(), plan.product.get(), plan.left.get(), plan.right.get(),
                                             plan.out.get(), plan.out.get(), wish, 1, &best, &found));
    if (found == 0) {
      throw std::runtime_error("cuBLASLt: no algorithm for a product of m, n, k = " + std::to_string(s.m) + ", " +
                               std::to_string(s.n) + ", " + std::to_string(s.k) + " at " __FILE__);
    }
    NG_CUBLAS(best.state);
    plan.algorithm = best.algo;
    return plan;
  }

  void run(cudaStream_t stream, const Shape& shape, const void* a, const void* b, float beta, void* c) {
    const Plan& plan = find(shape);
    const float one = 1.0f;
    NG_CUBLAS(library.Matmul(handle.get(), plan.product.get(), &one, b, plan.left.get(), a, plan.right.get(), &beta, c,
                             plan.out.get(), c, plan.out.get(), &plan.algorithm, workspace, workspace_bytes, stream));
  }

  Handle handle = new_handle();  // the first member: layouts and descriptions go before it
  cudaDataType_t real;
  void* workspace;
  size_t workspace_bytes;
  std::map<Shape, Plan> plans;
};

Cublas::Cublas(bool bf16, void* workspace, size_t workspace_bytes)
    : plans_(std::make_unique<Plans>(bf16, workspace, workspace_bytes)) {}

Cublas::~Cublas() = default;

void Cublas::multiply(cudaStream_t stream, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
                      const void* a, int64_t lda, const void* b, int64_t ldb, float beta, void* c, int64_t ldc,
                      bool real_c) {
  const cudaDataType_t real = plans_->real;
  plans_->run(stream,
              {real, real, real_c ? real : CUDA_R_32F, transpose_a, transpose_b, m, n, k, lda, ldb, ldc, alignment(a),
               alignment(b), alignment(c)},
              a, b, beta, c);
}

void Cublas::multiply_eight(cudaStream_t stream, int64_t m, int64_t n, int64_t k, const Bytes& a, const Bytes& b,
                            float beta, void* c, int64_t ldc, bool real_c) {
  const Shape shape{a.e5m2 ? CUDA_R_8F_E5M2 : CUDA_R_8F_E4M3, CUDA_R_8F_E4M3, real_c ? plans_->real : CUDA_R_32F,
                    false, true, m, n, k, a.ld, b.ld, ldc, alignment(a.data), alignment(b.data), alignment(c),
                    a.scale, b.scale};
  plans_->run(stream, shape, a.data, b.data, beta, c);
}

}  // namespace cuda

void load_cublas(const std::vector<std::string>& paths) {
  using cuda::library;
  const std::lock_guard<std::mutex> lock(cuda::loading);
  if (library.loaded) return;
  std::string tried;
  for (const std::string& path : paths) {
    cuda::Library candidate;
    const std::string problem = cuda::open_library(path, &candidate);
    if (problem.empty()) {
      library = candidate;
      library.loaded = true;
      return;
    }
    tried += "\n  " + problem;
  }
  throw std::runtime_error("cuBLASLt could not be loaded; " + std::string(cuda::kAdvice) +
                           "\ntried:" + (tried.empty() ? " nothing" : tried));
}

}  // namespace neurogen
