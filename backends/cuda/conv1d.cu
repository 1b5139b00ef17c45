// conv1d: y_t = b + sum_j w_j x_{t-3-shift+j}, depthwise over 4 taps; before the start come
// the 3 + shift rows of `before`, or zeros.
// vjp: dx_u = sum_j w_j dy_{u+3+shift-j}, dw_j = sum x_{t-3-shift+j} dy_t, db = sum dy_t
#include "launch.cuh"
#include "ops.hpp"

#include <algorithm>
#include <cmath>

namespace ponder::cuda {

namespace {

constexpr int threads = 256, lanes = 16;

template <int N, class X, class W, class Y>
__global__ void conv1d_kernel(const X *x, const W *w, const W *b, const X *before, Y *y,
                              int64_t packs, int64_t tokens, int64_t width, int64_t shift) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x, at = i * N;
    if (i >= packs)
        return;
    wait_for_earlier();
    const int64_t row = at / width, c = at - row * width, t = row % tokens;
    const Pack<W, N> start = load<N>(b + c);
    float sum[N];
    for (int k = 0; k < N; ++k)
        sum[k] = start[k];
#pragma unroll
    for (int64_t j = 0; j < 4; ++j)
        if (const int64_t back = 3 + shift - j; t >= back || before) {
            const Pack<W, N> tap = load<N>(w + j * width + c);
            const Pack<X, N> in =
                load<N>(t >= back ? x + at - back * width
                                  : before + (row / tokens * (3 + shift) + t + j) * width + c);
            for (int k = 0; k < N; ++k)
                sum[k] += tap[k] * in[k];
        }
    Pack<Y, N> out;
    for (int k = 0; k < N; ++k)
        out.set(k, sum[k]);
    store<N>(y + at, out);
}

template <class W, class Y> struct Filters {
    const W *w[2], *b[2];
    Y *y[2];
};

constexpr int turned = 4; // rows of a thread

// A thread convolves and turns two pairs in some rows of a stream. Angles are a mini-batch at most:
// f32 is off by some 1e-6 at the far end.
template <class X, class W, class Y>
__global__ void conv1d_rope_kernel(const X *x, const X *before, Filters<W, Y> filters, int items,
                                   int tokens, int width, int shift, int d, int period,
                                   float log_theta) {
    const int item = int(blockIdx.x) * threads + int(threadIdx.x), packs = width / 4;
    if (item >= items)
        return;
    const int c = item % packs * 4, chunks = (tokens + turned - 1) / turned;
    const int chunk = item / packs % chunks, t0 = chunk * turned;
    const int64_t s = item / packs / chunks;
    const bool second = blockIdx.y > 0;
    const W *const w = second ? filters.w[1] : filters.w[0];
    const Pack<W, 4> start = load<4>((second ? filters.b[1] : filters.b[0]) + c);
    Pack<W, 4> tap[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        tap[j] = load<4>(w + j * width + c);
    float frequency[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
        frequency[k] = expf(-log_theta * float((c + 2 * k) % d) / float(d));
    wait_for_earlier();        // filters are weights
    Pack<X, 4> in[turned + 3]; // rows t0 - 3 - shift and on
#pragma unroll
    for (int j = 0; j < turned + 3; ++j) {
        const int t = t0 + j - 3 - shift;
        if (t >= 0 && t < tokens)
            in[j] = load<4>(x + (s * tokens + t) * width + c);
        else if (t < 0 && before)
            in[j] = load<4>(before + (s * (3 + shift) + t + 3 + shift) * width + c);
        else
            for (int k = 0; k < 4; ++k)
                in[j].set(k, 0);
    }
#pragma unroll
    for (int r = 0; r < turned; ++r) {
        if (t0 + r >= tokens)
            return;
        float sum[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            sum[k] = start[k];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sum[k] += tap[j][k] * in[r + j][k];
        }
        Pack<Y, 4> out;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float cosine, sine;
            sincosf(float((t0 + r) % period) * frequency[k], &sine, &cosine);
            out.set(2 * k, sum[2 * k] * cosine - sum[2 * k + 1] * sine);
            out.set(2 * k + 1, sum[2 * k] * sine + sum[2 * k + 1] * cosine);
        }
        store<4>((second ? filters.y[1] : filters.y[0]) + (s * tokens + t0 + r) * width + c, out);
    }
}

template <class DY, class W, class DX>
__global__ void conv1d_vjp_kernel(const DY *dy, const W *w, DX *dx, int64_t n, int64_t tokens,
                                  int64_t width, int64_t shift) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= n)
        return;
    const int64_t c = i % width, t = i / width % tokens;
    float sum = 0;
    for (int64_t j = 0; j < 4; ++j)
        if (const int64_t ahead = 3 + shift - j; t + ahead < tokens)
            sum += to_float(w[j * width + c]) * to_float(dy[i + ahead * width]);
    dx[i] = from_float<DX>(sum);
}

