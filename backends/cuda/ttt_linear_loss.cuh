// The loss output of the scan of TTT-Linear: the part that waits for no state, and the means.
#pragma once

#include "ttt_linear.cuh"

namespace ponder::cuda {

// Sum over mini-batches of the last token's error under the initial state. Each warp takes eight
// mini-batches at a time, a lane D / 32 dims.
template <class L, int warps>
__device__ float initial_error(const LinearParams &p, int head, const Place &at) {
    using E = typename L::E;
    constexpr int per = L::D / 32, group = 8;
    float *keys = reinterpret_cast<float *>(shared_memory()) + at.warp * L::D * group; // [D][8]
    const int s = head / p.heads, h = head % p.heads, width = p.heads * L::D;
    const int64_t offset = int64_t(s) * p.tokens * width + h * L::D;
    const E *k = static_cast<const E *>(p.k) + offset, *v = static_cast<const E *>(p.v) + offset;
    const float *w = p.w1 + int64_t(head) * L::D * L::D, *b = p.b1 + int64_t(head) * L::D;
    float total = 0;
    for (int first = at.warp * group; first < p.batches; first += warps * group) {
        sync_warp();
        for (int i = 0; i < group; ++i) {
            const int token = min((first + i + 1) * L::M, p.tokens) - 1;
            for (int c = at.lane; c < L::D; c += 32)
                keys[c * group + i] =
                    first + i < p.batches ? to_float(k[int64_t(token) * width + c]) : 0;
        }
        sync_warp();
        float z[per][group];
#pragma unroll
        for (int j = 0; j < per; ++j)
#pragma unroll
            for (int i = 0; i < group; ++i)
                z[j][i] = b[at.lane + 32 * j];
#pragma unroll 8
        for (int c = 0; c < L::D; ++c) {
            const float4 low = *reinterpret_cast<const float4 *>(keys + c * group),
                         high = *reinterpret_cast<const float4 *>(keys + c * group + 4);
            const float key[group] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < per; ++j) {
                const float x = w[c * L::D + at.lane + 32 * j];
#pragma unroll
                for (int i = 0; i < group; ++i)
                    z[j][i] += key[i] * x;
            }
        }
#pragma unroll
        for (int i = 0; i < group; ++i) {
            float mean = 0, square = 0, error = 0;
#pragma unroll
            for (int j = 0; j < per; ++j)
                mean += z[j][i];
            for (int l = 16; l > 0; l /= 2)
                mean += from_lane_xor(mean, l);
            mean /= float(L::D);
#pragma unroll
            for (int j = 0; j < per; ++j)
                square += (z[j][i] - mean) * (z[j][i] - mean);
            for (int l = 16; l > 0; l /= 2)
                square += from_lane_xor(square, l);
            const float r = inverse_root(square / float(L::D) + p.eps);
            if (first + i < p.batches) {
                const int token = min((first + i + 1) * L::M, p.tokens) - 1;
#pragma unroll
                for (int j = 0; j < per; ++j) {
                    const int c = at.lane + 32 * j;
                    const int64_t from = int64_t(token) * width + c;
                    const float target = to_float(v[from]) - to_float(k[from]);
                    const float e =
                        p.g[h * L::D + c] * (z[j][i] - mean) * r + p.b[h * L::D + c] - target;
                    error += e * e;
                }
            }
            total += error;
        }
    }
    sync_block(); // the keys are no longer read
    return block_sum<warps>(total, reinterpret_cast<float *>(shared_memory()), at);
}

// The last block of a stream, of 2 H, takes the means over heads and mini-batches.
__device__ __forceinline__ void finish_loss(const LinearParams &p, int stream, float d) {
    if (!is_last(p.tickets + stream, 2u * unsigned(p.heads)))
        return;
    for (int i = 0; i < 3; ++i) {
        double sum = 0;
        for (int h = 0; h < p.heads; ++h)
            sum += p.loss_part[(int64_t(stream) * p.heads + h) * 3 + i];
        p.loss[stream * 3 + i] = float(sum / (double(d) * p.heads * p.batches));
    }
}

} // namespace ponder::cuda
