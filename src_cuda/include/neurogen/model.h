// The contract every backend fulfils. No CUDA type appears here, so the Cython binding compiles with the
// host compiler alone. Shape letters: spec.h.
//
// Pointers of a call are contiguous, never null unless said, never aliasing each other, and host memory unless an
// Input or Output says otherwise. A Model is used by one thread at a time; the binding refuses a second one.
// Errors: std::invalid_argument (bad argument), std::out_of_range (token id in device memory), std::overflow_error
// (neuron state not finite), std::bad_alloc, std::runtime_error (CUDA). A call that throws leaves weights, moments
// and neuron state as they were.
// Calls return when their work is done, but step() without hold, broca_output(), encode(), logits() and sample() with
// nothing but device arrays: these return when it is on the model's stream. What only the device can see (an id out of
// range, values or a state that are not finite) is then thrown by the next call that waits, and until that has
// happened no call changes weights, moments or neuron state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "neurogen/spec.h"

namespace neurogen {

enum class DType { f32, i32 };

// A named array of the model. Views stay valid for the life of the Model (or State).
struct Tensor {
  std::string key;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  void* data = nullptr;
  float* gradient = nullptr;  // null: a constant
  float* moment1 = nullptr;
  float* moment2 = nullptr;
  bool decay = false;  // weight decay applies
  int64_t size() const {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    return count;
  }
};

// Neuron state of S streams: v, w and recent spikes of every region, the readout's o. A conversation.
class State {
 public:
  virtual ~State() = default;
  virtual int streams() const = 0;
  // "region.<name>.v" [S, n], "region.<name>.w" [S, n], "region.<name>.spikes" [K, S, n] (newest first),
  // "broca.o" [S, D].
  virtual std::vector<Tensor> arrays() = 0;
  // which: [S] flags, null = every stream.
  virtual void clear(const uint8_t* which) = 0;
};

// An array that a call reads. The binding checks host arrays and makes ids int32. Device arrays (CUDA models only)
// are memory of the model's device, ready on the model's stream; ids may be int64 too, and the kernel that reads them
// checks their range.
struct Input {
  const void* data = nullptr;  // null = not given
  int itemsize = 4;
  bool device = false;
  template <class T>
  const T* host() const {
    return static_cast<const T*>(data);
  }
};

// An array that a call writes, of the host or of the model's device.
struct Output {
  void* data = nullptr;  // null = not wanted
  bool device = false;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Where memory is, as far as the driver knows.
struct Place {
  bool known = false, host = false;
  int device = -1;
  bool own_context = true;  // false: of another context than the device's primary one, where models live
  int64_t bytes = -1;       // from the address to the end of its allocation, -1 = not known
};

// Tokens of one call. Layout [S, T], as the user has it.
struct Tokens {
  int streams = 0;  // S
  int tokens = 0;   // T; S*T <= B*max_tokens
  Input ids;        // every id in [0, V)
  Input resets;     // uint8
};

enum class Normalize { sum, absolute };

// What the tokens are compared with. Layout [S, T].
struct Targets {
  Input ids;      // every id in [0, V)
  Input weights;  // float; not given = ones
  Normalize normalize = Normalize::sum;
  double divisor = -1.0;  // >= 0 replaces the sum of weights
  Output predictions;     // int32, may be null: most probable token
};

struct AdamW {
  double lr = 2e-3, beta1 = 0.9, beta2 = 0.98, eps = 1e-8, weight_decay = 0.0;
  double clip = 1.0;    // global norm; <= 0 = no clipping
  int64_t step = 1;     // 1-based number of this update (bias correction)
  bool awaited = true;  // false: a training call may return once it is decided, with the update still under way
};

struct StepStats {
  double loss = 0.0;  // weighted cross-entropy, nats
  double homeostasis = 0.0;
  double grad_norm = 0.0;  // before clipping
  int64_t correct = 0;     // predictions that hit, over non-zero weights
  int64_t tokens = 0;      // non-zero weights
  bool finite = true;      // false: nothing was changed, nothing was committed
};

struct Sampling {
  float temperature = 1.0f;
  int top_k = 0;  // 0 = all
  float top_p = 1.0f;
  bool greedy = false;
  uint64_t seed = 0;
  uint64_t position = 0;  // draw number of this seed; row m draws from (seed, position, m)
};

struct Counters {
  int64_t launches = 0, syncs = 0, h2d_bytes = 0, d2h_bytes = 0, device_allocations = 0, host_allocations = 0;
};

using ExecutionPlan =
    std::vector<std::pair<std::string, std::string>>;  // how a model runs on this machine, for people: name, value

class Model {
 public:
  virtual ~Model() = default;

  virtual std::vector<Tensor>& tensors() = 0;
  // Copies between the host and memory of tensors() or State::arrays(), finished on return.
  virtual void read(const void* from, void* host, size_t bytes) = 0;
  virtual void write(void* to, const void* host, size_t bytes) = 0;
  // Says that parameter values were written through tensors(): derived copies are renewed at the next use.
  virtual void parameters_written() = 0;
  // Says that a user got writable access to the gradients: the next update looks at every embedding row.
  virtual void gradients_exposed() = 0;

