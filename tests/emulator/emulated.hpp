// Runs the CUDA module on a machine without a GPU: its sources, translated by module.py, with a
// fiber for each thread of a block and blocks one after the other; cuBLASLt has no algorithm here,
// so that products are the plain ones. For tests of what kernels compute; missing barriers between
// the threads of a warp and races in general are compute-sanitizer's. See module.sh.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __shared__
#define __shared__ static
namespace emu {
struct Copy {
    void *to;
    const void *from;
    bool valid;
};
struct Warp {
    int arrived = 0;
    unsigned generation = 0;
    int live = 0;
    alignas(16) unsigned char slot[2][32][32];
};
struct Thread {
    unsigned id = 0;
    void *sp = nullptr;
    bool done = false;
    unsigned turn = 0;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
struct Block {
    int arrived = 0;
    unsigned generation = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    const std::function<void()> *body;
};
extern Block *block;
extern Thread *thread;
extern dim3 bidx, bdim, gdim;
void yield();
void run_block(Block &);
struct Tid {
    unsigned x, y, z;
};
inline Tid tid() {
    unsigned i = thread->id;
    return {i % bdim.x, i / bdim.x % bdim.y, i / bdim.x / bdim.y};
}
inline unsigned lane() { return thread->id % 32; }
template <class T> const unsigned char (*exchange(const T &mine))[32] {
    static_assert(sizeof(T) <= 32);
    Warp &w = block->warps[thread->id / 32];
    const unsigned turn = thread->turn++;
    auto *slots = w.slot[turn & 1];
    std::memcpy(slots[lane()], &mine, sizeof mine);
    if (++w.arrived == w.live) {
        w.arrived = 0;
        w.generation = turn + 1;
    } else
        while (w.generation == turn)
            yield();
    return slots;
}
template <class T> T of_lane(const unsigned char (*slots)[32], unsigned l) {
    T x;
    std::memcpy(&x, slots[l], sizeof x);
    return x;
}
struct Config {
    dim3 grid, block;
    size_t shared;
    Config(dim3 g, dim3 b, size_t s = 0, cudaStream_t = nullptr) : grid(g), block(b), shared(s) {}
};
void launch(const Config &c, const std::function<void()> &body);
template <class T> T *dynamic() {
    return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(block->shared.data()) + 127) / 128 *
                                 128);
}
} // namespace emu
#define threadIdx (emu::tid())
#define blockIdx (emu::bidx)
#define blockDim (emu::bdim)
#define gridDim (emu::gdim)
inline void __syncthreads() {
    emu::Block &b = *emu::block;
    const unsigned g = b.generation;
    if (++b.arrived == int(b.threads.size())) {
        b.arrived = 0;
        ++b.generation;
    } else
        while (b.generation == g)
            emu::yield();
}
inline void __syncwarp() { emu::exchange(0); }
template <class T> T __shfl_xor_sync(unsigned, T x, int m, int = 32) {
    return emu::of_lane<T>(emu::exchange(x), emu::lane() ^ unsigned(m));
}
size_t __cvta_generic_to_shared(const void *); // named in code that is never instantiated here
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
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
