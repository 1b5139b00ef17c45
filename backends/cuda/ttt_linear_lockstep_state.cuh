// The state in the registers of the chain's warps: from memory, into the trace, its elements.
#pragma once

#include "ttt_linear_lockstep.cuh"

namespace ponder::cuda {

// visit(element, input, output)
template <class C, class L>
template <class Visit>
__device__ __forceinline__ void LockstepScan<C, L>::each(float (&w)[mo][2 * kt][4], int col,
                                                         const Place &at, Visit visit) {
#pragma unroll
    for (int m = 0; m < mo; ++m)
#pragma unroll
        for (int j = 0; j < 2 * kt; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                visit(w[m][j][e], 8 * j + 2 * at.t + (e & 1), col + 16 * m + at.g + 8 * (e >> 1));
}

// The initial state without its means over outputs, which stay in shared.mean.
template <class C, class L>
__device__ __forceinline__ void LockstepScan<C, L>::start_state(W &w, B &b, int col,
                                                                const Place &at) {
    const float *weight = p.w1 + int64_t(head) * D * D, *bias = p.b1 + int64_t(head) * D;
    each(w, col, at, [&](float &x, int in, int out) { x = weight[in * D + out]; });
    float *part = shared.mean + (at.warp + 1) * (D + 8), sum = 0;
#pragma unroll
    for (int n = 0; n < no; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            b[n][e] = b[n][e + 2] = bias[col + 8 * n + 2 * at.t + e];
            sum += b[n][e];
        }
    sum += from_lane_xor(sum, 1);
    sum += from_lane_xor(sum, 2);
    if (at.lane == 0)
        part[D] = sum;
#pragma unroll
    for (int j = 0; j < 2 * kt; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float x = 0;
#pragma unroll
            for (int m = 0; m < mo; ++m)
                x += w[m][j][e] + w[m][j][e + 2];
            x += from_lane_xor(x, 4);
            x += from_lane_xor(x, 8);
            x += from_lane_xor(x, 16);
            if (at.g == 0)
                part[8 * j + 2 * at.t + e] = x;
        }
    sync();
    for (int c = 32 * at.warp + at.lane; c <= D; c += 32 * C::chain) {
        float x = 0;
        for (int i = 1; i <= C::chain; ++i)
            x += shared.mean[i * (D + 8) + c];
        shared.mean[c] = x / float(D);
    }
    sync();
    each(w, col, at, [&](float &x, int in, int) { x -= shared.mean[in]; });
#pragma unroll
    for (int n = 0; n < no; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            b[n][e] -= shared.mean[D];
}

// Into the trace, where linear_scan would put it: a warp has 16 outputs there.
template <class C, class L>
__device__ __forceinline__ void
LockstepScan<C, L>::keep_state(int index, const float (&w)[mo][2 * kt][4], const float (&b)[no][4],
                               const Place &at) {
    float *to = p.trace_w + (int64_t(head) * trace_states(p.batches) + index) * L::state_size;
#pragma unroll
    for (int m = 0; m < mo; ++m) {
        const int thread = (mo * at.warp + m) * 32 + at.lane;
        const auto put = [&](int j, float x, float y, float z, float v) {
            *reinterpret_cast<float4 *>(to + (j * L::threads + thread) * 4) = {x, y, z, v};
        };
#pragma unroll
        for (int j = 0; j < 2 * kt; ++j)
            put(j, w[m][j][0], w[m][j][1], w[m][j][2], w[m][j][3]);
        float of[2]; // b of outputs g and g + 8
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float even = from_lane(b[2 * m + half][0], at.g >> 1),
                        odd = from_lane(b[2 * m + half][1], at.g >> 1);
            of[half] = at.g & 1 ? odd : even;
        }
        put(2 * kt, at.t == 0 ? of[0] : 0.0f, 0.0f, at.t == 0 ? of[1] : 0.0f, 0.0f);
    }
}

} // namespace ponder::cuda
