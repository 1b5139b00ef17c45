// Both sides of a low-rank product for 16 tokens: u = x left sums over the depth, split over the
// warps of SPLIT blocks; then every warp has columns of u right. Operands come straight from device
// memory (fragments.cuh): factors are small and all of them lie in the cache.
#pragma once

#include "cluster.cuh"
#include "fragments.cuh"
#include "launch.cuh"
#include "lora_linear.hpp"

namespace ponder::cuda {

constexpr int prepare_warps = 8, prepare_threads = 32 * prepare_warps, prepare_rows = 16;

// Eight neighbours of a row as pairs of bf16.
__device__ inline void read_eight(uint32_t (&to)[4], const bf16 *from) {
    const uint4 x = *reinterpret_cast<const uint4 *>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ inline void read_eight(uint32_t (&to)[4], const float *from) {
    const float4 x = *reinterpret_cast<const float4 *>(from),
                 y = *reinterpret_cast<const float4 *>(from + 4);
    to[0] = pack_bf16(x.x, x.y), to[1] = pack_bf16(x.z, x.w);
    to[2] = pack_bf16(y.x, y.y), to[3] = pack_bf16(y.z, y.w);
}

// The sum over a cluster of what lies at the same place in each block's shared memory.
template <int SPLIT> __device__ inline float cluster_sum(const float *mine) {
    float x[SPLIT], sum = 0;
#pragma unroll
    for (int block = 0; block < SPLIT; ++block)
        asm volatile("{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %1, %2;\n"
                     "ld.shared::cluster.f32 %0, [at];\n}"
                     : "=f"(x[block])
                     : "r"(uint32_t(__cvta_generic_to_shared(mine))), "r"(block)
                     : "memory");
#pragma unroll
    for (int block = 0; block < SPLIT; ++block)
        sum += x[block];
    return sum;
}

template <int SPLIT, bool back, class X, class Y>
__device__ inline void prepare(const Prepare<X, Y> &p) {
    constexpr int tile = 16; // ranks
    __shared__ float cell[prepare_warps][prepare_rows][tile + 1];
    __shared__ float sums[most_ranks / tile][prepare_rows * tile];
    __shared__ __align__(16) bf16 narrow[prepare_rows][most_ranks + 8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int part = int(blockIdx.x) % SPLIT, first = int(blockIdx.x) / SPLIT * prepare_rows;
    const int worker = part * prepare_warps + warp, workers = SPLIT * prepare_warps;
    const int64_t s = blockIdx.y, row0 = s * p.tokens + first;
    const int rows = min(prepare_rows, p.tokens - first);
    const float *const left = p.left + s * p.depth * p.rank,
                *const right = p.right + s * p.rank * p.width;
    // Rows behind the last are read as the last and not written.
    const X *const low = p.x + (row0 + min(g, rows - 1)) * p.depth + 8 * q,
                  *const high = p.x + (row0 + min(g + 8, rows - 1)) * p.depth + 8 * q;

    wait_for_earlier();

    // What the second half needs of memory for columns n, ranks 0 to 15. Column g of operand j is
    // n + 4 (g / 2) + g % 2 + 2j, and this lane's results are columns n + 4q + 0..3.
    struct Operands {
        float b[2][4];
        float4 added[2], shift;
    };
    const auto factor = [&](float(&b)[4], int column, int r0) {
        if constexpr (back) {
            const float4 x = *reinterpret_cast<const float4 *>(right + int64_t(column) * p.rank +
                                                               r0 + 4 * q);
            b[0] = x.x, b[1] = x.y, b[2] = x.z, b[3] = x.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                b[i] = right[int64_t(r0 + 4 * q + i) * p.width + column];
        }
    };
    const auto fetch = [&](int n) {
        Operands o{};
        if (n >= p.width)
            return o;
        const int column = n + 4 * (g / 2) + g % 2;
        factor(o.b[0], column, 0);
        factor(o.b[1], column + 2, 0);
        if (p.b)
            o.shift = *reinterpret_cast<const float4 *>(p.b + n + 4 * q);
        if (p.add)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (g + 8 * half < rows)
                    o.added[half] = *reinterpret_cast<const float4 *>(
                        p.add + (row0 + g + 8 * half) * p.width + n + 4 * q);
        return o;
    };
    Operands next = fetch(16 * worker); // on its way while the sums run

    for (int r0 = 0; r0 < p.rank; r0 += tile) {
        float c[2][4] = {};
        const int rank = r0 + 2 * g; // column g of operand j is rank + j
#pragma unroll 3
        for (int k = 32 * worker; k < p.depth; k += 32 * workers) {
            uint32_t above[4], below[4];
            float f[2][8];
            read_eight(above, low + k);
            read_eight(below, high + k);
            if constexpr (back) {
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int i = 0; i < 8; i += 4) {
                        const float4 x = *reinterpret_cast<const float4 *>(
                            left + int64_t(rank + j) * p.depth + k + 8 * q + i);
                        f[j][i] = x.x, f[j][i + 1] = x.y, f[j][i + 2] = x.z, f[j][i + 3] = x.w;
                    }
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float2 x = *reinterpret_cast<const float2 *>(
                        left + int64_t(k + 8 * q + i) * p.rank + rank);
                    f[0][i] = x.x, f[1][i] = x.y;
                }
            }
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const uint32_t a[4] = {above[2 * step], below[2 * step], above[2 * step + 1],
                                       below[2 * step + 1]};
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float b[4] = {f[j][4 * step], f[j][4 * step + 1], f[j][4 * step + 2],
                                        f[j][4 * step + 3]};
                    multiply_wide(c[j], a, b);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                cell[warp][g + e / 2 * 8][2 * (2 * q + e % 2) + j] = c[j][e];
        __syncthreads();
        float sum = 0;
#pragma unroll
        for (int w = 0; w < prepare_warps; ++w)
            sum += cell[w][threadIdx.x / tile][threadIdx.x % tile];
        sums[r0 / tile][threadIdx.x] = sum;
        __syncthreads();
    }
    if constexpr (SPLIT > 1) {
        cluster_arrive();
        cluster_wait();
    }
    for (int r0 = 0; r0 < p.rank; r0 += tile) {
        const int row = threadIdx.x / tile, rank = r0 + threadIdx.x % tile;
        const float *const at = &sums[r0 / tile][threadIdx.x];
        float sum = *at;
        if constexpr (SPLIT > 1)
            sum = cluster_sum<SPLIT>(at);
        const bf16 u = __float2bfloat16(p.scale_u * sum);
        narrow[row][rank] = u;
        if (part == 0 && row < rows)
            p.u[(row0 + row) * p.rank + rank] = u;
    }
    if constexpr (SPLIT > 1)
        cluster_arrive(); // has read the others' sums
    __syncthreads();

    for (int n = 16 * worker; n < p.width; n += 16 * workers) {
        const int column = n + 4 * (g / 2) + g % 2;
        const Operands now = next;
        next = fetch(n + 16 * workers);
        float c[2][4] = {};
        for (int r0 = 0; r0 < p.rank; r0 += tile) {
            const uint32_t a[4] = {
                *reinterpret_cast<const uint32_t *>(&narrow[g][r0 + 4 * q]),
                *reinterpret_cast<const uint32_t *>(&narrow[g + 8][r0 + 4 * q]),
                *reinterpret_cast<const uint32_t *>(&narrow[g][r0 + 4 * q + 2]),
                *reinterpret_cast<const uint32_t *>(&narrow[g + 8][r0 + 4 * q + 2])};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float b[4] = {now.b[j][0], now.b[j][1], now.b[j][2], now.b[j][3]};
                if (r0 > 0)
                    factor(b, column + 2 * j, r0);
                multiply_wide(c[j], a, b);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (g + 8 * half >= rows)
                continue;
            const float4 &x = now.added[half], &shift = now.shift;
            Pack<Y, 4> out;
            out.set(0, x.x + shift.x + p.scale_base * c[0][2 * half]);
            out.set(1, x.y + shift.y + p.scale_base * c[0][2 * half + 1]);
            out.set(2, x.z + shift.z + p.scale_base * c[1][2 * half]);
            out.set(3, x.w + shift.w + p.scale_base * c[1][2 * half + 1]);
            store<4>(p.base + (row0 + g + 8 * half) * p.width + n + 4 * q, out);
        }
    }
    if constexpr (SPLIT > 1)
        cluster_wait(); // nobody leaves while another block still reads its sums
}

} // namespace ponder::cuda
