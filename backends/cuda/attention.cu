// attention: o_i = sum_{j<=i} p_ij v_j, p_ij = exp(q_i k_j / sqrt(D) - lse_i). Scores never leave
// the chip: a block takes some queries and walks the keys before them. bf16 on tensor cores for D
// of 32, 64 and 128; anything else plainly.
#include "attention_sm90.hpp"
#include "attention_walk.cuh"
#include "launch.cuh"
#include "ops.hpp"

#include <climits>

namespace ponder::cuda {

namespace {

// The longest blocks come first.
template <int D, int SPLIT>
__global__ __launch_bounds__(128 * SPLIT) void attention_kernel(const bf16 *qkv, bf16 *o,
                                                                float *lse, int tokens, int width,
                                                                float scale) {
    constexpr int threads = 128 * SPLIT, step = walk_keys * SPLIT;
    extern __shared__ __align__(128) std::byte memory[];
    const int first = (int(gridDim.x) - 1 - int(blockIdx.x)) * walk_queries;
    const int head = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % walk_warps;
    const int64_t stride = 3 * int64_t(width), s = blockIdx.z;
    const bf16 *const q = qkv + s * tokens * stride + head * D, *const k = q + width,
                      *const v = k + width;
    wait_for_earlier();
    Found<D> found;
    if (!walk<D, SPLIT>(
            memory, found, first, INT_MAX, min(first + walk_queries, tokens) - 1, scale * log2_e,
            [&](bf16 *to) { load_tile<D, walk_queries, threads>(to, q, first, tokens, stride); },
            [&](bf16 *to_k, bf16 *to_v, int key) {
                load_tile<D, step, threads>(to_k, k, key, tokens, stride);
                load_tile<D, step, threads>(to_v, v, key, tokens, stride);
            }))
        return;
    const int row = first + 16 * warp + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0 && row + 8 * half < tokens)
            lse[(s * gridDim.y + head) * tokens + row + 8 * half] =
                found.top[half] * scale + logf(found.sum[half]);
    store_rows<D>(o + s * tokens * width + head * D, found.out, first + 16 * warp, tokens, width,
                  1 / found.sum[0], 1 / found.sum[1]);
}

// ---- any type and D: 16 queries a block, 32 keys at a time

constexpr int plain_queries = 16, plain_keys = 32, plain_threads = 256;

size_t plain_bytes(int64_t d) {
    return size_t(plain_queries * (d + 1) * 2 + plain_keys * (d + 1) * 2 +
                  plain_queries * (plain_keys + 1) + 3 * plain_queries) *
           sizeof(float);
}

template <class T>
__global__ void plain_kernel(const T *qkv, T *o, float *lse, int tokens, int width, int d,
                             float scale) {
    extern __shared__ float cell[];
    float *const q = cell, *const out = q + plain_queries * (d + 1),
                 *const k = out + plain_queries * (d + 1), *const v = k + plain_keys * (d + 1),
                 *const p = v + plain_keys * (d + 1),
                 *const top = p + plain_queries * (plain_keys + 1),
                 *const sum = top + plain_queries, *const shrink = sum + plain_queries;
    const int first = blockIdx.x * plain_queries, head = blockIdx.y, lane = threadIdx.x % 32;
    const int64_t s = blockIdx.z, stride = 3 * int64_t(width);
    const T *const from = qkv + s * tokens * stride + int64_t(head) * d;
    for (int i = threadIdx.x; i < plain_queries * d; i += plain_threads) {
        const int row = i / d, c = i % d;
        q[row * (d + 1) + c] =
            first + row < tokens ? scale * to_float(from[int64_t(first + row) * stride + c]) : 0.0f;
        out[row * (d + 1) + c] = 0;
    }
    if (threadIdx.x < plain_queries) {
        top[threadIdx.x] = -INFINITY;
        sum[threadIdx.x] = 0;
    }
    const int last = min(first + plain_queries, tokens) - 1;
    for (int begin = 0; begin <= last; begin += plain_keys) {
        __syncthreads();
        for (int i = threadIdx.x; i < plain_keys * d; i += plain_threads) {
            const int row = i / d, c = i % d;
            const bool there = begin + row < tokens;
            const T *at = from + int64_t(begin + row) * stride + width + c;
            k[row * (d + 1) + c] = there ? to_float(at[0]) : 0.0f;
            v[row * (d + 1) + c] = there ? to_float(at[width]) : 0.0f;
        }
        __syncthreads();
        for (int row = threadIdx.x / 32; row < plain_queries; row += plain_threads / 32) {
            float dot = 0;
            for (int c = 0; c < d; ++c)
                dot += q[row * (d + 1) + c] * k[lane * (d + 1) + c];
            if (begin + lane > first + row)
                dot = -INFINITY;
            const float high = fmaxf(top[row], warp_max(dot));
            const float e = dot == -INFINITY ? 0.0f : expf(dot - high), all = warp_sum(e);
            p[row * (plain_keys + 1) + lane] = e;
            __syncwarp();
            if (lane == 0) {
                shrink[row] = top[row] == -INFINITY ? 0.0f : expf(top[row] - high);
                sum[row] = sum[row] * shrink[row] + all;
                top[row] = high;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < plain_queries * d; i += plain_threads) {
            const int row = i / d, c = i % d;
            float x = out[row * (d + 1) + c] * shrink[row];
            for (int j = 0; j < plain_keys; ++j)
                x += p[row * (plain_keys + 1) + j] * v[j * (d + 1) + c];
            out[row * (d + 1) + c] = x;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < plain_queries * d; i += plain_threads) {
        const int row = i / d, c = i % d;
        if (first + row < tokens)
            o[(s * tokens + first + row) * width + int64_t(head) * d + c] =
                from_float<T>(out[row * (d + 1) + c] / sum[row]);
    }
    if (threadIdx.x < plain_queries && first + int(threadIdx.x) < tokens)
        lse[(s * gridDim.y + head) * tokens + first + threadIdx.x] =
            top[threadIdx.x] + logf(sum[threadIdx.x]);
}

template <int D, int SPLIT>
void queue_tiles(const Run &run, dim3 grid, int64_t tokens, int64_t width) {
    constexpr size_t memory = walk_memory<D, SPLIT>;
    run.device->check(cudaFuncSetAttribute(attention_kernel<D, SPLIT>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(memory)),
                      "attention");
    launch(run, attention_kernel<D, SPLIT>, grid, 128 * SPLIT, memory, run.at<const bf16>(0),
           run.at<bf16>(1), run.at<float>(2), int(tokens), int(width), 1 / sqrtf(float(D)));
}

template <int D>
void queue_tiles(const Run &run, int64_t streams, int64_t heads, int64_t tokens, int64_t width) {
    if (attention_fits(*run.device, streams, heads, tokens, D) && aligned(run.at(1), 16))
        return attention_tiles(run, run.at<const bf16>(0), run.at<bf16>(1), run.at<float>(2),
                               streams, heads, tokens);
    const dim3 grid(blocks_for(tokens, walk_queries), unsigned(heads), unsigned(streams));
    walk_by_split<D>(grid, tokens, *run.device, [&]<int SPLIT>(std::integral_constant<int, SPLIT>) {
        queue_tiles<D, SPLIT>(run, grid, tokens, width);
    });
}

} // namespace

int32_t plan_attention(const Call &call) {
    const int64_t streams = call.dim(1, 0), tokens = call.dim(1, 1), width = call.dim(1, 2);
    const int64_t heads = int64_t(call.attr(0)), d = width / heads;
    if (call.type(0) != call.type(1))
        return PONDER_PLAN_NONE;
    const bool tiles =
        call.type(0) == PONDER_DTYPE_BF16 && (d == 32 || d == 64 || d == 128) && tokens < (1 << 24);
    const size_t memory = plain_bytes(d);
    if (!tiles && memory > (size_t(96) << 10))
        return PONDER_PLAN_NONE;
    return by_type(call.type(0), [&]<class T>(T) {
        return call.is(0, [=](const Run &run) {
            if constexpr (std::is_same_v<T, bf16>)
                if (tiles && aligned(run.at(0), 16) && aligned(run.at(1), 4))
                    return d == 32   ? queue_tiles<32>(run, streams, heads, tokens, width)
                           : d == 64 ? queue_tiles<64>(run, streams, heads, tokens, width)
                                     : queue_tiles<128>(run, streams, heads, tokens, width);
            run.device->check(cudaFuncSetAttribute(plain_kernel<T>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   int(memory)),
                              "attention");
            plain_kernel<<<dim3(blocks_for(tokens, plain_queries), unsigned(heads),
                                unsigned(streams)),
                           plain_threads, memory, run.stream>>>(
                run.at<const T>(0), run.at<T>(1), run.at<float>(2), int(tokens), int(width), int(d),
                1 / sqrtf(float(d)));
        });
    });
}

} // namespace ponder::cuda
