// Pieces of fused attention on tensor cores: tiles of rows in shared memory, fragments, products.
//
// A tile holds rows of D bf16 values in pieces of 16 bytes; piece c of row r lies at place
// c ^ swizzle(r), so that the eight rows that ldmatrix reads at once fall into different banks.
// mma.m16n8k16 (PTX ISA 9.7.14): lane l holds rows l/4 and l/4+8, columns 2(l%4) and +1 of a
// result; results of two neighbouring column tiles are the first operand of the next product.
#pragma once

#include "kernel.hpp"
#include "warp.cuh"

namespace ponder::cuda {

template <int D> struct Tile {
    static constexpr int pieces = D / 8;
    __device__ static int place(int row, int piece) {
        const int swizzle = pieces >= 8 ? row & 7 : (row >> 1) & (pieces - 1);
        return row * D + (piece ^ swizzle) * 8;
    }
};

// Rows first .. first + ROWS of a matrix of `rows` rows that are `stride` apart.
template <int D, int ROWS, int THREADS>
__device__ inline void load_tile(bf16 *tile, const bf16 *from, int first, int rows,
                                 int64_t stride) {
    constexpr int pieces = Tile<D>::pieces;
    for (int i = threadIdx.x; i < ROWS * pieces; i += THREADS) {
        const int row = i / pieces, piece = i % pieces;
        const bool there = first + row < rows;
        copy_async(tile + Tile<D>::place(row, piece),
                   from + (there ? int64_t(first + row) * stride : 0) + piece * 8, there);
    }
}

// A first operand: rows row0 .. row0 + 15, all of D.
template <int D>
__device__ inline void load_rows(uint32_t (&f)[D / 16][4], const bf16 *tile, int row0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        load_matrices(f[k], tile + Tile<D>::place(row0 + lane % 16, 2 * k + lane / 16));
}

// c[16,N] += a[16,D] b[N,D]^T for a tile b of N rows
template <int D, int N>
__device__ inline void multiply_rows(float (&c)[N / 8][4], const uint32_t (&a)[D / 16][4],
                                     const bf16 *tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            uint32_t b[4];
            load_matrices(b, tile + Tile<D>::place(16 * n + lane / 16 * 8 + lane % 8,
                                                   2 * k + lane / 8 % 2));
            mma_bf16(c[2 * n], a[k], b[0], b[1]);
            mma_bf16(c[2 * n + 1], a[k], b[2], b[3]);
        }
}

// c[16,D] += p[16,N] b[N,D] for results p and a tile b of N rows
template <int D, int N>
__device__ inline void multiply_results(float (&c)[D / 8][4], const float (&p)[N / 8][4],
                                        const bf16 *tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        const uint32_t a[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]),
                               pack_bf16(p[2 * k][2], p[2 * k][3]),
                               pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]),
                               pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            load_matrices_transposed(
                b, tile + Tile<D>::place(16 * k + lane % 16, 2 * n + lane / 16));
            mma_bf16(c[2 * n], a, b[0], b[1]);
            mma_bf16(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Rows row0 + l/4 and +8 of a result, bf16, to rows that are `stride` apart; the first `columns`.
template <int D>
__device__ inline void store_rows(bf16 *to, const float (&c)[D / 8][4], int row0, int rows,
                                  int64_t stride, float low, float high, int columns = D) {
    const int lane = threadIdx.x % 32, row = row0 + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        if (8 * n >= columns)
            break;
        if (row < rows)
            *reinterpret_cast<uint32_t *>(to + int64_t(row) * stride + 8 * n + column) =
                pack_bf16(c[n][0] * low, c[n][1] * low);
        if (row + 8 < rows)
            *reinterpret_cast<uint32_t *>(to + int64_t(row + 8) * stride + 8 * n + column) =
                pack_bf16(c[n][2] * high, c[n][3] * high);
    }
}

constexpr float log2_e = 1.4426950408889634f;

} // namespace ponder::cuda
