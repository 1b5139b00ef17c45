// A device of this module: one stream in which everything is queued, a memory pool, the library
// handle, and the first failure. The core makes one call at a time, so nothing here is locked.
#pragma once

#include "ponder/backend.h"

#include "blas.hpp"
#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ponder::cuda {

class Products; // product.hpp

// bf16 copies of small f32 constants (biases), made again when the constant has changed.
struct Narrow {
    const float *from; // in device memory
    void *to;
    size_t count;
};

} // namespace ponder::cuda

struct ponder_device {
    ponder_backend_host host{};
    cudaStream_t stream = nullptr;
    cudaMemPool_t pool = nullptr;
    cublasLtHandle_t blas = nullptr;
    int processors = 0; // multiprocessors
    int major = 0;      // compute capability
    bool tf32 = false;
    unsigned *tickets = nullptr; // zeros; see ttt_scan.hpp
    static constexpr int64_t most_tickets = 4096;
    void *staging = nullptr; // pinned, for small downloads
    std::map<const void *, ponder::cuda::Narrow> narrow;
    std::unique_ptr<ponder::cuda::Products> products;
    std::string problem;
    void *group = nullptr; // ncclComm_t; see group.cpp

    ponder_device();
    ~ponder_device();

    static constexpr size_t staging_size = size_t(4) << 20; // logits of many streams
    // Every block that the core allocates ends in zeros that nobody writes: a product may take some
    // rows more of a weight than it has, where the library wants round numbers.
    static constexpr size_t slack = size_t(256) << 10;

    // Whether none of the last few calls wrote there, so that a kernel which overlaps the end of
    // the one before it (launch.cuh) may read it at once. Copies and replays need no entry: kernels
    // do not overlap them.
    bool settled(const void *from, size_t bytes) const {
        const std::byte *const begin = static_cast<const std::byte *>(from), *const end =
                                                                                 begin + bytes;
        for (const auto &call : recent)
            for (const Range &written : call)
                if (written.begin < end && begin < written.end)
                    return false;
        return true;
    }
    struct Range {
        const std::byte *begin, *end;
    };
    std::array<std::vector<Range>, 4> recent; // a ring; see run() in module.cpp
    size_t next_recent = 0;

    // Keeps the first failure; true when all is well.
    bool check(cudaError_t status, const char *what) {
        if (status != cudaSuccess && problem.empty())
            problem = std::string(what) + ": " + cudaGetErrorString(status);
        return status == cudaSuccess;
    }
    void fail(const std::string &what) {
        if (problem.empty())
            problem = what;
    }
};
