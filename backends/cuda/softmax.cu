// softmax, log_sum_exp, sum_last: over the last dim, a block for each row.
#include "ops.hpp"

namespace ponder::cuda {

namespace {

constexpr int threads = 128;

template <class X, class Y>
__global__ void softmax_kernel(const X *x, Y *y, int64_t n, int64_t causal_rows) {
    __shared__ float cell[33];
    const int64_t r = blockIdx.x;
    const int64_t seen = causal_rows ? min(n, r % causal_rows + 1) : n;
    x += r * n;
    y += r * n;
    float top = -INFINITY, sum = 0;
    for (int64_t j = threadIdx.x; j < seen; j += threads)
        top = fmaxf(top, to_float(x[j]));
    top = block_max(top, cell);
    for (int64_t j = threadIdx.x; j < seen; j += threads)
        sum += expf(to_float(x[j]) - top);
    sum = block_sum(sum, cell);
    for (int64_t j = threadIdx.x; j < n; j += threads)
        y[j] = from_float<Y>(j < seen ? expf(to_float(x[j]) - top) / sum : 0.0f);
}

template <class X, class Y> __global__ void log_sum_exp_kernel(const X *x, Y *y, int64_t n) {
    __shared__ float cell[33];
    x += int64_t(blockIdx.x) * n;
    float top = -INFINITY, sum = 0;
    for (int64_t j = threadIdx.x; j < n; j += threads)
        top = fmaxf(top, to_float(x[j]));
    top = block_max(top, cell);
    for (int64_t j = threadIdx.x; j < n; j += threads)
        sum += expf(to_float(x[j]) - top);
    sum = block_sum(sum, cell);
    if (threadIdx.x == 0)
        y[blockIdx.x] = from_float<Y>(top + logf(sum));
}

template <class X, class Y> __global__ void sum_last_kernel(const X *x, Y *y, int64_t n) {
    __shared__ float cell[33];
    x += int64_t(blockIdx.x) * n;
    float sum = 0;
    for (int64_t j = threadIdx.x; j < n; j += threads)
        sum += to_float(x[j]);
    sum = block_sum(sum, cell);
    if (threadIdx.x == 0)
        y[blockIdx.x] = from_float<Y>(sum);
}

} // namespace

int32_t plan_softmax(const Call &call) {
    const int64_t n = call.last(0), rows = call.count(0) / n;
    const int64_t causal_rows = call.attr(0) != 0 ? call.dim(0, call.rank(0) - 2) : 0;
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            softmax_kernel<<<unsigned(rows), threads, 0, run.stream>>>(
                run.at<const X>(0), run.at<Y>(1), n, causal_rows);
        });
    });
}

int32_t plan_log_sum_exp(const Call &call) {
    const int64_t n = call.last(0), rows = call.count(0) / n;
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            log_sum_exp_kernel<<<unsigned(rows), threads, 0, run.stream>>>(run.at<const X>(0),
                                                                          run.at<Y>(1), n);
        });
    });
}

int32_t plan_sum_last(const Call &call) {
    const int64_t n = call.last(0), rows = call.count(0) / n;
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            sum_last_kernel<<<unsigned(rows), threads, 0, run.stream>>>(run.at<const X>(0),
                                                                       run.at<Y>(1), n);
        });
    });
}

} // namespace ponder::cuda
