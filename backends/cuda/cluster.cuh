// Deliveries between blocks of a cluster, sm_90: numbers that go to another block's shared memory
// and are counted there by a barrier, so that who waits for them needs nothing else of who sends.
// The emulator (tests/emulator) has these functions for the CPU and keeps this file out by its
// guard.
#ifndef PONDER_CUDA_CLUSTER
#define PONDER_CUDA_CLUSTER

#include "warp.cuh"

namespace ponder::cuda {

// Whether there are clusters where this is compiled for; kernels that need them are empty
// elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool has_clusters = false;
#else
constexpr bool has_clusters = true;
#endif

// A barrier of the cluster in two halves, behind which all see what each wrote.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}
// Without what was written becoming visible.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// The same place in the shared memory of block `rank` of the cluster.
template <class T> __device__ __forceinline__ T *in_block(T *shared, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t at;
    asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(shared), "r"(rank));
    return reinterpret_cast<T *>(at);
#else
    return shared;
#endif
}

// A barrier in shared memory whose phases 0, 1, 2, ... each end when they have been announced with
// a number of bytes, and these have come.
using Deliveries = uint64_t;

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t address_in_block(const void *shared, int rank) {
    uint32_t at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(shared)), "r"(rank));
    return at;
}
#endif
// By one thread; a barrier of the cluster has to follow.
__device__ __forceinline__ void set_deliveries(Deliveries *d) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                     shared_address(d))
                 : "memory");
#endif
}
// By one thread, once for each phase, when all have seen the end of the one before.
__device__ __forceinline__ void announce(Deliveries *d, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(d)),
                 "r"(bytes)
                 : "memory");
#endif
}
// Until a phase of this parity has ended.
__device__ __forceinline__ void wait_for_deliveries(Deliveries *d, unsigned parity) {
#if __CUDA_ARCH__ >= 900
    unsigned done;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, "
                     "[%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(d)), "r"(parity)
                     : "memory");
    while (!done);
#endif
}
// x to the place of `to` in block `rank`, counted by its barrier at the place of `d`. In pieces of
// 16 bytes, as each of them is counted apart.
__device__ __forceinline__ void deliver(void *to, float4 x, Deliveries *d, int rank) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, "
                 "%3, %4}, [%5];" ::"r"(address_in_block(to, rank)),
                 "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(address_in_block(d, rank))
                 : "memory");
#endif
}

} // namespace ponder::cuda

#endif
