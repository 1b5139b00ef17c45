// Plain TTT scans: a block for each head of each stream, everything in global memory. They take any
// shape, serve where the fused scans have no kernel, and check those. The equations and names are
// those of src/backend/reference/ttt.hpp.
#pragma once

#include "scan.hpp"

namespace ponder::cuda::plain {

constexpr int threads = 256;

// What shapes of all scans have.
struct Shape {
    int64_t streams, tokens, width, heads, d, m, batches;
    explicit Shape(const Call &call)
        : streams(call.dim(0, 0)), tokens(call.dim(0, 1)), width(call.dim(0, 2)),
          heads(call.dim(5, 0)), d(call.dim(5, 1)), m(call.dim(4, 0)),
          batches((tokens + m - 1) / m) {}
    int64_t blocks() const { return streams * heads; }
};
struct LinearShape : Shape {
    bool by_key;
    float scale;
    double decay;
    float eps, max_norm;
    int64_t causal_k;
    explicit LinearShape(const Call &call)
        : Shape(call), by_key(call.attr(0) == 1), scale(float(call.attr(1))), decay(call.attr(2)),
          eps(float(call.attr(3))), max_norm(float(call.attr(4))), causal_k(int64_t(call.attr(5))) {
    }
};
struct MlpShape : Shape {
    float scale, eps;
    explicit MlpShape(const Call &call)
        : Shape(call), scale(float(call.attr(0))), eps(float(call.attr(1))) {}
    __host__ __device__ int64_t inner() const { return 4 * d; }
};

// The rows of one head in mini-batch i: how many, and where they begin in [S,T,C] and in [S,T,H].
struct Batch {
    int64_t n, at, lr_at;
    __device__ Batch(const Shape &p, int64_t i) {
        const int64_t s = blockIdx.x / p.heads, h = blockIdx.x % p.heads, first = i * p.m;
        n = min(p.m, p.tokens - first);
        at = (s * p.tokens + first) * p.width + h * p.d;
        lr_at = (s * p.tokens + first) * p.heads + h;
    }
};

// f(i) for i < n, on all threads of the block; then everybody sees it.
template <class F> __device__ inline void each(int64_t n, F f) {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < n; i += threads)
        f(i);
    __syncthreads();
}
// f(row) for each row, on whole warps.
template <class F> __device__ inline void rows(int64_t n, F f) {
#pragma unroll 1
    for (int64_t i = threadIdx.x / 32; i < n; i += threads / 32)
        f(i);
    __syncthreads();
}
// f(j) for j < d on the lanes of a warp
template <class F> __device__ inline void lanes(int64_t d, F f) {
#pragma unroll 1
    for (int64_t j = threadIdx.x % 32; j < d; j += 32)
        f(j);
}
template <class F> __device__ inline float lane_sum(int64_t d, F f) {
    float sum = 0;
#pragma unroll 1
    for (int64_t j = threadIdx.x % 32; j < d; j += 32)
        sum += f(j);
    return warp_sum(sum);
}

template <class T>
__device__ inline void gather(int64_t n, int64_t d, const T *from, int64_t stride, float *to) {
    each(n * d, [&](int64_t i) { to[i] = to_float(from[i / d * stride + i % d]); });
}

// The inputs that all scans begin with.
template <class T, class R> struct Inputs {
    const T *q, *k, *v;
    const R *lr;
    const float *index, *g, *b;
    explicit Inputs(const Run &run)
        : q(run.at<const T>(0)), k(run.at<const T>(1)), v(run.at<const T>(2)),
          lr(run.at<const R>(3)), index(run.at<const float>(4)), g(run.at<const float>(5)),
          b(run.at<const float>(6)) {}
    // The rows of a mini-batch; the target is v - k.
    __device__ void read(const Shape &p, const Batch &batch, float *q_rows, float *k_rows,
                         float *target, float *rates) const {
        gather(batch.n, p.d, q + batch.at, p.width, q_rows);
        gather(batch.n, p.d, k + batch.at, p.width, k_rows);
        gather(batch.n, p.d, v + batch.at, p.width, target);
        each(batch.n * p.d, [&](int64_t i) { target[i] -= k_rows[i]; });
        gather(batch.n, 1, lr + batch.lr_at, p.heads, rates);
    }
};

