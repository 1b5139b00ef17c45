// A device of this module: one stream in which everything is queued, a memory pool, the library
// handle, and the first failure. The core makes one call at a time, so nothing here is locked.
// nvcc reads this several times for each file of kernels, so what needs the larger headers of the
// standard library and cuBLAS is elsewhere: device_state.hpp, product.hpp.
#pragma once

#include "ponder/backend.h"

#include <cuda_runtime.h>

#include <cstddef>

struct cublasLtContext;

namespace ponder::cuda {

class Products;     // product.hpp
struct DeviceState; // device_state.hpp

} // namespace ponder::cuda

struct ponder_device {
    ponder_backend_host host{};
    cudaStream_t stream = nullptr;
    cudaMemPool_t pool = nullptr;
    cublasLtContext *blas = nullptr; // cublasLtHandle_t
    int id = 0;                      // of the GPU
    int processors = 0;              // multiprocessors
    int major = 0;                   // compute capability
    int shared = 0;                  // bytes of shared memory that a block may have
    bool tf32 = false;
    unsigned *tickets = nullptr; // zeros; see ttt_scan.hpp
    static constexpr int64_t most_tickets = 4096;
    void *staging = nullptr; // pinned, for small downloads
    void *group = nullptr;   // ncclComm_t; see group.cpp
    ponder::cuda::DeviceState *const state;

    ponder_device();
    ~ponder_device();
    ponder_device(const ponder_device &) = delete;

    static constexpr size_t staging_size = size_t(4) << 20; // logits of many streams
    // Every block that the core allocates ends in zeros that nobody writes: a product may take some
    // rows more of a weight than it has, where the library wants round numbers. At most as many
    // bytes as the block has.
    static constexpr size_t most_slack = size_t(256) << 10;
    static size_t slack(size_t size) { return size < most_slack ? size : most_slack; }

    ponder::cuda::Products &products() const;

    // Whether none of the last few calls wrote there, so that a kernel which overlaps the end of
    // the one before it (launch.cuh) may read it at once. Copies and replays need no entry: kernels
    // do not overlap them.
    bool settled(const void *from, size_t bytes) const;

    // Memory from the pool; null when there is none.
    void *block(size_t size);

    // Keeps the first failure; true when all is well.
    bool check(cudaError_t status, const char *what);
    void fail(const char *what);
};
