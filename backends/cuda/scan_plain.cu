// ttt_linear and ttt_mlp on the plain scans.
#include "scan_plain.cuh"
#include "ops.hpp"
#include "scan.hpp"

namespace ponder::cuda {
namespace plain {
namespace {

// loss[s] = the mean over heads and mini-batches of what each head summed
__global__ void mean_losses(const float *sums, float *loss, int64_t heads, float count) {
    const int64_t s = blockIdx.x, i = threadIdx.x;
    float sum = 0;
    for (int64_t h = 0; h < heads; ++h)
        sum += sums[(s * heads + h) * 3 + i];
    loss[s * 3 + i] = sum / count;
}

struct Shape {
    int64_t tokens, width, heads, d, m;
    bool by_key;
    float scale;
    double decay;
    float eps, max_norm;
    int64_t causal_k;
    int64_t batches() const { return (tokens + m - 1) / m; }
};

__host__ __device__ inline int64_t linear_scratch(int64_t m, int64_t d) {
    return 5 * m * d + m * m + 2 * m + 2 * d;
}

template <class T, class R>
__global__ void linear_kernel(Shape p, const T *q_all, const T *k_all, const T *v_all,
                              const R *lr_all, const float *index, const float *g_all,
                              const float *b_all, const float *w1, const float *b1, T *y,
                              float *w_out, float *b_out, float *sums, float *scratch) {
    __shared__ float cell[33];
    const int64_t d = p.d, m = p.m, head = blockIdx.x, s = head / p.heads, h = head % p.heads;
    float *q = scratch + head * linear_scratch(m, d), *k = q + m * d, *target = k + m * d,
          *z = target + m * d, *gz = z + m * d, *attend = gz + m * d, *token = attend + m * m,
          *lr = token + m, *row = lr + m;
    const float *const w0 = w1 + head * d * d, *const b0 = b1 + head * d;
    float *const w = w_out + head * d * d, *const b = b_out + head * d;
    const Norm norm{g_all + h * d, b_all + h * d, d, p.eps};
    token_rates(m, index, p.decay, token);
    each(d * d, [&](int64_t i) { w[i] = w0[i]; });
    each(d, [&](int64_t i) { b[i] = b0[i]; });
    float initial = 0, before = 0, after = 0;
    for (int64_t first = 0; first < p.tokens; first += m) {
        const int64_t n = min(m, p.tokens - first), last = (n - 1) * d;
        const int64_t at = (s * p.tokens + first) * p.width + h * d;
        gather(n, d, q_all + at, p.width, q);
        gather(n, d, k_all + at, p.width, k);
        gather(n, d, v_all + at, p.width, target);
        each(n * d, [&](int64_t i) { target[i] -= k[i]; });
        gather(n, 1, lr_all + (s * p.tokens + first) * p.heads + h, p.heads, lr);
        const Rates eta{token, lr, p.scale, p.by_key};
        affine(n, d, d, k, w, b, z);
        before += norm.error(z + last, target + last);
        rows(n, [&](int64_t i) { norm.loss_gradient(z + i * d, target + i * d, gz + i * d); });
        if (p.max_norm > 0) {
            const float factor = fminf(1.0f, p.max_norm / (length(n * d, gz, cell) + 1e-6f));
            each(n * d, [&](int64_t i) { gz[i] *= factor; });
        }
        dual_form(n, d, d, q, k, gz, eta, p.causal_k, w, b, attend, z);
        rows(n, [&](int64_t i) {
            float mean, inverse;
            norm.moments(z + i * d, mean, inverse);
            lanes(d, [&](int64_t j) {
                y[at + i * p.width + j] =
                    from_float<T>(q[i * d + j] + norm.g[j] * ((z[i * d + j] - mean) * inverse) +
                                  norm.b[j]);
            });
        });
        take_step(n, d, d, k, gz, eta, w, b, w, b);
        affine(1, d, d, k + last, w0, b0, row);
        initial += norm.error(row, target + last);
        __syncthreads();
        affine(1, d, d, k + last, w, b, row);
        after += norm.error(row, target + last);
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        sums[head * 3] = initial;
        sums[head * 3 + 1] = before;
        sums[head * 3 + 2] = after;
    }
}

__host__ __device__ inline int64_t mlp_scratch(int64_t m, int64_t d) {
    return 5 * m * d + 4 * m * 4 * d + m * m + 2 * m + 5 * d;
}

template <class T, class R>
__global__ void mlp_kernel(Shape p, const T *q_all, const T *k_all, const T *v_all,
                           const R *lr_all, const float *index, const float *g_all,
                           const float *b_all, const float *w1_all, const float *b1_all,
                           const float *w2_all, const float *b2_all, T *y, float *w1_out,
                           float *b1_out, float *w2_out, float *b2_out, float *sums,
                           float *scratch) {
    const int64_t d = p.d, f = 4 * d, m = p.m, head = blockIdx.x, s = head / p.heads,
                  h = head % p.heads;
    float *q = scratch + head * mlp_scratch(m, d), *k = q + m * d, *target = k + m * d,
          *z2 = target + m * d, *g2 = z2 + m * d, *z1 = g2 + m * d, *x2 = z1 + m * f,
          *g1 = x2 + m * f, *hidden = g1 + m * f, *attend = hidden + m * f,
          *token = attend + m * m, *lr = token + m, *row = lr + m; // row: [f + d]
    const float *const w1_first = w1_all + head * d * f, *const b1_first = b1_all + head * f,
                       *const w2_first = w2_all + head * f * d, *const b2_first = b2_all + head * d;
    float *const w1 = w1_out + head * d * f, *const b1 = b1_out + head * f,
                 *const w2 = w2_out + head * f * d, *const b2 = b2_out + head * d;
    const Norm norm{g_all + h * d, b_all + h * d, d, p.eps};
    token_rates(m, index, 0.0, token);
    each(d * f, [&](int64_t i) {
        w1[i] = w1_first[i];
        w2[i] = w2_first[i];
    });
    each(f, [&](int64_t i) { b1[i] = b1_first[i]; });
    each(d, [&](int64_t i) { b2[i] = b2_first[i]; });
    const auto error = [&](const float *key, const float *goal, const float *w1, const float *b1,
                           const float *w2, const float *b2) {
        affine(1, d, f, key, w1, b1, row);
        each(f, [&](int64_t i) { row[i] = gelu_of(row[i]); });
        affine(1, f, d, row, w2, b2, row + f);
        const float e = norm.error(row + f, goal);
        __syncthreads();
        return e;
    };
    float initial = 0, before = 0, after = 0;
    for (int64_t first = 0; first < p.tokens; first += m) {
        const int64_t n = min(m, p.tokens - first), last = (n - 1) * d;
        const int64_t at = (s * p.tokens + first) * p.width + h * d;
        gather(n, d, q_all + at, p.width, q);
        gather(n, d, k_all + at, p.width, k);
        gather(n, d, v_all + at, p.width, target);
        each(n * d, [&](int64_t i) { target[i] -= k[i]; });
        gather(n, 1, lr_all + (s * p.tokens + first) * p.heads + h, p.heads, lr);
        const Rates eta{token, lr, p.scale, false};
        affine(n, d, f, k, w1, b1, z1);
        each(n * f, [&](int64_t i) { x2[i] = gelu_of(z1[i]); });
        affine(n, f, d, x2, w2, b2, z2);
        before += norm.error(z2 + last, target + last);
        rows(n, [&](int64_t i) { norm.loss_gradient(z2 + i * d, target + i * d, g2 + i * d); });
        times_transposed(n, f, d, g2, w2, g1, false);
        each(n * f, [&](int64_t i) { g1[i] *= gelu_slope(z1[i]); });
        dual_form(n, d, f, q, k, g1, eta, 0, w1, b1, attend, hidden);
        each(n * f, [&](int64_t i) { hidden[i] = gelu_of(hidden[i]); });
        dual_form(n, f, d, hidden, x2, g2, eta, 0, w2, b2, attend, z2);
        rows(n, [&](int64_t i) {
            float mean, inverse;
            norm.moments(z2 + i * d, mean, inverse);
            lanes(d, [&](int64_t j) {
                y[at + i * p.width + j] =
                    from_float<T>(q[i * d + j] + norm.g[j] * ((z2[i * d + j] - mean) * inverse) +
                                  norm.b[j]);
            });
        });
        take_step(n, d, f, k, g1, eta, w1, b1, w1, b1);
        take_step(n, f, d, x2, g2, eta, w2, b2, w2, b2);
        initial += error(k + last, target + last, w1_first, b1_first, w2_first, b2_first);
        after += error(k + last, target + last, w1, b1, w2, b2);
    }
    if (threadIdx.x == 0) {
        sums[head * 3] = initial;
        sums[head * 3 + 1] = before;
        sums[head * 3 + 2] = after;
    }
}

} // namespace
} // namespace plain

int32_t plan_plain_ttt_linear(const Call &call) {
    const int64_t streams = call.dim(0, 0);
    const plain::Shape p{call.dim(0, 1),
                         call.dim(0, 2),
                         call.dim(5, 0),
                         call.dim(5, 1),
                         call.dim(4, 0),
                         call.attr(0) == 1,
                         float(call.attr(1)),
                         call.attr(2),
                         float(call.attr(3)),
                         float(call.attr(4)),
                         int64_t(call.attr(5))};
    if (!types_fit(call, {1, 2, 9}, {4, 5, 6}))
        return PONDER_PLAN_NONE;
    const int64_t blocks = streams * p.heads;
    const size_t sums = (size_t(blocks * 3) * sizeof(float) + 255) / 256 * 256;
    return by_types(call.type(0), call.type(3), [&]<class T, class R>(T, R) {
        return call.is(
            sums + size_t(blocks * plain::linear_scratch(p.m, p.d)) * sizeof(float),
            [=](const Run &run) {
                float *const sum = reinterpret_cast<float *>(run.workspace);
                plain::linear_kernel<<<unsigned(blocks), plain::threads, 0, run.stream>>>(
                    p, run.at<const T>(0), run.at<const T>(1), run.at<const T>(2),
                    run.at<const R>(3), run.at<const float>(4), run.at<const float>(5),
                    run.at<const float>(6), run.at<const float>(7), run.at<const float>(8),
                    run.at<T>(9), run.at<float>(10), run.at<float>(11), sum,
                    reinterpret_cast<float *>(run.workspace + sums));
                plain::mean_losses<<<unsigned(streams), 3, 0, run.stream>>>(
                    sum, run.at<float>(12), p.heads, float(p.heads * p.batches()));
            });
    });
}

int32_t plan_plain_ttt_mlp(const Call &call) {
    const int64_t streams = call.dim(0, 0);
    const plain::Shape p{call.dim(0, 1), call.dim(0, 2), call.dim(5, 0),       call.dim(5, 1),
                         call.dim(4, 0), false,          float(call.attr(0)), 0,
                         float(call.attr(1)), 0,         0};
    if (!types_fit(call, {1, 2, 11}, {4, 5, 6}))
        return PONDER_PLAN_NONE;
    const int64_t blocks = streams * p.heads;
    const size_t sums = (size_t(blocks * 3) * sizeof(float) + 255) / 256 * 256;
    return by_types(call.type(0), call.type(3), [&]<class T, class R>(T, R) {
        return call.is(
            sums + size_t(blocks * plain::mlp_scratch(p.m, p.d)) * sizeof(float),
            [=](const Run &run) {
                float *const sum = reinterpret_cast<float *>(run.workspace);
                plain::mlp_kernel<<<unsigned(blocks), plain::threads, 0, run.stream>>>(
                    p, run.at<const T>(0), run.at<const T>(1), run.at<const T>(2),
                    run.at<const R>(3), run.at<const float>(4), run.at<const float>(5),
                    run.at<const float>(6), run.at<const float>(7), run.at<const float>(8),
                    run.at<const float>(9), run.at<const float>(10), run.at<T>(11),
                    run.at<float>(12), run.at<float>(13), run.at<float>(14), run.at<float>(15),
                    sum, reinterpret_cast<float *>(run.workspace + sums));
                plain::mean_losses<<<unsigned(streams), 3, 0, run.stream>>>(
                    sum, run.at<float>(16), p.heads, float(p.heads * p.batches()));
            });
    });
}

} // namespace ponder::cuda
