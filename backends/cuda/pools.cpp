#include "pools.hpp"

#include "device.hpp"

#include <mutex>
#include <vector>

namespace ponder::cuda {

namespace {

struct Pools {
    std::mutex mutex;
    std::vector<cudaMemPool_t> open;
};
Pools &pools() {
    static Pools all;
    return all;
}

void trim_pools() {
    std::lock_guard lock(pools().mutex);
    for (const cudaMemPool_t pool : pools().open)
        cudaMemPoolTrimTo(pool, 0);
}

} // namespace

void add_pool(cudaMemPool_t pool) {
    std::lock_guard lock(pools().mutex);
    pools().open.push_back(pool);
}

void remove_pool(cudaMemPool_t pool) {
    std::lock_guard lock(pools().mutex);
    std::erase(pools().open, pool);
}

} // namespace ponder::cuda

void *ponder_device::block(size_t size) {
    void *block = nullptr;
    if (cudaMallocFromPoolAsync(&block, size, pool, stream) == cudaSuccess)
        return block;
    cudaStreamSynchronize(stream); // what it has freed is free then
    ponder::cuda::trim_pools();
    const bool done = cudaMallocFromPoolAsync(&block, size, pool, stream) == cudaSuccess;
    cudaGetLastError(); // running out is no failure of the device
    return done ? block : nullptr;
}