// A block sums 32 columns over its share of the rows: four taps and the bias.
template <class DY, class X>
__global__ void conv1d_weight_kernel(const DY *dy, const X *x, float *partial, int64_t rows,
                                     int64_t tokens, int64_t width, int64_t shift, int64_t share) {
    __shared__ float cell[lanes][33];
    const int64_t c = int64_t(blockIdx.x) * 32 + threadIdx.x;
    const int64_t first = int64_t(blockIdx.y) * share, end = min(rows, first + share);
    float sum[5] = {};
    if (c < width)
        for (int64_t r = first + threadIdx.y; r < end; r += lanes) {
            const float g = to_float(dy[r * width + c]);
            const int64_t t = r % tokens;
            sum[4] += g;
            for (int64_t j = 0; j < 4; ++j)
                if (const int64_t back = 3 + shift - j; t >= back)
                    sum[j] += to_float(x[(r - back) * width + c]) * g;
        }
    for (int j = 0; j < 5; ++j) {
        cell[threadIdx.y][threadIdx.x] = sum[j];
        __syncthreads();
        if (threadIdx.y == 0 && c < width) {
            float all = 0;
            for (int i = 0; i < lanes; ++i)
                all += cell[i][threadIdx.x];
            partial[(int64_t(blockIdx.y) * 5 + j) * width + c] = all;
        }
        __syncthreads();
    }
}

__global__ void conv1d_weight_sum(const float *partial, float *dw, float *db, int64_t width,
                                  int64_t parts) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= 5 * width)
        return;
    float sum = 0;
    for (int64_t p = 0; p < parts; ++p)
        sum += partial[p * 5 * width + i];
    (i < 4 * width ? dw[i] : db[i - 4 * width]) = sum;
}

} // namespace

int32_t plan_conv1d(const Call &call) {
    const int64_t n = call.count(0), tokens = call.dim(0, 1), width = call.dim(0, 2);
    const int64_t shift = int64_t(call.attr(0));
    const bool before = call.has_in(3);
    const size_t out = call.out(0);
    if (call.type(1) != call.type(2) || (before && call.type(3) != call.type(0)))
        return PONDER_PLAN_NONE;
    return by_types(call.type(0), call.type(1), [&]<class X, class W>(X, W) {
        return by_type(call.type(out), [&]<class Y>(Y) {
            return call.is(0, [=](const Run &run) {
                const X *x = run.at<const X>(0), *first = before ? run.at<const X>(3) : nullptr;
                const W *w = run.at<const W>(1), *b = run.at<const W>(2);
                Y *y = run.at<Y>(out);
                if (width % 4 == 0 && aligned(x, 16) && aligned(w, 16) && aligned(b, 16) &&
                    aligned(first, 16) && aligned(y, 16))
                    launch(run, conv1d_kernel<4, X, W, Y>, blocks_for(n / 4, threads), threads, 0,
                           x, w, b, first, y, n / 4, tokens, width, shift);
                else
                    launch(run, conv1d_kernel<1, X, W, Y>, blocks_for(n, threads), threads, 0, x, w,
                           b, first, y, n, tokens, width, shift);
            });
        });
    });
}

