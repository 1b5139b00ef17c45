// The way of a block over the keys: it takes 64 queries of a head, four warps of 16, and keeps
// scores, a running maximum and sums in registers (Dao 2023, arXiv 2307.08691).
//
// SPLIT groups of four warps share the queries and take the tiles of keys by turns; in the end the
// first group adds up what all found. That shortens the way of the longest block, which is what
// counts where there are fewer blocks than multiprocessors.
#pragma once

#include "attention.cuh"

#include <type_traits>

namespace ponder::cuda {

constexpr int walk_warps = 4, walk_queries = 16 * walk_warps, walk_keys = 64;

// Of a warp's queries: sum_j exp(factor (x_j - top)) v_j and the same without v_j, where x_j are
// the products with the keys. Rows l/4 and l/4 + 8 of lane l.
template <int D> struct Found {
    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

template <int D, int SPLIT>
constexpr size_t walk_memory = size_t((4 * SPLIT * walk_keys + walk_queries) * D) * sizeof(bf16);

// Query i, counted from the block's first, sees keys 0 .. past + i, none after `limit`; `last` is
// the last key that any of them sees. load_queries(tile) and load_keys(k, v, first key) begin
// copies of 64 and 64 SPLIT rows. True for the first group, which has the result.
template <int D, int SPLIT, class Q, class K>
__device__ __forceinline__ bool walk(std::byte *memory, Found<D> &found, int past, int limit,
                                     int last, float factor, Q load_queries, K load_keys) {
    constexpr int keys = walk_keys, step = keys * SPLIT;
    static_assert(size_t((SPLIT - 1) * (D / 2 + 4) * 128) * sizeof(float) <= walk_memory<D, SPLIT>);
    bf16 *const stage = reinterpret_cast<bf16 *>(memory); // k and v, twice
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % walk_warps,
              group = threadIdx.x / 128;
    auto &[out, top, sum] = found;
    uint32_t mine[D / 16][4];
    bf16 *const at_q = stage + 4 * step * D;
    load_queries(at_q);
    commit_copies();
    const auto fetch = [&](int j) {
        bf16 *to = stage + j % 2 * 2 * step * D;
        load_keys(to, to + step * D, j * step);
        commit_copies();
    };
    const int rounds = last / step + 1, row = past + 16 * warp + lane / 4;
    fetch(0);
    wait_for_copies<1>();
    __syncthreads();
    load_rows<D>(mine, at_q, 16 * warp);
    for (int j = 0; j < rounds; ++j) {
        wait_for_copies<0>();
        __syncthreads();
        if (j + 1 < rounds)
            fetch(j + 1);
        const int begin = j * step + group * keys;
        if (begin > last)
            continue;
        const bf16 *const at_k = stage + (j % 2 * 2 * step + group * keys) * D, *const at_v =
                                                                                    at_k + step * D;
        float p[keys / 8][4] = {};
        multiply_rows<D, keys>(p, mine, at_k);
        if (begin + keys > min(past + 16 * warp, limit))
#pragma unroll
            for (int n = 0; n < keys / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (begin + 8 * n + lane % 4 * 2 + i % 2 > min(row + i / 2 * 8, limit))
                        p[n][i] = -INFINITY;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float high = top[half];
#pragma unroll
            for (int n = 0; n < keys / 8; ++n)
                high = fmaxf(high, fmaxf(p[n][2 * half], p[n][2 * half + 1]));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            const float base = high == -INFINITY ? 0.0f : high; // no key seen yet
            const float shrink = exp2f((top[half] - base) * factor), offset = base * factor;
            top[half] = high;
            sum[half] *= shrink;
#pragma unroll
            for (int n = 0; n < keys / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    p[n][i] = exp2f(p[n][i] * factor - offset);
                    sum[half] += p[n][i];
                }
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                out[n][2 * half] *= shrink;
                out[n][2 * half + 1] *= shrink;
            }
        }
        multiply_results<D, keys>(out, p, at_v);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    }
    if constexpr (SPLIT > 1) {
        constexpr int size = (D / 2 + 4) * 128;
        float *other = reinterpret_cast<float *>(memory) + threadIdx.x % 128;
        __syncthreads(); // the stages are free
        if (group > 0) {
            other += (group - 1) * size;
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    other[(4 * n + i) * 128] = out[n][i];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                other[(D / 2 + half) * 128] = top[half];
                other[(D / 2 + 2 + half) * 128] = sum[half];
            }
        }
        __syncthreads();
        if (group > 0)
            return false;
        for (int g = 1; g < SPLIT; ++g, other += size)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float their_top = other[(D / 2 + half) * 128];
                const float high = fmaxf(top[half], their_top); // this group has seen key 0
                const float a = exp2f((top[half] - high) * factor),
                            b = exp2f((their_top - high) * factor);
                sum[half] = sum[half] * a + other[(D / 2 + 2 + half) * 128] * b;
                top[half] = high;
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i)
                        out[n][i] = out[n][i] * a + other[(4 * n + i) * 128] * b;
            }
    }
    return true;
}

// On the host: launch(SPLIT) for a grid of blocks that see up to `keys` keys.
template <int D, class F>
void walk_by_split(dim3 grid, int64_t keys, const ponder_device &device, F &&launch) {
    const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
    if constexpr (D <= 64) {
        if (keys > 2 * walk_keys && blocks <= device.processors &&
            walk_memory<D, 4> <= size_t(device.shared))
            return launch(std::integral_constant<int, 4>());
        if (keys > walk_keys && blocks <= 2 * device.processors)
            return launch(std::integral_constant<int, 2>());
    }
    launch(std::integral_constant<int, 1>());
}

} // namespace ponder::cuda
