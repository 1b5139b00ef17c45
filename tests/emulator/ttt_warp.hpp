// Runs the CUDA scans on a machine without a GPU: the primitives of backends/cuda/ttt_warp.cuh,
// with a fiber for each thread of a block and blocks one after the other. For tests of what kernels
// compute. It sees missing waits for copies and results that nothing wrote (shared memory starts as
// NaN), and most missing barriers; races in general are compute-sanitizer's.
//
// Compile a kernel's file as C++ with this header included before it (-include).
#pragma once
#define PONDER_TTT_WARP // keeps the real primitives out

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>
#include <functional>
#include <memory>
#include <vector>

namespace emulator {

struct Copy {
    void *to;
    const void *from;
    bool valid;
};
struct Warp {
    int arrived = 0;
    unsigned generation = 0;
    alignas(16) unsigned char slot[2][32][64];
};
struct Thread {
    unsigned x = 0;
    void *stack_pointer = nullptr;
    std::unique_ptr<unsigned char[]> stack;
    bool done = false;
    unsigned collective = 0; // how many it took part in
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
struct Block {
    unsigned index = 0;
    int barrier_arrived = 0;
    unsigned barrier_generation = 0;
    struct {
        int arrived = 0;
        unsigned generation = 0;
    } named[16];
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    std::function<void()> body;
};
extern Block *block;
extern Thread *thread;

void yield();
void run_block(Block &);

inline Warp &warp() { return block->warps[thread->x / 32]; }
inline unsigned lane() { return thread->x % 32; }

// Every lane gives its value and gets those of all.
template <class T> const unsigned char (*exchange(const T &mine))[64] {
    static_assert(sizeof(T) <= 64);
    Warp &w = warp();
    const unsigned turn = thread->collective++;
    auto *slots = w.slot[turn & 1];
    std::memcpy(slots[lane()], &mine, sizeof mine);
    if (++w.arrived == 32) {
        w.arrived = 0;
        w.generation = turn + 1;
    } else
        while (w.generation == turn)
            yield();
    return slots;
}
template <class T> T of_lane(const unsigned char (*slots)[64], unsigned lane) {
    T x;
    std::memcpy(&x, slots[lane], sizeof x);
    return x;
}

} // namespace emulator

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (*emulator::thread)
#define blockIdx (emulator::Index{emulator::block->index})
namespace emulator {
struct Index {
    unsigned x;
};
} // namespace emulator

namespace ponder::cuda {

using std::max;
using std::min;

inline float float_of_bits(uint32_t x) {
    float f;
    std::memcpy(&f, &x, 4);
    return f;
}
inline uint32_t bits_of_float(float f) {
    uint32_t x;
    std::memcpy(&x, &f, 4);
    return x;
}
inline uint32_t round_bf16(float f) {
    const uint32_t u = bits_of_float(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return 0x7fff;
    return (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) {
    return round_bf16(low) | round_bf16(high) << 16;
}
inline float inverse_root(float x) { return 1 / std::sqrt(x); }
inline float exponential(float x) { return std::exp(x); }
inline float quotient(float a, float b) { return a / b; }

inline unsigned char *shared_memory() { return emulator::block->shared.data(); }

struct MmaFactors {
    uint32_t a[4], b[2];
};
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto *all = emulator::exchange(MmaFactors{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    const auto half = [](uint32_t x, int odd) {
        return float_of_bits(odd ? x & 0xffff0000u : x << 16);
    };
    const int l = int(emulator::lane());
    for (int e = 0; e < 4; ++e) {
        const int row = l / 4 + 8 * (e / 2), column = 2 * (l % 4) + e % 2;
        float sum = c[e];
        for (int k = 0; k < 16; ++k) {
            const auto fa = emulator::of_lane<MmaFactors>(all, unsigned(row % 8 * 4 + k % 8 / 2));
            const auto fb = emulator::of_lane<MmaFactors>(all, unsigned(column * 4 + k % 8 / 2));
            sum += half(fa.a[row / 8 + 2 * (k / 8)], k & 1) * half(fb.b[k / 8], k & 1);
        }
        c[e] = sum;
    }
}
inline void mma_tf32(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    const auto *all = emulator::exchange(MmaFactors{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    const auto cut = [](uint32_t x) { return float_of_bits(x & 0xffffe000u); };
    const int l = int(emulator::lane());
    for (int e = 0; e < 4; ++e) {
        const int row = l / 4 + 8 * (e / 2), column = 2 * (l % 4) + e % 2;
        float sum = c[e];
        for (int k = 0; k < 8; ++k) {
            const auto fa = emulator::of_lane<MmaFactors>(all, unsigned(row % 8 * 4 + k % 4));
            const auto fb = emulator::of_lane<MmaFactors>(all, unsigned(column * 4 + k % 4));
            sum += cut(fa.a[row / 8 + 2 * (k / 4)]) * cut(fb.b[k / 4]);
        }
        c[e] = sum;
    }
}
inline uint16_t matrix_element(const unsigned char (*all)[64], int matrix, int row, int column) {
    const auto *p = emulator::of_lane<const unsigned char *>(all, unsigned(8 * matrix + row));
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
        std::abort();
    uint16_t x;
    std::memcpy(&x, p + 2 * column, 2);
    return x;
}
inline void load_matrices(uint32_t (&x)[4], const void *row) {
    const auto *all = emulator::exchange(static_cast<const unsigned char *>(row));
    const int g = int(emulator::lane()) / 4, t = int(emulator::lane()) % 4;
    for (int i = 0; i < 4; ++i)
        x[i] = matrix_element(all, i, g, 2 * t) | uint32_t(matrix_element(all, i, g, 2 * t + 1))
                                                      << 16;
}
inline void load_matrices_transposed(uint32_t (&x)[4], const void *row) {
    const auto *all = emulator::exchange(static_cast<const unsigned char *>(row));
    const int g = int(emulator::lane()) / 4, t = int(emulator::lane()) % 4;
    for (int i = 0; i < 4; ++i)
        x[i] = matrix_element(all, i, 2 * t, g) | uint32_t(matrix_element(all, i, 2 * t + 1, g))
                                                      << 16;
}
inline float from_lane(float x, int lane) {
    return emulator::of_lane<float>(emulator::exchange(x), unsigned(lane));
}
inline float from_lane_xor(float x, int mask) {
    return emulator::of_lane<float>(emulator::exchange(x), emulator::lane() ^ unsigned(mask));
}
inline void sync_warp() { emulator::exchange(0); }
inline void sync_block() {
    emulator::Block &b = *emulator::block;
    const unsigned generation = b.barrier_generation;
    if (++b.barrier_arrived == int(b.threads.size())) {
        b.barrier_arrived = 0;
        ++b.barrier_generation;
    } else
        while (b.barrier_generation == generation)
            emulator::yield();
}
inline void sync_warps(int id, int threads) {
    auto &b = emulator::block->named[id];
    const unsigned generation = b.generation;
    if (++b.arrived == threads) {
        b.arrived = 0;
        ++b.generation;
    } else
        while (b.generation == generation)
            emulator::yield();
}
struct Arrivals {
    uint16_t count, pending;
    uint32_t phase;
};
inline void set_arrivals(Arrivals *a, unsigned count) {
    *a = {uint16_t(count), uint16_t(count), 0};
}
inline void arrive(Arrivals *a) {
    if (--a->pending == 0) {
        a->pending = a->count;
        ++a->phase;
    }
}
inline void wait_for_phase(Arrivals *a, unsigned parity) {
    while ((a->phase & 1) == parity)
        emulator::yield();
}
inline void copy_async(void *to, const void *from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        std::abort();
    emulator::thread->open.push_back({to, from, valid});
}
inline void commit_copies() {
    emulator::thread->groups.push_back(std::move(emulator::thread->open));
    emulator::thread->open.clear();
}
template <int pending> void wait_for_copies() {
    auto &groups = emulator::thread->groups;
    while (groups.size() > size_t(pending)) {
        for (const emulator::Copy &c : groups.front()) {
            if (c.valid)
                std::memcpy(c.to, c.from, 16);
            else
                std::memset(c.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}
inline bool is_last(unsigned *ticket, unsigned count) {
    const bool last = *ticket == count - 1;
    *ticket = last ? 0 : *ticket + 1;
    return last;
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared,
                   cudaStream_t, Params params) {
    if (shared > 227 * 1024)
        return cudaErrorInvalidValue;
    for (unsigned i = 0; i < blocks; ++i) {
        emulator::Block b;
        b.index = i;
        b.threads.resize(threads);
        b.warps.resize((threads + 31) / 32);
        b.shared.assign(shared, 0xff);
        b.body = [&] { kernel(params); };
        emulator::run_block(b);
    }
    return cudaSuccess;
}

} // namespace ponder::cuda
