// What the reverses of TTT-Linear share.
#pragma once

#include "ttt_linear.cuh"

namespace ponder::cuda {

// Sums of five quantities over the block.
// Sync is what the threads that take part wait with.
template <class L, class Sync>
__device__ __forceinline__ void block_sums(float (&x)[8], float *shared, const Place &at,
                                           Sync sync) {
    sync();
#pragma unroll
    for (int i = 0; i < 5; ++i) {
#pragma unroll
        for (int l = 16; l > 0; l /= 2)
            x[i] += from_lane_xor(x[i], l);
        if (at.lane == 0)
            shared[i * L::warps + at.warp] = x[i];
    }
    sync();
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        x[i] = 0;
        for (int w = 0; w < L::warps; ++w)
            x[i] += shared[i * L::warps + w];
    }
}

// Gradient of `weight` |LN(z) - target|^2 / 2 for one key under the state whose copy is `w`;
// goal_of(i) is target - b. Leaves in `out`: the key and 1 [D + 4], dz, dtarget, dkey [D] each;
// adds to gradients of g and b [D] each.
template <class L, class Goal, class Sync>
__device__ void probe(const LinearParams &p, float *out, float *norms, float *sums,
                      const typename L::E *w, const typename L::E *key, Goal goal_of, int h,
                      float weight, const Place &at, Sync sync) {
    constexpr int D = L::D;
    float *k = out, *dz = out + D + 4, *dtarget = dz + D, *dkey = dtarget + D, *dg = norms,
          *db = dg + D;
    const int i = at.thread;
    if (i < D)
        k[i] = to_float(key[i]);
    if (i == D)
        k[D] = 1;
    sync();
    float s[8] = {}, z = 0, goal = 0, g = 0;
    if (i < D) {
        for (int c = 0; c <= D; ++c)
            z += k[c] * to_float(w[i * L::ld + c]);
        g = p.g[h * D + i];
        goal = goal_of(i);
        add_loss_sums(s, z, g, goal);
    }
    block_sums<L>(s, sums, at, sync);
    const LossStats stats(s, float(D), p.eps);
    if (i < D) {
        const float residual = g * stats.r * z - goal;
        dz[i] = weight * loss_gradient(z, g, goal, stats.r, stats.mean_u, stats.mean_uh);
        dtarget[i] = -weight * residual;
        dg[i] += weight * residual * stats.r * z;
        db[i] += weight * residual;
    }
    sync();
    if (i < D) {
        float sum = 0;
        for (int o = 0; o < D; ++o)
            sum += dz[o] * to_float(w[o * L::ld + i]);
        dkey[i] = sum;
    }
    sync();
}

template <class L>
__device__ __forceinline__ void copy_state(typename L::E *to, const typename L::State &w,
                                           const Place &at) {
#pragma unroll
    for (int j = 0; j < 2 * L::kt + 1; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            store_pair(to + (at.col + at.g + 8 * half) * L::ld + 8 * j + 2 * at.t, w[j][2 * half],
                       w[j][2 * half + 1]);
}

// c[m] += x y for the rows of a tile x and y [D, ld], a warp's 16 columns; or those as factors
template <class L>
__device__ __forceinline__ void add_products(float (&c)[2][4], const typename L::E *x,
                                             const FragB<typename L::E> (&y)[L::kt][2],
                                             const Place &at) {
#pragma unroll
    for (int k = 0; k < L::kt; ++k) {
        FragA<typename L::E> a;
        load_a(a, x + 16 * k, L::ld, at.lane);
        mma(c[0], a, y[k][0]);
        mma(c[1], a, y[k][1]);
    }
}
template <class L>
__device__ __forceinline__ void add_products(float (&c)[2][4], const typename L::E *x,
                                             const typename L::E *y, const Place &at) {
    using E = typename L::E;
#pragma unroll
    for (int k = 0; k < L::kt; ++k) {
        FragA<E> a;
        FragB<E> b[2];
        load_a(a, x + 16 * k, L::ld, at.lane);
        load_b_transposed(b, y + 16 * k * L::ld + at.col, L::ld, at.lane);
        mma(c[0], a, b[0]);
        mma(c[1], a, b[1]);
    }
}

} // namespace ponder::cuda