int32_t plan_conv1d_rope(const Call &call) {
    const int64_t n = call.count(0), tokens = call.dim(0, 1), width = call.dim(0, 2);
    const int64_t shift = int64_t(call.attr(0)), d = width / int64_t(call.attr(1)),
                  period = int64_t(call.attr(2));
    const float log_theta = float(std::log(call.attr(3)));
    const bool before = call.has_in(1), two = call.has_in(4);
    const int64_t items = n / tokens / width * ((tokens + turned - 1) / turned) * (width / 4);
    const size_t out = call.out(0);
    if (width % 4 != 0 || d % 4 != 0 || n >= (int64_t(1) << 31) ||
        (before && call.type(1) != call.type(0)))
        return PONDER_PLAN_NONE;
    for (size_t i : {3, 4, 5})
        if (call.has_in(i) && call.type(i) != call.type(2))
            return PONDER_PLAN_NONE;
    if (two && call.type(out + 1) != call.type(out))
        return PONDER_PLAN_NONE;
    return by_types(call.type(0), call.type(2), [&]<class X, class W>(X, W) {
        return by_type(call.type(out), [&]<class Y>(Y) {
            return call.is(0, [=](const Run &run) {
                Filters<W, Y> filters{};
                for (size_t i = 0; i < (two ? 2 : 1); ++i) {
                    filters.w[i] = run.at<const W>(2 + 2 * i);
                    filters.b[i] = run.at<const W>(3 + 2 * i);
                    filters.y[i] = run.at<Y>(out + i);
                }
                const X *x = run.at<const X>(0), *first = before ? run.at<const X>(1) : nullptr;
                for (const void *at :
                     {static_cast<const void *>(x), static_cast<const void *>(first),
                      static_cast<const void *>(filters.w[0]),
                      static_cast<const void *>(filters.b[0]),
                      static_cast<const void *>(filters.y[0]),
                      static_cast<const void *>(filters.w[1]),
                      static_cast<const void *>(filters.b[1]),
                      static_cast<const void *>(filters.y[1])})
                    if (!aligned(at, 16))
                        return run.device->fail(
                            "conv1d_rope: addresses have to be multiples of 16");
                launch(run, conv1d_rope_kernel<X, W, Y>,
                       dim3(blocks_for(items, threads), two ? 2 : 1), threads, 0, x, first, filters,
                       int(items), int(tokens), int(width), int(shift), int(d), int(period),
                       log_theta);
            });
        });
    });
}

int32_t plan_conv1d_vjp(const Call &call) {
    const int64_t n = call.count(0), tokens = call.dim(0, 1), width = call.dim(0, 2);
    const int64_t shift = int64_t(call.attr(0)), rows = n / width;
    const int64_t parts = std::clamp<int64_t>(rows / 64, 1, 64), share = (rows + parts - 1) / parts;
    return by_types(call.type(0), call.type(1), [&]<class DY, class X>(DY, X) {
        return by_types(call.type(2), call.type(3), [&]<class W, class DX>(W, DX) {
            return call.is(size_t(parts * 5 * width) * sizeof(float), [=](const Run &run) {
                float *partial = reinterpret_cast<float *>(run.workspace);
                conv1d_vjp_kernel<<<blocks_for(n, threads), threads, 0, run.stream>>>(
                    run.at<const DY>(0), run.at<const W>(2), run.at<DX>(3), n, tokens, width,
                    shift);
                conv1d_weight_kernel<<<dim3(blocks_for(width, 32), unsigned(parts)),
                                       dim3(32, lanes), 0, run.stream>>>(
                    run.at<const DY>(0), run.at<const X>(1), partial, rows, tokens, width, shift,
                    share);
                conv1d_weight_sum<<<blocks_for(5 * width, threads), threads, 0, run.stream>>>(
                    partial, run.at<float>(4), run.at<float>(5), width, parts);
            });
        });
    });
}

} // namespace ponder::cuda
