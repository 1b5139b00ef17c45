// The functions of backends/cuda/warp.cuh, for the emulator.
#pragma once
#define PONDER_CUDA_WARP // keeps the real ones out

#include "fibers.hpp"

#include <cmath>
#include <cstdlib>
#include <cuda_bf16.h>

namespace ponder::cuda {

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
inline uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t x;
    std::memcpy(&x, &both, 4);
    return x;
}
inline float inverse_root(float x) { return 1 / std::sqrt(x); }
inline float quick_inverse_root(float x) { return inverse_root(x); }
inline float exponential(float x) { return std::exp(x); }
inline float quotient(float a, float b) { return a / b; }

inline unsigned char *shared_memory() { return emulator::shared_memory<unsigned char>(); }
inline unsigned char *kept_shared_memory() { return shared_memory(); }
inline int uniform(int x) { return x; }

struct MmaFactors {
    uint32_t a[4], b[2];
};
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto &all = emulator::exchange(MmaFactors{{a[0], a[1], a[2], a[3]}, {b0, b1}});
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
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(c, a, b[0], b[1]);
}
inline void mma_tf32(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    const auto &all = emulator::exchange(MmaFactors{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
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

// Of the matrices whose rows the lanes name.
inline uint32_t matrix_element(const emulator::Slots &rows, int matrix, int row, int column) {
    const auto *p = emulator::of_lane<const unsigned char *>(rows, unsigned(8 * matrix + row));
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
        std::abort();
    uint16_t x;
    std::memcpy(&x, p + 2 * column, 2);
    return x;
}
inline void load_matrices(uint32_t (&x)[4], const void *row) {
    const auto &rows = emulator::exchange(row);
    const int g = int(emulator::lane()) / 4, t = int(emulator::lane()) % 4;
    for (int i = 0; i < 4; ++i)
        x[i] = matrix_element(rows, i, g, 2 * t) | matrix_element(rows, i, g, 2 * t + 1) << 16;
}
inline void load_matrices_transposed(uint32_t (&x)[4], const void *row) {
    const auto &rows = emulator::exchange(row);
    const int g = int(emulator::lane()) / 4, t = int(emulator::lane()) % 4;
    for (int i = 0; i < 4; ++i)
        x[i] = matrix_element(rows, i, 2 * t, g) | matrix_element(rows, i, 2 * t + 1, g) << 16;
}

inline uint32_t turn_matrix(uint32_t x) {
    const auto &all = emulator::exchange(x);
    const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
    const auto element = [&](unsigned row, unsigned column) {
        const auto pair = emulator::of_lane<uint32_t>(all, 4 * row + column / 2);
        return column & 1 ? pair >> 16 : pair & 0xffffu;
    };
    return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

inline float from_lane(float x, int lane) {
    return emulator::of_lane<float>(emulator::exchange(x), unsigned(lane));
}
inline float from_lane_xor(float x, int mask) {
    return emulator::of_lane<float>(emulator::exchange(x), emulator::lane() ^ unsigned(mask));
}
inline void sync_warp() { emulator::exchange(0); }
inline void sync_warps(int id, int threads) {
    emulator::wait_at(emulator::block->barrier[id], threads);
}
inline void sync_block() { sync_warps(0, int(emulator::block->threads.size())); }

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

inline void store_if(bool condition, float *to, float x, float y) {
    if (condition)
        to[0] = x, to[1] = y;
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
                   cudaStream_t stream, Params params, unsigned cluster = 1) {
    emulator::launch({blocks, threads, shared, stream, cluster}, [&] { kernel(params); });
    return cudaGetLastError();
}

} // namespace ponder::cuda
