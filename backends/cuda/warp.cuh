// What kernels need of the machine: matrix instructions, exchange within a warp, copies to shared
// memory, launches. sm_80 and later. Instructions as the PTX ISA manual defines them. The emulator
// (tests/emulator) has these functions for the CPU and keeps this file out by its guard.
#ifndef PONDER_CUDA_WARP
#define PONDER_CUDA_WARP

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

namespace ponder::cuda {

__device__ __forceinline__ unsigned char *shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return bytes;
}
__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return uint32_t(__cvta_generic_to_shared(p));
}

// The same, as a number that the compiler keeps in a register. Else it works the address out anew,
// on sm_90 by asking for the block's place in its cluster, wherever registers are short.
__device__ __forceinline__ unsigned char *kept_shared_memory() {
    uint32_t at = shared_address(shared_memory());
    asm volatile("mov.b32 %0, %0;" : "+r"(at));
    return static_cast<unsigned char *>(__cvta_shared_to_generic(at));
}
// x, which is the same in all lanes, known to be.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// c[16,8] += a[16,16] b[16,8]. Lane 4 g + t holds c of rows g, g + 8 and columns 2 t, 2 t + 1.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    mma_bf16(c, a, b[0], b[1]);
}
// c[16,8] += a[16,8] b[8,8] with factors of 10 bits after the point; lower bits are not read.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// An 8 x 8 matrix of 16-bit elements, in each lane what load_matrices would put there: its
// transpose.
__device__ __forceinline__ uint32_t turn_matrix(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// low in the lower half
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
__device__ __forceinline__ float float_of_bits(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
// x must not be below the smallest normal number.
__device__ __forceinline__ float quick_inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
// Within 2 units in the last place; 0 where b is above 2^126.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

__device__ __forceinline__ float from_lane(float x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
__device__ __forceinline__ float from_lane_xor(float x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Barrier `id`, 1 to 15, of some of the block's warps.
__device__ __forceinline__ void sync_warps(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// A barrier in shared memory whose phases 0, 1, 2, ... each end with the `count`-th arrival.
using Arrivals = uint64_t;
__device__ __forceinline__ void set_arrivals(Arrivals *a, unsigned count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(a)), "r"(count)
                 : "memory");
}
__device__ __forceinline__ void arrive(Arrivals *a) {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(shared_address(a))
                 : "memory");
}
// Until a phase of this parity has ended; the phase "before the first" counts as odd.
__device__ __forceinline__ void wait_for_phase(Arrivals *a, unsigned parity) {
    unsigned done;
    do {
#if __CUDA_ARCH__ >= 900 // there a waiting warp is put aside for a while
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(a)), "r"(parity)
                     : "memory");
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(a)), "r"(parity)
                     : "memory");
        if (!done)
            __nanosleep(20);
#endif
    } while (!done);
}

// {x, y} to shared memory where `condition` holds, without a branch.
__device__ __forceinline__ void store_if(bool condition, float *to, float x, float y) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.shared.v2.f32 [%1], {%2, %3}; }" ::"r"(
            unsigned(condition)),
        "r"(shared_address(to)), "f"(x), "f"(y)
        : "memory");
}

// 16 bytes to shared memory without waiting; zeros where `valid` is not set.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most `pending` groups of this thread's copies are under way.
template <int pending> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Adds 1 to *ticket, modulo `count`; true for the last of `count` blocks. For one thread of a
// block; what the blocks before wrote is then seen by that thread, and by others after a barrier.
__device__ __forceinline__ bool is_last(unsigned *ticket, unsigned count) {
    __threadfence();
    const bool last = atomicInc(ticket, count - 1) == count - 1;
    __threadfence();
    return last;
}

// `cluster` blocks after each other share a cluster.
template <class Params>
cudaError_t launch(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared,
                   cudaStream_t stream, Params params, unsigned cluster = 1) {
    if (shared > 48 * 1024) {
        const cudaError_t e =
            cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (e != cudaSuccess)
            return e;
    }
    void *args[] = {&params};
    if (cluster == 1)
        return cudaLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(blocks), dim3(threads),
                                args, shared, stream);
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), args);
}

} // namespace ponder::cuda

#endif
