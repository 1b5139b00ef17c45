// attention_vjp: dv_j = sum_i p_ij do_i, ds_ij = p_ij (do_i v_j - do_i o_i) / sqrt(D),
//                dq_i = sum_j ds_ij k_j, dk_j = sum_i ds_ij q_i
// p is found again from lse. Some blocks have queries and others have keys, so that every sum
// belongs to one block and runs in one order; the price is that scores are computed twice.
#include "attention.cuh"
#include "attention_sm90.hpp"
#include "launch.cuh"
#include "ops.hpp"

namespace ponder::cuda {

namespace {

constexpr int warps = 4, threads = 32 * warps, rows = 16 * warps;

// delta[s,h,t] = do o over the head's D, a warp each
template <class T>
__global__ void delta_kernel(const T *o, const T *grad, float *delta, int64_t count,
                             int64_t tokens, int64_t heads, int64_t d) {
    const int64_t i = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
    if (i >= count)
        return;
    const int64_t at = i * d, row = i / heads, head = i % heads;
    float sum = 0;
    for (int64_t c = threadIdx.x % 32; c < d; c += 32)
        sum += to_float(o[at + c]) * to_float(grad[at + c]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        delta[(row / tokens * heads + head) * tokens + row % tokens] = sum;
}

// The same for heads of 32, 64 and 128 in bf16: eight values a lane, 4 to 16 lanes a head.
template <int D>
__global__ void delta_packs(const bf16 *o, const bf16 *grad, float *delta, int64_t count,
                            int64_t tokens, int64_t heads) {
    constexpr int lanes = D / 8;
    const int64_t mine = (int64_t(blockIdx.x) * 256 + threadIdx.x) / lanes;
    const int64_t i = min(mine, count - 1);
    wait_for_earlier();
    const int64_t at = i * D + threadIdx.x % lanes * 8, row = i / heads, head = i % heads;
    const Pack<bf16, 8> a = load<8>(o + at), b = load<8>(grad + at);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
        sum += a[j] * b[j];
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(~0u, sum, step, lanes);
    if (threadIdx.x % lanes == 0 && mine < count)
        delta[(row / tokens * heads + head) * tokens + row % tokens] = sum;
}

// A block's queries, all keys before them.
template <int D, int N>
__device__ inline void of_queries(std::byte *memory, int block, const bf16 *qkv, const float *lse,
                                  const float *delta, const bf16 *grad, bf16 *dqkv, int tokens,
                                  int width, float scale) {
    bf16 *const stage = reinterpret_cast<bf16 *>(memory);
    const int first = block * rows;
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t stride = 3 * int64_t(width), s = blockIdx.z;
    const bf16 *const q = qkv + s * tokens * stride + head * D, *const k = q + width,
                     *const v = k + width;
    uint32_t mine[D / 16][4], up[D / 16][4];
    load_tile<D, rows, threads>(stage, q, first, tokens, stride);
    load_tile<D, rows, threads>(stage + rows * D, grad + s * tokens * width + head * D, first,
                                tokens, width);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    load_rows<D>(mine, stage, 16 * warp);
    load_rows<D>(up, stage + rows * D, 16 * warp);
    __syncthreads();

    const auto fetch = [&](int j) {
        bf16 *to = stage + j % 2 * 2 * N * D;
        load_tile<D, N, threads>(to, k, j * N, tokens, stride);
        load_tile<D, N, threads>(to + N * D, v, j * N, tokens, stride);
        commit_copies();
    };
    const float factor = scale * log2_e;
    const int row = first + 16 * warp + lane / 4;
    float log_sum[2], inner[2];
    for (int half = 0; half < 2; ++half) {
        const int64_t at = (s * gridDim.y + head) * tokens + min(row + 8 * half, tokens - 1);
        log_sum[half] = lse[at] * log2_e;
        inner[half] = delta[at];
    }
    const int last = min(first + rows, tokens) - 1, tiles = last / N + 1;
    float out[D / 8][4] = {};
    fetch(0);
    for (int j = 0; j < tiles; ++j) {
        wait_for_copies<0>();
        __syncthreads();
        if (j + 1 < tiles)
            fetch(j + 1);
        const bf16 *const at_k = stage + j % 2 * 2 * N * D, *const at_v = at_k + N * D;
        float p[N / 8][4] = {}, dp[N / 8][4] = {};
        multiply_rows<D, N>(p, mine, at_k);
        multiply_rows<D, N>(dp, up, at_v);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool seen = j * N + 8 * n + lane % 4 * 2 + i % 2 <= row + i / 2 * 8;
                const float e = seen ? exp2f(p[n][i] * factor - log_sum[i / 2]) : 0.0f;
                p[n][i] = e * (dp[n][i] - inner[i / 2]);
            }
        multiply_results<D, N>(out, p, at_k);
    }
    store_rows<D>(dqkv + s * tokens * stride + head * D, out, first + 16 * warp, tokens, stride,
                  scale, scale);
}

// A block's keys, all queries from them on: everything transposed.
template <int D, int N>
__device__ inline void of_keys(std::byte *memory, int block, const bf16 *qkv, const float *lse,
                               const float *delta, const bf16 *grad, bf16 *dqkv, int tokens,
                               int width, float scale) {
    bf16 *const stage = reinterpret_cast<bf16 *>(memory);
    float *const sums = reinterpret_cast<float *>(memory + 4 * N * D * sizeof(bf16)); // [2][2][N]
    const int first = block * rows;
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t stride = 3 * int64_t(width), s = blockIdx.z;
    const bf16 *const q = qkv + s * tokens * stride + head * D, *const k = q + width,
                     *const v = k + width, *const up = grad + s * tokens * width + head * D;
    const float *const at_lse = lse + (s * gridDim.y + head) * tokens,
                       *const at_delta = delta + (s * gridDim.y + head) * tokens;
    uint32_t mine_k[D / 16][4], mine_v[D / 16][4];
    static_assert(rows <= 2 * N);
    load_tile<D, rows, threads>(stage, k, first, tokens, stride);
    load_tile<D, rows, threads>(stage + rows * D, v, first, tokens, stride);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    load_rows<D>(mine_k, stage, 16 * warp);
    load_rows<D>(mine_v, stage + rows * D, 16 * warp);
    __syncthreads();

    const auto fetch = [&](int j) {
        bf16 *to = stage + j % 2 * 2 * N * D;
        load_tile<D, N, threads>(to, q, j * N, tokens, stride);
        load_tile<D, N, threads>(to + N * D, up, j * N, tokens, width);
        commit_copies();
        float *sum = sums + j % 2 * 2 * N;
        for (int i = threadIdx.x; i < N; i += threads) {
            const int t = min(j * N + i, tokens - 1);
            sum[i] = at_lse[t] * log2_e;
            sum[N + i] = at_delta[t];
        }
    };
    const float factor = scale * log2_e;
    const int key = first + 16 * warp + lane / 4;
    const int begin = first / N, tiles = (tokens + N - 1) / N;
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    fetch(begin);
    for (int j = begin; j < tiles; ++j) {
        wait_for_copies<0>();
        __syncthreads();
        if (j + 1 < tiles)
            fetch(j + 1);
        const bf16 *const at_q = stage + j % 2 * 2 * N * D, *const at_up = at_q + N * D;
        const float *const sum = sums + j % 2 * 2 * N;
        float p[N / 8][4] = {}, dp[N / 8][4] = {};
        multiply_rows<D, N>(p, mine_k, at_q);
        multiply_rows<D, N>(dp, mine_v, at_up);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = 8 * n + lane % 4 * 2 + i % 2, query = j * N + column;
                const bool seen = query >= key + i / 2 * 8 && query < tokens;
                p[n][i] = seen ? exp2f(p[n][i] * factor - sum[column]) : 0.0f;
                dp[n][i] = p[n][i] * (dp[n][i] - sum[N + column]);
            }
        multiply_results<D, N>(dv, p, at_up);
        multiply_results<D, N>(dk, dp, at_q);
    }
    bf16 *const to = dqkv + s * tokens * stride + head * D + width;
    store_rows<D>(to, dk, first + 16 * warp, tokens, stride, scale, scale);
    store_rows<D>(to + width, dv, first + 16 * warp, tokens, stride, 1, 1);
}

// Blocks of keys and of queries by turns, those with the longest way first.
template <int D, int N>
__global__ __launch_bounds__(threads) void tiles_kernel(const bf16 *qkv, const float *lse,
                                                        const float *delta, const bf16 *grad,
                                                        bf16 *dqkv, int tokens, int width,
                                                        float scale) {
    extern __shared__ __align__(128) std::byte memory[];
    const int block = int(blockIdx.x) / 2, last = int(gridDim.x) / 2 - 1;
    wait_for_earlier();
    if (blockIdx.x % 2 == 0)
        of_keys<D, N>(memory, block, qkv, lse, delta, grad, dqkv, tokens, width, scale);
    else
        of_queries<D, N>(memory, last - block, qkv, lse, delta, grad, dqkv, tokens, width, scale);
}

template <int D, int N>
void queue_tiles(const Run &run, float *delta, int64_t streams, int64_t heads,
                 int64_t tokens, int64_t width) {
    constexpr size_t memory = size_t(4 * N * D) * sizeof(bf16) + 4 * N * sizeof(float);
    run.device->check(cudaFuncSetAttribute(tiles_kernel<D, N>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(memory)),
                      "attention_vjp");
    const int64_t count = streams * tokens * heads;
    launch(run, delta_packs<D>, blocks_for(count * (D / 8), 256), 256, 0, run.at<const bf16>(1),
           run.at<const bf16>(3), delta, count, tokens, heads);
    if (attention_gradients_fit(*run.device, streams, heads, tokens, D))
        return attention_gradients(run, run.at<const bf16>(0), run.at<const float>(2), delta,
                                   run.at<const bf16>(3), run.at<bf16>(4), streams, heads, tokens);
    launch(run, tiles_kernel<D, N>,
           dim3(2 * blocks_for(tokens, rows), unsigned(heads), unsigned(streams)), threads, memory,
           run.at<const bf16>(0), run.at<const float>(2), delta, run.at<const bf16>(3),
           run.at<bf16>(4), int(tokens), int(width), 1 / sqrtf(float(D)));
}

// ---- any type and D: 16 queries (or keys) a block, 32 keys (or queries) at a time

constexpr int plain_rows = 16, plain_other = 32, plain_threads = 256;

size_t plain_bytes(int64_t d) {
    return size_t(plain_rows * (d + 1) * 4 + plain_other * (d + 1) * 2 +
                  2 * plain_rows * (plain_other + 1) + 2 * (plain_rows + plain_other)) *
           sizeof(float);
}

// by_key: the block's rows are keys and it makes dk and dv; else queries, and it makes dq.
template <class T, bool by_key>
__global__ void plain_kernel(const T *qkv, const float *lse, const float *delta, const T *grad,
                             T *dqkv, int tokens, int width, int d, float scale) {
    extern __shared__ float cell[];
    const int e = d + 1;
    float *const a = cell, *const b = a + plain_rows * e, // the rows': q, do or k, v
        *const sum_a = b + plain_rows * e, *const sum_b = sum_a + plain_rows * e,
                 *const c = sum_b + plain_rows * e, *const f = c + plain_other * e, // the others'
        *const p = f + plain_other * e, *const ds = p + plain_rows * (plain_other + 1),
                 *const row_lse = ds + plain_rows * (plain_other + 1),
                 *const row_delta = row_lse + plain_rows, *const other_lse = row_delta + plain_rows,
                 *const other_delta = other_lse + plain_other;
    const int first = blockIdx.x * plain_rows, head = blockIdx.y, lane = threadIdx.x % 32;
    const int64_t s = blockIdx.z, stride = 3 * int64_t(width);
    const T *const from = qkv + s * tokens * stride + int64_t(head) * d;
    const T *const up = grad + s * tokens * width + int64_t(head) * d;
    const int64_t at_head = (s * gridDim.y + head) * tokens;
    const auto load = [&](float *x, float *y, int begin, int count, bool keys) {
        for (int i = threadIdx.x; i < count * d; i += plain_threads) {
            const int row = begin + i / d, col = i % d, to = i / d * e + col;
            const bool there = row < tokens;
            const T *at = from + int64_t(row) * stride + col;
            x[to] = there ? to_float(keys ? at[width] : at[0]) : 0.0f;
            y[to] = !there ? 0.0f : keys ? to_float(at[2 * width])
                                         : to_float(up[int64_t(row) * width + col]);
        }
    };
    const auto load_sums = [&](float *x, float *y, int begin, int count) {
        for (int i = threadIdx.x; i < count; i += plain_threads) {
            x[i] = begin + i < tokens ? lse[at_head + begin + i] : 0.0f;
            y[i] = begin + i < tokens ? delta[at_head + begin + i] : 0.0f;
        }
    };
    load(a, b, first, plain_rows, by_key);
    load_sums(row_lse, row_delta, first, plain_rows);
    for (int i = threadIdx.x; i < plain_rows * e; i += plain_threads)
        sum_a[i] = sum_b[i] = 0;
    const int begin = by_key ? first / plain_other * plain_other : 0;
    const int end = by_key ? tokens : min(first + plain_rows, tokens);
    for (int other = begin; other < end; other += plain_other) {
        __syncthreads();
        load(c, f, other, plain_other, !by_key);
        load_sums(other_lse, other_delta, other, plain_other);
        __syncthreads();
        for (int row = threadIdx.x / 32; row < plain_rows; row += plain_threads / 32) {
            const int query = by_key ? other + lane : first + row;
            const int key = by_key ? first + row : other + lane;
            float score = 0, dp = 0;
            for (int j = 0; j < d; ++j) {
                score += a[row * e + j] * c[lane * e + j];
                dp += b[row * e + j] * f[lane * e + j];
            }
            const float log_sum = by_key ? other_lse[lane] : row_lse[row];
            const float inner = by_key ? other_delta[lane] : row_delta[row];
            const bool seen = key <= query && query < tokens && key < tokens;
            const float x = seen ? expf(score * scale - log_sum) : 0.0f;
            p[row * (plain_other + 1) + lane] = x;
            ds[row * (plain_other + 1) + lane] = x * (dp - inner) * scale;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < plain_rows * d; i += plain_threads) {
            const int row = i / d, col = i % d;
            float x = 0, y = 0;
            for (int j = 0; j < plain_other; ++j) {
                x += ds[row * (plain_other + 1) + j] * c[j * e + col];
                if (by_key)
                    y += p[row * (plain_other + 1) + j] * f[j * e + col];
            }
            sum_a[row * e + col] += x;
            sum_b[row * e + col] += y;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < plain_rows * d; i += plain_threads) {
        const int row = i / d, col = i % d;
        if (first + row >= tokens)
            continue;
        T *const to =
            dqkv + (s * tokens + first + row) * stride + int64_t(head) * d + col;
        if (by_key) {
            to[width] = from_float<T>(sum_a[row * e + col]);
            to[2 * width] = from_float<T>(sum_b[row * e + col]);
        } else {
            to[0] = from_float<T>(sum_a[row * e + col]);
        }
    }
}

} // namespace

int32_t plan_attention_vjp(const Call &call) {
    const int64_t streams = call.dim(1, 0), tokens = call.dim(1, 1), width = call.dim(1, 2);
    const int64_t heads = int64_t(call.attr(0)), d = width / heads;
    const int32_t type = call.type(0);
    for (size_t i : {1, 3, 4})
        if (call.type(i) != type)
            return PONDER_PLAN_NONE;
    const bool tiles =
        type == PONDER_DTYPE_BF16 && (d == 32 || d == 64 || d == 128) && tokens < (1 << 24);
    const size_t memory = plain_bytes(d);
    if (!tiles && memory > (size_t(96) << 10))
        return PONDER_PLAN_NONE;
    const int64_t count = streams * tokens * heads;
    return by_type(type, [&]<class T>(T) {
        return call.is(size_t(count) * sizeof(float), [=](const Run &run) {
            float *delta = reinterpret_cast<float *>(run.workspace);
            if constexpr (std::is_same_v<T, bf16>)
                if (tiles && aligned(run.at(0), 16) && aligned(run.at(1), 16) &&
                    aligned(run.at(3), 16))
                    return d == 32 ? queue_tiles<32, 64>(run, delta, streams, heads, tokens, width)
                           : d == 64
                               ? queue_tiles<64, 64>(run, delta, streams, heads, tokens, width)
                               : queue_tiles<128, 32>(run, delta, streams, heads, tokens, width);
            delta_kernel<<<blocks_for(count, 8), 256, 0, run.stream>>>(
                run.at<const T>(1), run.at<const T>(3), delta, count, tokens, heads, d);
            const dim3 grid(blocks_for(tokens, plain_rows), unsigned(heads), unsigned(streams));
            const auto queue = [&](auto kernel) {
                run.device->check(
                    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         int(memory)),
                    "attention_vjp");
                kernel<<<grid, plain_threads, memory, run.stream>>>(
                    run.at<const T>(0), run.at<const float>(2), delta, run.at<const T>(3),
                    run.at<T>(4), int(tokens), int(width), int(d), 1 / sqrtf(float(d)));
            };
            queue(plain_kernel<T, false>);
            queue(plain_kernel<T, true>);
        });
    });
}

} // namespace ponder::cuda
