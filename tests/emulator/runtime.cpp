// The calls of CUDA's runtime library that the module and its tests make, for the emulator: all of
// it happens at once, and memory starts as NaN.
#include "fibers.hpp"

#include <cstdlib>

namespace {

void *allocate(size_t size) {
    const size_t whole = (size + 255) / 256 * 256;
    void *p = std::aligned_alloc(256, whole);
    if (p)
        std::memset(p, 0xff, whole);
    return p;
}
cudaError_t give(void **p, size_t size) {
    *p = allocate(size);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t move(void *to, const void *from, size_t size) {
    std::memmove(to, from, size);
    return cudaSuccess;
}
cudaError_t fill(void *p, int value, size_t size) {
    std::memset(p, value, size);
    return cudaSuccess;
}
cudaError_t drop(void *p) {
    std::free(p);
    return cudaSuccess;
}

} // namespace

extern "C" {

cudaError_t cudaGetLastError() {
    const cudaError_t e = emulator::last_error;
    emulator::last_error = cudaSuccess;
    return e;
}
const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorInvalidConfiguration ? "a launch that no device takes" : "emulated";
}

// A device as sm_80 and later have them, and with clusters; few processors, so that small tests have
// enough blocks for every kind of kernel.
cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    *value = which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? int(emulator::most_shared)
             : which == cudaDevAttrComputeCapabilityMajor     ? 9
                                                              : 8;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    std::memset(p, 0, sizeof *p);
    std::strcpy(p->name, "emulated");
    p->major = 8;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t size) { return give(p, size); }
cudaError_t cudaMallocHost(void **p, size_t size) { return give(p, size); }
cudaError_t cudaMallocFromPoolAsync(void **p, size_t size, cudaMemPool_t, cudaStream_t) {
    return give(p, size);
}
cudaError_t cudaFree(void *p) { return drop(p); }
cudaError_t cudaFreeHost(void *p) { return drop(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t) { return drop(p); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const cudaMemPoolProps *) {
    *pool = nullptr;
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *) { return cudaSuccess; }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    return move(to, from, size);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t) {
    return move(to, from, size);
}
cudaError_t cudaMemset(void *p, int value, size_t size) { return fill(p, value, size); }
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t) {
    return fill(p, value, size);
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = reinterpret_cast<cudaStream_t>(8);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

// Of the search for a product's algorithm, and of mailboxes.
cudaError_t cudaEventCreate(cudaEvent_t *) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {
    *ms = 0;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

// Nothing is captured: passes are run call by call.
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaErrorUnknown; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *) { return cudaErrorUnknown; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *, cudaGraph_t, unsigned long long) {
    return cudaErrorUnknown;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaErrorUnknown; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaErrorUnknown; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaErrorUnknown; }

} // extern "C"
