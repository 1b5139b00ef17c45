// TTT-Linear with a head on a cluster of blocks, sm_90, for states too large for one: block `rank`
// has `own` of the outputs, and so the columns of V, y, P and their gradients that belong to them;
// K and Q, whose products sum over inputs, each block reads whole. What sums a token's outputs, as
// norms do, is sent by every warp to every block.
//
// Blocks write into a box of each other's shared memory, which serves one exchange after the other:
// open() waits until all have read what came before, send() and receive() are the two halves of the
// barrier behind which all see what each wrote, close() says that this block has read it. Between
// them there is room for work that does not touch the box. All four are for all threads, in turn.
#pragma once

#include "cluster.cuh"
#include "ttt_linear.cuh"

namespace ponder::cuda {

// Where this thread stands in the head; blocks of a cluster follow each other.
template <class L> struct ClusterPlace : Place {
    int rank, head_warp, head_thread;
    __device__ ClusterPlace() : ClusterPlace(int(blockIdx.x) % L::split) {}

private:
    __device__ explicit ClusterPlace(int rank)
        : Place(rank * L::own), rank(rank), head_warp(rank * L::warps + warp),
          head_thread(rank * L::threads + thread) {}
};

// A block's columns of a tile, as rows of their own.
template <class L> using OwnColumns = Linear<typename L::E, L::own, L::M>;

template <class L> struct Exchange {
    static constexpr int head_warps = L::D / 16;
    static constexpr int row_parts = L::mt * head_warps * 128; // floats of sums of rows
    float *box;

    __device__ __forceinline__ void open() const { cluster_wait(); }
    __device__ __forceinline__ void send() const { cluster_arrive(); }
    __device__ __forceinline__ void receive() const { cluster_wait(); }
    __device__ __forceinline__ void close() const { cluster_arrive(); }

    // RowSums over the head, for tile m of 16 tokens
    __device__ __forceinline__ void put_rows(int m, const float (&low)[8], const float (&high)[8],
                                             const ClusterPlace<L> &at) const {
        const float4 quad = RowSums::quad(low, high, at);
        float4 *to = RowSums::quad_at(box + m * head_warps * 128, at.head_warp, at);
#pragma unroll
        for (int rank = 0; rank < L::split; ++rank)
            *in_block(to, rank) = quad;
    }
    __device__ __forceinline__ void get_rows(float (&sum)[8], int m,
                                             const ClusterPlace<L> &at) const {
        RowSums::get(sum, box + m * head_warps * 128, head_warps, at);
    }
    // Sums over all threads of the head: a whole exchange.
    template <int count>
    __device__ __forceinline__ void total(float (&x)[count], const ClusterPlace<L> &at) const {
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
            for (int l = 16; l > 0; l /= 2)
                x[i] += from_lane_xor(x[i], l);
        open();
        if (at.lane < L::split)
#pragma unroll
            for (int i = 0; i < count; ++i)
                in_block(box, at.lane)[i * head_warps + at.head_warp] = x[i];
        sync_warp();
        send();
        receive();
#pragma unroll
        for (int i = 0; i < count; ++i) {
            x[i] = 0;
            for (int w = 0; w < head_warps; ++w)
                x[i] += box[i * head_warps + w];
        }
        close();
    }
};

// As goals, v being of a block's columns.
template <class L>
__device__ __forceinline__ void own_goals(float (&goal)[2][4], const typename L::E *k,
                                          const typename L::E *v, const HeadNorm &norm,
                                          const Place &at) {
#pragma unroll
    for (int nt = 0; nt < 2; ++nt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = at.g + 8 * half, dim = 8 * nt + 2 * at.t;
            const float2 vv = floats(pair_at(v + row * OwnColumns<L>::ld + 16 * at.warp + dim)),
                         kk = floats(pair_at(k + row * L::ld + at.col + dim));
            goal[nt][2 * half] = vv.x - kk.x - norm.b[nt][0];
            goal[nt][2 * half + 1] = vv.y - kk.y - norm.b[nt][1];
        }
}

// Products of rows under the causal mask: put(i, j, x, y) with x_i y_j + `plus` for j and j + 1
// where they are at most i + causal_k, else 0, for all tiles of 16 up to the diagonal. The block's
// warps share them; a barrier has to follow. X: what x and y are tiles of.
template <class L> constexpr int causal_ld = L::M + 8;
template <class X, class Put>
__device__ __forceinline__ void causal_products(const typename X::E *x, const typename X::E *y,
                                                float plus, int causal_k, const Place &at,
                                                Put put) {
    for (int pair = at.warp, i = 0, first = 0; i < X::mt; first += ++i)
        for (; pair <= first + i; pair += X::warps) {
            const int j = pair - first;
            float c[2][4] = {};
            row_products<X>(c, x + 16 * i * X::ld, y + 16 * j * X::ld, at.lane);
#pragma unroll
            for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = 16 * i + at.g + 8 * half, key = 16 * j + 8 * jj + 2 * at.t;
                    put(row, key, key <= row + causal_k ? c[jj][2 * half] + plus : 0.0f,
                        key < row + causal_k ? c[jj][2 * half + 1] + plus : 0.0f);
                }
        }
}

} // namespace ponder::cuda
