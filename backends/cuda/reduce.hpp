// Sums of all elements, in a fixed order: f32 within a thread, f64 between threads.
#pragma once

#include "kernel.hpp"

#include <algorithm>

namespace ponder::cuda {

constexpr int reduce_threads = 256;

inline int64_t reduce_parts(int64_t n) {
    return std::clamp<int64_t>(n / (reduce_threads * 8), 1, 512);
}
inline size_t reduce_workspace(int64_t n) { return size_t(reduce_parts(n)) * sizeof(double); }

#ifdef __CUDACC__

__device__ inline double block_sum_f64(double x) {
    __shared__ double cell[reduce_threads / 32];
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0)
        cell[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < reduce_threads / 32; ++i)
        x += cell[i];
    return x;
}

template <class F, class G>
__global__ void reduce_shares(int64_t n, double *share, F element, G finish) {
    double sum = 0;
    float part = 0;
    int taken = 0;
    for (int64_t i = int64_t(blockIdx.x) * reduce_threads + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * reduce_threads) {
        part += element(i);
        if (++taken == 16) {
            sum += double(part);
            part = 0;
            taken = 0;
        }
    }
    sum = block_sum_f64(sum + double(part));
    if (threadIdx.x == 0) {
        if (gridDim.x == 1)
            finish(sum);
        else
            share[blockIdx.x] = sum;
    }
}

template <class G> __global__ void reduce_finish(int64_t parts, const double *share, G finish) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < parts; i += reduce_threads)
        sum += share[i];
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0)
        finish(sum);
}

// finish(sum of element(i)) on one thread.
template <class F, class G> void reduce(int64_t n, const Run &run, F element, G finish) {
    const int64_t parts = reduce_parts(n);
    double *share = reinterpret_cast<double *>(run.workspace);
    reduce_shares<<<unsigned(parts), reduce_threads, 0, run.stream>>>(n, share, element, finish);
    if (parts > 1)
        reduce_finish<<<1, reduce_threads, 0, run.stream>>>(parts, share, finish);
}

#endif

} // namespace ponder::cuda