// z[n,out] = x W + b
__device__ __noinline__ static void affine(int64_t n, int64_t in, int64_t out, const float *x,
                                           const float *w, const float *b, float *z) {
    each(n * out, [&](int64_t i) {
        const int64_t row = i / out, c = i % out;
        float sum = b[c];
#pragma unroll 1
        for (int64_t j = 0; j < in; ++j)
            sum += x[row * in + j] * w[j * out + c];
        z[i] = sum;
    });
}
// z[n,in] (+)= x[n,out] W[in,out]^T
__device__ __noinline__ static void times_transposed(int64_t n, int64_t in, int64_t out,
                                                     const float *x, const float *w, float *z,
                                                     bool add) {
    each(n * in, [&](int64_t i) {
        const int64_t row = i / in, c = i % in;
        float sum = add ? z[i] : 0.0f;
#pragma unroll 1
        for (int64_t j = 0; j < out; ++j)
            sum += x[row * out + j] * w[c * out + j];
        z[i] = sum;
    });
}
// w[in,out] += x[n,in]^T y[n,out], b += the sum of y
__device__ __noinline__ static void add_outer(int64_t n, int64_t in, int64_t out, const float *x,
                                              const float *y, float *w, float *b) {
    each(in * out, [&](int64_t i) {
        const int64_t row = i / out, c = i % out;
        float sum = w[i];
        for (int64_t t = 0; t < n; ++t)
            sum += x[t * in + row] * y[t * out + c];
        w[i] = sum;
    });
    each(out, [&](int64_t c) {
        float sum = b[c];
        for (int64_t t = 0; t < n; ++t)
            sum += y[t * out + c];
        b[c] = sum;
    });
}

struct Norm {
    const float *g, *b;
    int64_t d;
    float eps;
    // Of one row, on a warp.
    __device__ void moments(const float *z, float &mean, float &inverse) const {
        mean = lane_sum(d, [&](int64_t j) { return z[j]; }) / float(d);
        const float m = mean;
        inverse =
            1 /
            sqrtf(lane_sum(d, [&](int64_t j) { return (z[j] - m) * (z[j] - m); }) / float(d) + eps);
    }
    // mean (LN(z) - target)^2
    __device__ float error(const float *z, const float *target) const {
        float mean, inverse;
        moments(z, mean, inverse);
        return lane_sum(d,
                        [&](int64_t j) {
                            const float r = g[j] * ((z[j] - mean) * inverse) + b[j] - target[j];
                            return r * r;
                        }) /
               float(d);
    }
    // dz = (u - mean(u) - h mean(u h)) / std, u = g (LN(z) - target); dz may not be z
    __device__ void loss_gradient(const float *z, const float *target, float *dz) const {
        float mean, inverse;
        moments(z, mean, inverse);
        float sum_u = 0, sum_uh = 0;
        lanes(d, [&](int64_t j) {
            const float h = (z[j] - mean) * inverse, u = g[j] * (g[j] * h + b[j] - target[j]);
            dz[j] = u;
            sum_u += u;
            sum_uh += u * h;
        });
        const float mean_u = warp_sum(sum_u) / float(d), mean_uh = warp_sum(sum_uh) / float(d);
        lanes(d, [&](int64_t j) {
            const float h = (z[j] - mean) * inverse;
            dz[j] = (dz[j] - mean_u - h * mean_uh) * inverse;
        });
    }
};

