// What nvcc adds to C++, for the emulator: included before every kernel's file (-include), which is
// then an ordinary one.
#pragma once

#include "fibers.hpp"

#include <algorithm>
#include <cmath>
#include <cuda_bf16.h>

// From here on: CUDA's own headers, which are read by now, must not see it.
#define __CUDACC__

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __noinline__
#define __host__
#define __shared__ static // blocks run one after the other
#define __launch_bounds__(...)

#define threadIdx (emulator::thread->index)
inline const uint3 &blockIdx = emulator::block_index;
inline const dim3 &blockDim = emulator::block_size, &gridDim = emulator::grid_size;

inline void __syncthreads() {
    emulator::wait_at(emulator::block->barrier[0], int(emulator::block->threads.size()));
}
inline void __syncwarp() { emulator::exchange(0); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask, int = 32) {
    return emulator::of_lane<T>(emulator::exchange(x), emulator::lane() ^ unsigned(mask));
}
size_t __cvta_generic_to_shared(const void *); // named in code that never runs here

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
// Never contracted into a multiply-add.
inline float __fadd_rn(float a, float b) {
    volatile float x = a + b;
    return x;
}
inline float __fmul_rn(float a, float b) {
    volatile float x = a * b;
    return x;
}
using std::max;
using std::min;
inline int64_t min(int64_t a, int b) { return a < b ? a : b; }

// A better match than the library's, whose first parameter points to const.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t *config, void (*kernel)(P...), A &&...arguments) {
    emulator::launch({config->gridDim, config->blockDim, config->dynamicSmemBytes},
                     [&] { kernel(P(arguments)...); });
    return cudaGetLastError();
}
template <class T> cudaError_t cudaFuncSetAttribute(T *, cudaFuncAttribute, int) {
    return cudaSuccess;
}

#include "cluster.hpp"
