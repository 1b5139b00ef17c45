// What the op files are written with: a view of the call that is planned, a planned kernel made of
// a lambda, and a few device functions.
//
// A plan function takes the dtypes and shapes it has kernels for and answers PONDER_PLAN_NONE to
// the rest: there is no fallback to the host. All sums run in a fixed order (no floating-point
// atomics), so equal calls give equal bits.
#pragma once

#include "device.hpp"

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace ponder::cuda {

using bf16 = __nv_bfloat16;

// Where a planned call finds its tensors when it runs.
struct Run {
    void *const *buffer;
    std::byte *workspace;
    cudaStream_t stream;
    ponder_device *device;
    template <class T = void> T *at(size_t i) const { return static_cast<T *>(buffer[i]); }
};

class Kernel {
public:
    virtual ~Kernel() = default;
    virtual void run(const Run &run) = 0;
};

template <class F> class KernelOf final : public Kernel {
public:
    explicit KernelOf(F f) : f_(std::move(f)) {}
    void run(const Run &run) override { f_(run); }

private:
    F f_;
};

struct Call {
    const ponder_op_call *op;
    ponder_device *device;
    ponder_plan *plan;
    char *why;
    size_t why_size;
    // PONDER_PLAN_NO_MEMORY, for this.
    int32_t no_memory(const char *purpose) const;

    size_t out(size_t i) const { return op->n_in + i; } // index of an output among the tensors
    bool has(size_t i) const {
        return i < op->n_in + op->n_out && op->tensor[i].dtype != PONDER_DTYPE_NONE;
    }
    // Inputs may be left out at the end.
    bool has_in(size_t i) const { return i < op->n_in && has(i); }
    bool has_out(size_t i) const { return i < op->n_out && has(out(i)); }
    const ponder_tensor &tensor(size_t i) const { return op->tensor[i]; }
    int32_t type(size_t i) const { return op->tensor[i].dtype; }
    int32_t rank(size_t i) const { return op->tensor[i].rank; }
    int64_t dim(size_t i, int32_t axis) const { return op->tensor[i].dim[axis]; }
    int64_t last(size_t i) const { return dim(i, rank(i) - 1); }
    int64_t count(size_t i) const {
        int64_t n = 1;
        for (int32_t axis = 0; axis < rank(i); ++axis)
            n *= dim(i, axis);
        return n;
    }
    double attr(size_t i) const { return i < op->n_attr ? op->attr[i] : 0; }

    // The planned call: f(const Run &) queues it.
    template <class F> int32_t is(size_t workspace, F f) const {
        return planned(workspace, new KernelOf<F>(std::move(f)));
    }

private:
    int32_t planned(size_t workspace, Kernel *kernel) const; // module.cpp
};

using Planner = int32_t (*)(const Call &call);

// f(T()) for the C++ type of a float dtype.
template <class F> auto by_type(int32_t dtype, F f) {
    return dtype == PONDER_DTYPE_BF16 ? f(bf16()) : f(float());
}
template <class F> auto by_types(int32_t a, int32_t b, F f) {
    return by_type(a, [&](auto x) { return by_type(b, [&](auto y) { return f(x, y); }); });
}
inline size_t size_of(int32_t dtype) { return dtype == PONDER_DTYPE_BF16 ? 2 : 4; }

inline unsigned blocks_for(int64_t items, int64_t each) {
    return unsigned((items + each - 1) / each);
}
inline bool aligned(const void *p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

#ifdef __CUDACC__

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

// N neighbouring elements, moved in words as wide as they go.
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
    T v[N];
    __device__ float operator[](int i) const { return to_float(v[i]); }
    __device__ void set(int i, float x) { v[i] = from_float<T>(x); }
};
template <int N, class T> __device__ inline Pack<T, N> load(const T *p) {
    return *reinterpret_cast<const Pack<T, N> *>(p);
}
template <int N, class T> __device__ inline void store(T *p, const Pack<T, N> &x) {
    *reinterpret_cast<Pack<T, N> *>(p) = x;
}

__device__ inline float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// The same of a block of at most 1024 threads, known to all of them. `cell` holds 33 floats.
template <class F>
__device__ inline float block_reduce(float x, float neutral, float *cell, F combine) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int step = 16; step > 0; step /= 2)
        x = combine(x, __shfl_xor_sync(~0u, x, step));
    if (lane == 0)
        cell[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = lane < int((blockDim.x + 31) / 32) ? cell[lane] : neutral;
        for (int step = 16; step > 0; step /= 2)
            x = combine(x, __shfl_xor_sync(~0u, x, step));
        if (lane == 0)
            cell[32] = x;
    }
    __syncthreads();
    x = cell[32];
    __syncthreads();
    return x;
}
__device__ inline float block_sum(float x, float *cell) {
    return block_reduce(x, 0.0f, cell, [](float a, float b) { return a + b; });
}
__device__ inline float block_max(float x, float *cell) {
    return block_reduce(x, -INFINITY, cell, [](float a, float b) { return fmaxf(a, b); });
}

#endif // __CUDACC__

} // namespace ponder::cuda
