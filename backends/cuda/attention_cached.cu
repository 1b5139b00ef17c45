// attention_cached: new keys and values go into the caches, then each token attends to all rows up to
// its own. Here: which kernel does it, and the one that does for any type and size. It takes one head
// of one token a block: each warp every eighth key with a running maximum, a lane every 32nd column;
// in the end the warps' sums are added in their order.
#include "attention_cached.hpp"
#include "ops.hpp"

#include <type_traits>

namespace ponder::cuda {

namespace {

constexpr int threads = 256, warps = threads / 32;

template <class T>
__global__ void append_kernel(const T *qkv, const int32_t *first, T *k, T *v, int64_t n,
                              int64_t tokens, int64_t heads, int64_t places, int64_t d) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= n)
        return;
    const int64_t width = heads * d, c = i % width, row = i / width, s = row / tokens;
    const int64_t place = first[s] + row % tokens;
    if (place >= places)
        return;
    const int64_t to = ((s * heads + c / d) * places + place) * d + c % d;
    k[to] = qkv[row * 3 * width + width + c];
    v[to] = qkv[row * 3 * width + 2 * width + c];
}

// N: columns of a lane, at most.
template <class T, int N>
__global__ void cached_kernel(const T *qkv, const int32_t *first, const T *k_all, const T *v_all,
                              T *o, int tokens, int heads, int64_t places, int d, float scale) {
    extern __shared__ float cell[]; // [warps, d + 2]
    const int t = blockIdx.x, h = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t s = blockIdx.z, width = int64_t(heads) * d;
    const int64_t seen = min(int64_t(first[s]) + t + 1, places);
    const T *const q_row = qkv + (s * tokens + t) * 3 * width + int64_t(h) * d;
    const T *const k = k_all + (s * heads + h) * places * d, *const v = v_all + (s * heads + h) *
                                                                                    places * d;
    float q[N], out[N] = {}, top = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
        q[i] = lane + 32 * i < d ? scale * to_float(q_row[lane + 32 * i]) : 0.0f;
    for (int64_t j = warp; j < seen; j += warps) {
        float x = 0;
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (lane + 32 * i < d)
                x += q[i] * to_float(k[j * d + lane + 32 * i]);
        x = warp_sum(x);
        const float high = fmaxf(top, x), shrink = expf(top - high), e = expf(x - high);
        sum = sum * shrink + e;
        top = high;
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (lane + 32 * i < d)
                out[i] = out[i] * shrink + e * to_float(v[j * d + lane + 32 * i]);
    }
    float *const mine = cell + warp * (d + 2);
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (lane + 32 * i < d)
            mine[lane + 32 * i] = out[i];
    if (lane == 0) {
        mine[d] = top;
        mine[d + 1] = sum;
    }
    __syncthreads();
    float high = -INFINITY, total = 0;
    for (int w = 0; w < warps; ++w)
        high = fmaxf(high, cell[w * (d + 2) + d]);
    for (int w = 0; w < warps; ++w)
        total += cell[w * (d + 2) + d + 1] * expf(cell[w * (d + 2) + d] - high);
    for (int c = threadIdx.x; c < d; c += threads) {
        float x = 0;
        for (int w = 0; w < warps; ++w)
            x += cell[w * (d + 2) + c] * expf(cell[w * (d + 2) + d] - high);
        o[(s * tokens + t) * width + int64_t(h) * d + c] = from_float<T>(x / total);
    }
}

} // namespace

int32_t plan_attention_cached(const Call &call) {
    const CachedShape shape(call);
    const auto [streams, tokens, heads, places, d, type] = shape;
    for (size_t i = 2; i < 7; ++i)
        if (call.type(i) != call.type(0))
            return PONDER_PLAN_NONE;
    if (d > 256)
        return PONDER_PLAN_NONE;
    const FewTokens few(shape, *call.device);
    const bool is_few = FewTokens::fit(shape), is_many = !is_few && many_tokens_fit(shape);
    return by_type(type, [&]<class T>(T) {
        return call.is(is_few ? few.workspace() : 0, [=](const Run &run) {
            const auto [streams, tokens, heads, places, d, type] = shape;
            bool words = true;
            for (size_t i : {0, 4, 5, 6})
                words = words && aligned(run.at(i), 16);
            const size_t bytes = size_t(streams * heads * places * d) * sizeof(T);
            for (size_t i = 2; i < 4; ++i)
                if (run.at(i) != run.at(i + 3))
                    run.device->check(cudaMemcpyAsync(run.at(i + 3), run.at(i), bytes,
                                                      cudaMemcpyDeviceToDevice, run.stream),
                                      "attention_cached");
            if (is_few && words)
                return few.run(run);
            const int64_t n = streams * tokens * heads * d;
            append_kernel<<<blocks_for(n, threads), threads, 0, run.stream>>>(
                run.at<const T>(0), run.at<const int32_t>(1), run.at<T>(5), run.at<T>(6), n, tokens,
                heads, places, d);
            if (is_many && words)
                return attend_many_tokens(run, shape);
            const auto queue = [&]<int N>(std::integral_constant<int, N>) {
                cached_kernel<T, N>
                    <<<dim3(unsigned(tokens), unsigned(heads), unsigned(streams)), threads,
                       size_t(warps * (d + 2)) * sizeof(float), run.stream>>>(
                        run.at<const T>(0), run.at<const int32_t>(1), run.at<const T>(5),
                        run.at<const T>(6), run.at<T>(4), int(tokens), int(heads), places, int(d),
                        1 / sqrtf(float(d)));
            };
            if (d <= 64)
                queue(std::integral_constant<int, 2>());
            else
                queue(std::integral_constant<int, 8>());
        });
    });
}

} // namespace ponder::cuda
