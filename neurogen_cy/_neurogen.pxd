# Mirror of src_cuda/include/neurogen; nothing else. Contracts are in the headers.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libcpp cimport bool
from libcpp.memory cimport unique_ptr
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "neurogen/spec.h" namespace "neurogen" nogil:
    cdef cppclass RegionSpec:
        string name
        int neurons
        int level

    cdef cppclass ProjectionSpec:
        string key
        int src
        int dst
        int delay
        bool gate
        int blocks_per_row
        vector[int32_t] cols

    cdef cppclass ModelSpec:
        int vocab
        int dim
        vector[RegionSpec] regions
        vector[ProjectionSpec] projections
        bool graded
        bool tied
        float surrogate_k
        float max_spike
        float rate_target
        float rate_weight
        float dropout
        int streams
        int max_tokens
        int threads
        uint64_t seed
        int device
        bool bf16
        bool fp8
        bool spin


cdef extern from "neurogen/model.h" namespace "neurogen" nogil:
    cdef cppclass Tensor:
        string key
        vector[int64_t] shape
        void* data
        float* gradient
        float* moment1
        float* moment2
        int64_t size()

    cdef cppclass State:
        int streams()
        vector[Tensor] arrays() except +
        void clear(const uint8_t*) except +

    cdef cppclass Input:
        const void* data
        int itemsize
        bool device

    cdef cppclass Output:
        void* data
        bool device

    cdef cppclass Place:
        bool known
        bool host
        int device
        bool own_context
        int64_t bytes

    cdef cppclass Tokens:
        int streams
        int tokens
        Input ids
        Input resets

    cdef enum class Normalize:
        sum
        absolute

    cdef cppclass Targets:
        Input ids
        Input weights
        Normalize normalize
        double divisor
        Output predictions

    cdef cppclass CAdamW "neurogen::AdamW":
        double lr
        double beta1
        double beta2
        double eps
        double weight_decay
        double clip
        int64_t step
        bool awaited

    cdef cppclass StepStats:
        double loss
        double homeostasis
        double grad_norm
        int64_t correct
        int64_t tokens
        bool finite

    cdef cppclass Sampling:
        float temperature
        int top_k
        float top_p
        bool greedy
        uint64_t seed
        uint64_t position

    cdef cppclass Counters:
        int64_t launches
        int64_t syncs
        int64_t h2d_bytes
        int64_t d2h_bytes
        int64_t device_allocations
        int64_t host_allocations

    cdef cppclass Model:
        vector[Tensor]& tensors() except +
        void read(const void*, void*, size_t) except +
        void write(void*, const void*, size_t) except +
        void parameters_written() except +
        void gradients_exposed() except +
        State& state() except +
        unique_ptr[State] new_state(int) except +
        void train(const Tokens&, const Targets&, const CAdamW&, uint64_t, StepStats*) except +
        void backward(const Tokens&, const Targets&, uint64_t, bool, StepStats*) except +
        void update(const CAdamW&, StepStats*) except +
        void advance(State&, const Tokens&, float*) except +
        double evaluate(State&, const Tokens&, const Input&) except +
        int generate(State&, float*, const Sampling&, int, int32_t*) except +
        void step(const Input&, bool) except +
        void learn_held(const int32_t*, const Targets&, const CAdamW&, StepStats*) except +
        void broca_output(const Output&) except +
        void encode(const Input&, int64_t, const Output&) except +
        void logits(const Input&, int64_t, const Output&) except +
        void sample(const Input&, int64_t, const Sampling&, const Output&) except +
        double rate(int) except +
        void recorded(int, float*, float*, float*) except +
        uintptr_t stream() except +
        void wait_for(uintptr_t) except +
        void hand_over(uintptr_t) except +
        uint64_t mark() except +
        uint64_t passed() except +
        void rest() except +
        Place place(const void*) except +
        Counters counters() except +
        vector[pair[string, string]] execution_plan() except +

    ctypedef vector[pair[string, int64_t]] MemoryPlan
    ctypedef void (*Sgemm)(char*, char*, int*, int*, int*, float*, float*, int*, float*, int*, float*, float*,
                           int*) noexcept
    unique_ptr[Model] make_cpu_model(const ModelSpec&, Sgemm) except +
    MemoryPlan cpu_memory_plan(const ModelSpec&) except +
    const char* cpu_instruction_set() except +

    cdef cppclass CudaDevice:
        string name
        string driver
        int64_t free_bytes
        int64_t total_bytes

    unique_ptr[Model] make_cuda_model(const ModelSpec&) except +
    MemoryPlan cuda_memory_plan(const ModelSpec&) except +
    int cuda_device_count() except +
    CudaDevice cuda_device(int) except +
    void load_cublas(const vector[string]&) except +
