// conv1d: y_t = b + sum_j w_j x_{t-3-shift+j}, depthwise over 4 taps; before the start come
// the 3 + shift rows of `before`, or zeros.
// vjp: dx_u = sum_j w_j dy_{u+3+shift-j}, dw_j = sum x_{t-3-shift+j} dy_t, db = sum dy_t
#include "ops.hpp"

#include <algorithm>

namespace ponder::cuda {

namespace {

constexpr int threads = 256, lanes = 16;

template <int N, class X, class W, class Y>
__global__ void conv1d_kernel(const X *x, const W *w, const W *b, const X *before, Y *y,
                              int64_t packs, int64_t tokens, int64_t width, int64_t shift) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x, at = i * N;
    if (i >= packs)
        return;
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
                    conv1d_kernel<4><<<blocks_for(n / 4, threads), threads, 0, run.stream>>>(
                        x, w, b, first, y, n / 4, tokens, width, shift);
                else
                    conv1d_kernel<1><<<blocks_for(n, threads), threads, 0, run.stream>>>(
                        x, w, b, first, y, n, tokens, width, shift);
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