  virtual State& state() = 0;  // the model's own, B streams
  virtual std::unique_ptr<State> new_state(int streams) = 0;

  // One optimizer step on the model's own state: forward, loss, batched e-prop, update, state committed.
  // call: number of training calls made before (keys dropout).
  virtual void train(const Tokens&, const Targets&, const AdamW&, uint64_t call, StepStats*) = 0;
  // The same without the update; gradients are overwritten, or added to when `accumulate`.
  virtual void backward(const Tokens&, const Targets&, uint64_t call, bool accumulate, StepStats*) = 0;
  // AdamW on the gradients as they stand. finite = false: nothing changed.
  virtual void update(const AdamW&, StepStats*) = 0;

  // Advances `state` over tokens without a loss; broca: [S, D] output after the last token, may be null.
  virtual void advance(State& state, const Tokens&, float* broca) = 0;
  // Advances `state` and adds up unweighted cross-entropy (nats) over all S*T tokens.
  virtual double evaluate(State& state, const Tokens&, const Input& targets) = 0;
  // `count` times: draws a token per stream from broca [S, D] (positions sampling.position, + 1, ...) and advances
  // `state` by it. ids: out, [count, S]; broca: in, and out when all went well. Returns how many tokens the state
  // heard: fewer than `count` where it would not have stayed finite after the next one.
  virtual int generate(State& state, float* broca, const Sampling&, int count, int32_t* ids) = 0;

  // One token whose embedding the caller brings: x [B, D]. With hold = true the step stays open (state not
  // committed) until learn_held(), so that a token-by-token loop can learn from the very step it ran (without dropout).
  virtual void step(const Input& x, bool hold) = 0;
  virtual void learn_held(const int32_t* ids, const Targets&, const AdamW&, StepStats*) = 0;
  // The Broca output of the last step or call on the model's own state: [B, D].
  virtual void broca_output(const Output& out) = 0;

  // [count, D]; count <= B*max_tokens for ids of the host. A device id out of range makes a row of NaN.
  virtual void encode(const Input& ids, int64_t count, const Output& out) = 0;
  virtual void logits(const Input& broca, int64_t rows, const Output& out) = 0;  // [rows, D] -> [rows, V]
  virtual void sample(const Input& broca, int64_t rows, const Sampling&, const Output& ids) = 0;  // -> [rows]

  // Mean firing rate of a region in the last training call.
  virtual double rate(int region) const = 0;
  // Copies of u, s and G of a region in the last call that ran the brain, [T, S, n] each. gate: null = not wanted, as
  // after a call that learnt, which has turned G into errors, and where the region has no gate.
  virtual void recorded(int region, float* u, float* s, float* gate) const = 0;

  // The model's own CUDA stream (0 on the CPU). Device arrays are ready for it once wait_for() was called with the
  // stream that works on them (1 = the legacy default stream, 2 = the per-thread default stream, else a cudaStream_t);
  // hand_over() makes that stream wait for what this model was asked so far. Nobody waits on the host.
  virtual uintptr_t stream() const = 0;
  virtual void wait_for(uintptr_t stream) = 0;
  virtual void hand_over(uintptr_t stream) = 0;
  // Numbers (1, 2, ..) what this model was asked so far; the highest number of which all is done, without waiting.
  virtual uint64_t mark() = 0;
  virtual uint64_t passed() = 0;
  // Until all that this model was asked for is done.
  virtual void rest() = 0;
  virtual Place place(const void* memory) const = 0;

  virtual Counters counters() const = 0;
  virtual ExecutionPlan execution_plan() const = 0;
};

// Part names and bytes of what a model allocates.
using MemoryPlan = std::vector<std::pair<std::string, int64_t>>;

// sgemm of any BLAS, Fortran calling convention; used at one thread, called from several.
using Sgemm = void (*)(char* transa, char* transb, int* m, int* n, int* k, float* alpha, float* a, int* lda, float* b,
                       int* ldb, float* beta, float* c, int* ldc);

std::unique_ptr<Model> make_cpu_model(const ModelSpec&, Sgemm);
MemoryPlan cpu_memory_plan(const ModelSpec&);
const char* cpu_instruction_set();  // "avx512", "avx2" or "baseline": the kernels this machine runs

// CUDA. None of these needs a driver to be linked or imported; they throw std::runtime_error where there is none.
struct CudaDevice {
  std::string name, driver;
  int64_t free_bytes = 0, total_bytes = 0;
};
std::unique_ptr<Model> make_cuda_model(const ModelSpec&);
MemoryPlan cuda_memory_plan(const ModelSpec&);
int cuda_device_count();  // throws with the reason where no device can be used
CudaDevice cuda_device(int device);
// Loads cuBLASLt from the first of these paths that works (once a process).
void load_cublas(const std::vector<std::string>& paths);

}  // namespace neurogen
