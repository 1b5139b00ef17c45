// ttt_linear and ttt_mlp on the plain scans.
#include "scan_plain.cuh"

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

void queue_mean_losses(const Run &run, const Shape &p, const float *sums, float *loss) {
    mean_losses<<<unsigned(p.streams), 3, 0, run.stream>>>(sums, loss, p.heads,
                                                           float(p.heads * p.batches));
}

// y = q + LN(z)
template <class T>
__device__ inline void write_rows(const Shape &p, const Batch &batch, const Norm &norm,
                                  const float *q, const float *z, T *y) {
    rows(batch.n, [&](int64_t i) {
        float mean, inverse;
        norm.moments(z + i * p.d, mean, inverse);
        lanes(p.d, [&](int64_t j) {
            y[batch.at + i * p.width + j] = from_float<T>(
                q[i * p.d + j] + norm.g[j] * ((z[i * p.d + j] - mean) * inverse) + norm.b[j]);
        });
    });
}

__host__ __device__ inline int64_t linear_scratch(int64_t m, int64_t d) {
    return 5 * m * d + m * m + 2 * m + 2 * d;
}

template <class T, class R>
__global__ void linear_kernel(LinearShape p, Inputs<T, R> x, const float *w1, const float *b1, T *y,
                              float *w_out, float *b_out, float *sums, float *scratch) {
    __shared__ float cell[33];
    const int64_t d = p.d, m = p.m, head = blockIdx.x, h = head % p.heads;
    float *q = scratch + head * linear_scratch(m, d), *k = q + m * d, *target = k + m * d,
          *z = target + m * d, *gz = z + m * d, *attend = gz + m * d, *token = attend + m * m,
          *lr = token + m, *row = lr + m;
    const float *const w0 = w1 + head * d * d, *const b0 = b1 + head * d;
    float *const w = w_out + head * d * d, *const b = b_out + head * d;
    const Norm norm{x.g + h * d, x.b + h * d, d, p.eps};
    token_rates(m, x.index, p.decay, token);
    each(d * d, [&](int64_t i) { w[i] = w0[i]; });
    each(d, [&](int64_t i) { b[i] = b0[i]; });
    float initial = 0, before = 0, after = 0;
    for (int64_t i = 0; i < p.batches; ++i) {
        const Batch batch(p, i);
        const int64_t n = batch.n, last = (n - 1) * d;
        x.read(p, batch, q, k, target, lr);
        const Rates eta{token, lr, p.scale, p.by_key};
        affine(n, d, d, k, w, b, z);
        before += norm.error(z + last, target + last);
        rows(n, [&](int64_t i) { norm.loss_gradient(z + i * d, target + i * d, gz + i * d); });
        if (p.max_norm > 0) {
            const float factor = fminf(1.0f, p.max_norm / (length(n * d, gz, cell) + 1e-6f));
            each(n * d, [&](int64_t i) { gz[i] *= factor; });
        }
        dual_form(n, d, d, q, k, gz, eta, p.causal_k, w, b, attend, z);
        write_rows(p, batch, norm, q, z, y);
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
__global__ void mlp_kernel(MlpShape p, Inputs<T, R> x, const float *w1_all, const float *b1_all,
                           const float *w2_all, const float *b2_all, T *y, float *w1_out,
                           float *b1_out, float *w2_out, float *b2_out, float *sums,
                           float *scratch) {
    const int64_t d = p.d, f = p.inner(), m = p.m, head = blockIdx.x, h = head % p.heads;
    float *q = scratch + head * mlp_scratch(m, d), *k = q + m * d, *target = k + m * d,
          *z2 = target + m * d, *g2 = z2 + m * d, *z1 = g2 + m * d, *x2 = z1 + m * f,
          *g1 = x2 + m * f, *hidden = g1 + m * f, *attend = hidden + m * f, *token = attend + m * m,
          *lr = token + m, *row = lr + m; // row: [f + d]
    const float *const w1_first = w1_all + head * d * f, *const b1_first = b1_all + head * f,
                       *const w2_first = w2_all + head * f * d, *const b2_first = b2_all + head * d;
    float *const w1 = w1_out + head * d * f, *const b1 = b1_out + head * f,
                 *const w2 = w2_out + head * f * d, *const b2 = b2_out + head * d;
    const Norm norm{x.g + h * d, x.b + h * d, d, p.eps};
    token_rates(m, x.index, 0.0, token);
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
    for (int64_t i = 0; i < p.batches; ++i) {
        const Batch batch(p, i);
        const int64_t n = batch.n, last = (n - 1) * d;
        x.read(p, batch, q, k, target, lr);
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
        write_rows(p, batch, norm, q, z2, y);
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
    using namespace plain;
    const LinearShape p(call);
    if (!types_fit(call, {1, 2, 9}, {4, 5, 6}))
        return PONDER_PLAN_NONE;
    return plan_scan(
        call, p, 3, linear_scratch(p.m, p.d),
        [=]<class T, class R>(const Run &run, const Inputs<T, R> &x, float *sums, float *scratch) {
            linear_kernel<<<unsigned(p.blocks()), threads, 0, run.stream>>>(
                p, x, run.at<const float>(7), run.at<const float>(8), run.at<T>(9),
                run.at<float>(10), run.at<float>(11), sums, scratch);
            queue_mean_losses(run, p, sums, run.at<float>(12));
        });
}

int32_t plan_plain_ttt_mlp(const Call &call) {
    using namespace plain;
    const MlpShape p(call);
    if (!types_fit(call, {1, 2, 11}, {4, 5, 6}))
        return PONDER_PLAN_NONE;
    return plan_scan(
        call, p, 3, mlp_scratch(p.m, p.d),
        [=]<class T, class R>(const Run &run, const Inputs<T, R> &x, float *sums, float *scratch) {
            mlp_kernel<<<unsigned(p.blocks()), threads, 0, run.stream>>>(
                p, x, run.at<const float>(7), run.at<const float>(8), run.at<const float>(9),
                run.at<const float>(10), run.at<T>(11), run.at<float>(12), run.at<float>(13),
                run.at<float>(14), run.at<float>(15), sums, scratch);
            queue_mean_losses(run, p, sums, run.at<float>(16));
        });
}

} // namespace ponder::cuda