// token_i = max(0, 1/(i+1) + index_i) exp(decay (i - (M-1)))
__device__ inline void token_rates(int64_t m, const float *index, double decay, float *token) {
    each(m, [&](int64_t i) {
        token[i] =
            fmaxf(0.0f, 1 / float(i + 1) + index[i]) * float(exp(decay * double(i - (m - 1))));
    });
}

struct Rates {
    const float *token, *lr; // [M], [n]
    float scale;
    bool by_key;
    __device__ float operator()(int64_t i, int64_t j) const {
        return scale * token[by_key ? j : i] * lr[j];
    }
};

// z_i = q_i W + b - sum_{j <= i + causal_k} eta[i,j] (q_i x_j + 1) g_j; attend: [n,n] scratch
__device__ __noinline__ static void dual_form(int64_t n, int64_t in, int64_t out, const float *q,
                                              const float *x, const float *g, const Rates &eta,
                                              int64_t causal_k, const float *w, const float *b,
                                              float *attend, float *z) {
    rows(n * n, [&](int64_t i) {
        const int64_t row = i / n, j = i % n;
        const float dot = lane_sum(in, [&](int64_t c) { return q[row * in + c] * x[j * in + c]; });
        attend[i] = j <= row + causal_k ? eta(row, j) * (dot + 1) : 0.0f;
    });
    affine(n, in, out, q, w, b, z);
    each(n * out, [&](int64_t i) {
        const int64_t row = i / out, c = i % out;
        float sum = z[i];
#pragma unroll 1
        for (int64_t j = 0; j <= row + causal_k; ++j)
            sum -= attend[row * n + j] * g[j * out + c];
        z[i] = sum;
    });
}

// W -= (eta x)^T g, b -= eta^T g for the last row of eta
__device__ __noinline__ static void take_step(int64_t n, int64_t in, int64_t out, const float *x,
                                              const float *g, const Rates &eta, const float *w,
                                              const float *b, float *w2, float *b2) {
    each(in * out, [&](int64_t i) {
        const int64_t row = i / out, c = i % out;
        float sum = w[i];
#pragma unroll 1
        for (int64_t j = 0; j < n; ++j)
            sum -= eta(n - 1, j) * x[j * in + row] * g[j * out + c];
        w2[i] = sum;
    });
    each(out, [&](int64_t c) {
        float sum = b[c];
#pragma unroll 1
        for (int64_t j = 0; j < n; ++j)
            sum -= eta(n - 1, j) * g[j * out + c];
        b2[c] = sum;
    });
}

constexpr float gelu_scale = 0.79788456080286535588f, gelu_cube = 0.044715f;
__device__ inline float gelu_of(float x) {
    return 0.5f * x * (1 + tanhf(gelu_scale * (x + gelu_cube * x * x * x)));
}
__device__ inline float gelu_slope(float x) {
    const float t = tanhf(gelu_scale * (x + gelu_cube * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * gelu_scale * (1 + 3 * gelu_cube * x * x);
}

// Length of all n d values; the block's.
__device__ inline float length(int64_t n, const float *x, float *cell) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += threads)
        sum += x[i] * x[i];
    return sqrtf(block_sum(sum, cell));
}

// Plans a scan: `queue` is given its inputs and, in the workspace, `kept` and `scratch` floats a
// head.
template <class Queue>
int32_t plan_scan(const Call &call, const Shape &p, int64_t kept, int64_t scratch, Queue queue) {
    const size_t kept_bytes = (size_t(p.blocks() * kept) * sizeof(float) + 255) / 256 * 256;
    const size_t bytes = kept_bytes + size_t(p.blocks() * scratch) * sizeof(float);
    return by_types(call.type(0), call.type(3), [&]<class T, class R>(T, R) {
        return call.is(bytes, [=](const Run &run) {
            queue(run, Inputs<T, R>(run), reinterpret_cast<float *>(run.workspace),
                  reinterpret_cast<float *>(run.workspace + kept_bytes));
        });
    });
}

} // namespace ponder::cuda::plain
