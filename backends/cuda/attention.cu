// attention: o_i = sum_{j<=i} p_ij v_j, p_ij = exp(q_i k_j / sqrt(D) - lse_i). Scores never leave
// the chip: a block takes some queries, walks the keys before them and keeps a running maximum
// (Dao 2023, arXiv 2307.08691). bf16 on tensor cores for D of 32, 64 and 128; anything else plainly.
#include "attention.cuh"
#include "attention_sm90.hpp"
#include "launch.cuh"
#include "ops.hpp"

namespace ponder::cuda {

namespace {

constexpr int warps = 4, queries = 16 * warps, keys = 64;

// SPLIT groups of four warps share a block's queries and take the tiles of keys by turns; in the
// end the first group adds up what all found. That shortens the way of the longest block, which is
// what counts where there are fewer blocks than multiprocessors.
template <int D, int SPLIT>
__global__ __launch_bounds__(128 * SPLIT) void attention_kernel(const bf16 *qkv, bf16 *o,
                                                                float *lse, int tokens, int width,
                                                                float scale) {
    constexpr int threads = 128 * SPLIT, step = keys * SPLIT;
    extern __shared__ __align__(128) std::byte memory[];
    bf16 *const stage = reinterpret_cast<bf16 *>(memory); // k and v, twice
    const int first = (int(gridDim.x) - 1 - int(blockIdx.x)) * queries; // longest blocks first
    const int head = blockIdx.y, lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % warps, group = threadIdx.x / 128;
    const int64_t stride = 3 * int64_t(width), s = blockIdx.z;
    const bf16 *const q = qkv + s * tokens * stride + head * D, *const k = q + width,
                     *const v = k + width;

    uint32_t mine[D / 16][4];
    wait_for_earlier();
    bf16 *const at_q = stage + 4 * step * D;
    load_tile<D, queries, threads>(at_q, q, first, tokens, stride);
    commit_copies();
    const auto fetch = [&](int j) {
        bf16 *to = stage + j % 2 * 2 * step * D;
        load_tile<D, step, threads>(to, k, j * step, tokens, stride);
        load_tile<D, step, threads>(to + step * D, v, j * step, tokens, stride);
        commit_copies();
    };
    const int last = min(first + queries, tokens) - 1, rounds = last / step + 1;
    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const float factor = scale * log2_e;
    const int row = first + 16 * warp + lane / 4;
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
        const bf16 *const at_k = stage + (j % 2 * 2 * step + group * keys) * D,
                         *const at_v = at_k + step * D;
        float p[keys / 8][4] = {};
        multiply_rows<D, keys>(p, mine, at_k);
        if (begin + keys > first + 16 * warp)
#pragma unroll
            for (int n = 0; n < keys / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (begin + 8 * n + lane % 4 * 2 + i % 2 > row + i / 2 * 8)
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
            return;
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
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0 && row + 8 * half < tokens)
            lse[(s * gridDim.y + head) * tokens + row + 8 * half] =
                top[half] * scale + logf(sum[half]);
    store_rows<D>(o + s * tokens * width + head * D, out, first + 16 * warp, tokens, width,
                  1 / sum[0], 1 / sum[1]);
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
                 *const top = p + plain_queries * (plain_keys + 1), *const sum = top + plain_queries,
                 *const shrink = sum + plain_queries;
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
    constexpr size_t memory = size_t((4 * SPLIT * keys + queries) * D) * sizeof(bf16);
    static_assert(size_t((SPLIT - 1) * (D / 2 + 4) * 128) * sizeof(float) <= memory);
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
    const dim3 grid(blocks_for(tokens, queries), unsigned(heads), unsigned(streams));
    const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
    if constexpr (D <= 64) {
        if (tokens > 2 * keys && blocks <= run.device->processors)
            return queue_tiles<D, 4>(run, grid, tokens, width);
        if (tokens > keys && blocks <= 2 * run.device->processors)
            return queue_tiles<D, 2>(run, grid, tokens, width);
    }
    queue_tiles<D, 1>(run, grid, tokens, width);
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
                run.at<const T>(0), run.at<T>(1), run.at<float>(2), int(tokens), int(width),
                int(d), 1 / sqrtf(float(d)));
        });
    });
}

} // namespace ponder::cuda
