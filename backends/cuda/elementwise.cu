// Ops on one element at a time: sigmoid, affine, power, exp, relu, step, reshape, gelu, gelu_vjp,
// gelu_derivative, dropout, fill, mean_vjp; and conversions between types.
#include "gelu.cuh"
#include "launch.cuh"
#include "ops.hpp"
#include "product_kernels.hpp"

namespace ponder::cuda {

namespace {

constexpr int threads = 256;

template <int N, class X, class Y, class F>
__global__ void each_kernel(const X *x, Y *y, int64_t packs, F f) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= packs)
        return;
    wait_for_earlier();
    const Pack<X, N> in = load<N>(x + i * N);
    Pack<Y, N> out;
    for (int j = 0; j < N; ++j)
        out.set(j, f(in[j], i * N + j));
    store<N>(y + i * N, out);
}

// y_i = f(x_i, i)
template <class X, class Y, class F> void each(const Run &run, const X *x, Y *y, int64_t n, F f) {
    if (n % 8 == 0 && aligned(x, 16) && aligned(y, 16))
        launch(run, each_kernel<8, X, Y, F>, blocks_for(n / 8, threads), threads, 0, x, y, n / 8,
               f);
    else
        launch(run, each_kernel<1, X, Y, F>, blocks_for(n, threads), threads, 0, x, y, n, f);
}

template <int N, class X, class Y, class Z, class F>
__global__ void both_kernel(const X *x, const Y *y, Z *z, int64_t packs, F f) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= packs)
        return;
    wait_for_earlier();
    const Pack<X, N> a = load<N>(x + i * N);
    const Pack<Y, N> b = load<N>(y + i * N);
    Pack<Z, N> out;
    for (int j = 0; j < N; ++j)
        out.set(j, f(a[j], b[j]));
    store<N>(z + i * N, out);
}

// z_i = f(x_i, y_i)
template <class X, class Y, class Z, class F>
void both(const Run &run, const X *x, const Y *y, Z *z, int64_t n, F f) {
    if (n % 8 == 0 && aligned(x, 16) && aligned(y, 16) && aligned(z, 16))
        launch(run, both_kernel<8, X, Y, Z, F>, blocks_for(n / 8, threads), threads, 0, x, y, z,
               n / 8, f);
    else
        launch(run, both_kernel<1, X, Y, Z, F>, blocks_for(n, threads), threads, 0, x, y, z, n, f);
}

template <class F> int32_t plan_each(const Call &call, F f) {
    const int64_t n = call.count(0);
    return by_types(call.type(0), call.type(call.out(0)), [&]<class X, class Y>(X, Y) {
        const size_t out = call.out(0);
        return call.is(
            0, [=](const Run &run) { each(run, run.at<const X>(0), run.at<Y>(out), n, f); });
    });
}

__host__ __device__ inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

struct ToSigmoid {
    __device__ float operator()(float x, int64_t) const { return 1 / (1 + expf(-x)); }
};
struct ToAffine {
    float factor, offset;
    // Rounded twice, as other backends do it.
    __device__ float operator()(float x, int64_t) const {
        return __fadd_rn(__fmul_rn(factor, x), offset);
    }
};
struct ToPower {
    float exponent;
    __device__ float operator()(float x, int64_t) const {
        return x == 0 && exponent < 0    ? 0.0f
               : exponent == 2           ? x * x
               : exponent == -0.5f       ? 1 / sqrtf(x)
               : exponent == -1          ? 1 / x
                                         : powf(x, exponent);
    }
};
struct ToExp {
    __device__ float operator()(float x, int64_t) const { return expf(x); }
};
struct ToRelu {
    __device__ float operator()(float x, int64_t) const { return x > 0 ? x : 0.0f; }
};
struct ToStep {
    __device__ float operator()(float x, int64_t) const { return x > 0 ? 1.0f : 0.0f; }
};
struct ToSame {
    __device__ float operator()(float x, int64_t) const { return x; }
};
struct ToGelu {
    __device__ float operator()(float x, int64_t) const { return gelu_of(x); }
};
struct ToGeluVjp {
    __device__ float operator()(float dy, float x) const { return dy * gelu_slope(x); }
};
struct ToGeluDerivative {
    int order;
    __device__ float operator()(float x, int64_t) const {
        const float s = gelu_scale, c = gelu_cube;
        const float t = tanhf(s * (x + c * x * x * x)), p = 1 - t * t;
        const float u1 = s * (1 + 3 * c * x * x), u2 = 6 * s * c * x, u3 = 6 * s * c;
        const float t1 = p * u1, p1 = -2 * t * t1, t2 = p1 * u1 + p * u2;
        const float p2 = -2 * (t1 * t1 + t * t2), t3 = p2 * u1 + 2 * p1 * u2 + p * u3;
        return order == 1   ? (1 + t + x * t1) / 2
               : order == 2 ? t1 + x * t2 / 2
                            : (3 * t2 + x * t3) / 2;
    }
};

// See src/backend/reference/dropout.cpp: every backend draws the same.
struct ToDropout {
    const int32_t *seed;
    uint32_t salt, below;
    float scale;
    __device__ float operator()(float x, int64_t i) const {
        const uint32_t first = mix(mix(uint32_t(seed[0])) + salt);
        const uint32_t second = mix(first ^ uint32_t(seed[1]));
        return mix(mix(uint32_t(i) ^ first) + second) < below ? 0.0f : x * scale;
    }
};

