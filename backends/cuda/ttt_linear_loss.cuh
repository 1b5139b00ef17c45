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

// initial_error with matrix products: a warp takes the last keys of sixteen mini-batches at a time.
template <class L, int warps>
__device__ float tiled_initial_error(const LinearParams &p, int head) {
    using E = typename L::E;
    constexpr int D = L::D, M = 16, kt = L::kt;
    const Place at;
    E *const w = reinterpret_cast<E *>(kept_shared_memory()); // [D, ld], input by output
    float *const sums = reinterpret_cast<float *>(w + D * L::ld);
    const int s = head / p.heads, h = head % p.heads, width = p.heads * D;
    const float *weight = p.w1 + int64_t(head) * D * D, *bias = p.b1 + int64_t(head) * D;
    for (int i = at.thread; i < D * D / 4; i += 32 * warps) {
        const float4 x = *reinterpret_cast<const float4 *>(weight + 4 * i);
        uint32_t *to = reinterpret_cast<uint32_t *>(w + 4 * i / D * L::ld + 4 * i % D);
        to[0] = pack_bf16(x.x, x.y);
        to[1] = pack_bf16(x.z, x.w);
    }
    sync_block();
    float error = 0;
    for (int first = 16 * at.warp; first < p.batches; first += 16 * warps) {
        int64_t from[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = min((first + at.g + 8 * half + 1) * M, p.tokens) - 1;
            from[half] = (int64_t(s) * p.tokens + token) * width + h * D + 2 * at.t;
        }
        const auto pair = [&](const void *x, int half, int dim) {
            return *reinterpret_cast<const uint32_t *>(static_cast<const E *>(x) + from[half] +
                                                       dim);
        };
        FragA<E> keys[kt]; // which lie as results do, too
        uint32_t v[kt][4];
        float z[2 * kt][4];
#pragma unroll
        for (int k = 0; k < kt; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                keys[k].x[i] = pair(p.k, i & 1, 16 * k + 8 * (i >> 1));
                v[k][i] = pair(p.v, i & 1, 16 * k + 8 * (i >> 1));
            }
#pragma unroll
        for (int n = 0; n < 2 * kt; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[n][e] = bias[8 * n + 2 * at.t + (e & 1)];
#pragma unroll
        for (int k = 0; k < kt; ++k)
#pragma unroll
            for (int n = 0; n < kt; ++n) {
                FragB<E> b[2];
                load_b_transposed(b, w + 16 * k * L::ld + 16 * n, L::ld, at.lane);
                mma(z[2 * n], keys[k], b[0]);
                mma(z[2 * n + 1], keys[k], b[1]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float mean = 0, square = 0;
#pragma unroll
            for (int n = 0; n < 2 * kt; ++n)
                mean += z[n][2 * half] + z[n][2 * half + 1];
            mean += from_lane_xor(mean, 1);
            mean += from_lane_xor(mean, 2);
            mean *= 1.0f / D;
#pragma unroll
            for (int n = 0; n < 2 * kt; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    z[n][2 * half + e] -= mean;
                    square += z[n][2 * half + e] * z[n][2 * half + e];
                }
            square += from_lane_xor(square, 1);
            square += from_lane_xor(square, 2);
            const float r = quick_inverse_root(square * (1.0f / D) + p.eps);
            if (first + at.g + 8 * half < p.batches)
#pragma unroll
                for (int n = 0; n < 2 * kt; ++n) {
                    const float2 vv = floats(Pair<E>{v[n / 2][half + 2 * (n & 1)]}),
                                 kk = floats(Pair<E>{keys[n / 2].x[half + 2 * (n & 1)]});
                    const int dim = h * D + 8 * n + 2 * at.t;
                    const float x = p.g[dim] * z[n][2 * half] * r + p.b[dim] - (vv.x - kk.x),
                                y = p.g[dim + 1] * z[n][2 * half + 1] * r + p.b[dim + 1] -
                                    (vv.y - kk.y);
                    error += x * x + y * y;
                }
        }
    }
    return block_sum<warps>(error, sums, at);
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