__global__ void split_kernel(const float *x, bf16 *y, int64_t packs, int64_t width, int64_t rows,
                             bool stacked, bool second, bool aligned) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= packs)
        return;
    Pack<float, 8> in;
    if (aligned)
        in = load<8>(x + 8 * i);
    else
        for (int j = 0; j < 8; ++j)
            in.v[j] = x[8 * i + j];
    Pack<bf16, 8> high, rest;
    for (int j = 0; j < 8; ++j) {
        high.set(j, in[j]);
        rest.set(j, in[j] - high[j]);
    }
    const int64_t row = 8 * i / width, column = 8 * i % width;
    bf16 *const to = y + (stacked ? 8 * i : 3 * row * width + column);
    const int64_t step = stacked ? rows * width : width;
    store<8>(to, high);
    store<8>(to + step, second ? rest : high);
    store<8>(to + 2 * step, second ? high : rest);
}

template <class Y> __global__ void fill_kernel(Y *y, int64_t n, const float *value, float by) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    wait_for_earlier();
    if (i < n)
        y[i] = from_float<Y>(value ? float(double(*value) / double(by)) : by);
}

} // namespace

void convert(const Run &run, const float *x, bf16 *y, int64_t count) {
    each(run, x, y, count, ToSame{});
}

void gelu(const Run &run, const bf16 *x, bf16 *y, int64_t count) {
    each(run, x, y, count, ToGelu{});
}
void gelu_vjp(const Run &run, const bf16 *dy, const bf16 *x, bf16 *dx, int64_t count) {
    both(run, dy, x, dx, count, ToGeluVjp{});
}

void split(const float *x, bf16 *y, int64_t rows, int64_t width, bool stacked, bool second,
           cudaStream_t stream) {
    const int64_t packs = rows * width / 8;
    split_kernel<<<blocks_for(packs, threads), threads, 0, stream>>>(x, y, packs, width, rows,
                                                                     stacked, second, aligned(x, 16));
}

int32_t plan_sigmoid(const Call &call) { return plan_each(call, ToSigmoid{}); }
int32_t plan_affine(const Call &call) {
    return plan_each(call, ToAffine{float(call.attr(0)), float(call.attr(1))});
}
int32_t plan_power(const Call &call) { return plan_each(call, ToPower{float(call.attr(0))}); }
int32_t plan_exp(const Call &call) { return plan_each(call, ToExp{}); }
int32_t plan_relu(const Call &call) { return plan_each(call, ToRelu{}); }
int32_t plan_step(const Call &call) { return plan_each(call, ToStep{}); }
int32_t plan_gelu(const Call &call) { return plan_each(call, ToGelu{}); }
int32_t plan_gelu_derivative(const Call &call) {
    return plan_each(call, ToGeluDerivative{int(call.attr(0))});
}

int32_t plan_reshape(const Call &call) {
    if (call.type(0) != call.type(1))
        return plan_each(call, ToSame{});
    const size_t bytes = size_t(call.count(0)) * size_of(call.type(0));
    return call.is(0, [=](const Run &run) {
        cudaMemcpyAsync(run.at(1), run.at(0), bytes, cudaMemcpyDeviceToDevice, run.stream);
    });
}

int32_t plan_gelu_vjp(const Call &call) {
    const int64_t n = call.count(0);
    return by_types(call.type(0), call.type(1), [&]<class DY, class X>(DY, X) {
        return by_type(call.type(2), [&]<class DX>(DX) {
            return call.is(0, [=](const Run &run) {
                both(run, run.at<const DY>(0), run.at<const X>(1), run.at<DX>(2), n, ToGeluVjp{});
            });
        });
    });
}

int32_t plan_dropout(const Call &call) {
    const double probability = call.attr(0);
    const int64_t n = call.count(0);
    const ToDropout prototype{
        nullptr, uint32_t(int64_t(call.attr(1))),
        uint32_t(probability * 4294967296.0 < 4294967295.0 ? probability * 4294967296.0
                                                           : 4294967295.0),
        float(1 / (1 - probability))};
    return by_types(call.type(0), call.type(2), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            ToDropout f = prototype;
            f.seed = run.at<const int32_t>(1);
            each(run, run.at<const X>(0), run.at<Y>(2), n, f);
        });
    });
}

int32_t plan_fill(const Call &call) {
    const int64_t n = call.count(0);
    const float value = float(call.attr(0));
    return by_type(call.type(0), [&]<class Y>(Y) {
        return call.is(0, [=](const Run &run) {
            launch(run, fill_kernel<Y>, blocks_for(n, threads), threads, 0, run.at<Y>(0), n,
                   nullptr, value);
        });
    });
}

// dx = dy / count
int32_t plan_mean_vjp(const Call &call) {
    const int64_t n = call.count(1);
    const float count = float(call.attr(0));
    return call.is(0, [=](const Run &run) {
        launch(run, fill_kernel<float>, blocks_for(n, threads), threads, 0, run.at<float>(1), n,
               run.at<const float>(0), count);
    });
}

} // namespace ponder::cuda
