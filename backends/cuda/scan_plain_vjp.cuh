// What the plain scans' gradients share: the norm, the step, the dual form and the rates backwards,
// and where a head's gradients go.
#pragma once

#include "scan_plain.cuh"

namespace ponder::cuda::plain {

// A row of LN backwards, on a warp. What belongs to g and b is added to rows of its own, which one
// thread a column sums in the end.
struct Back {
    Norm norm;
    float *gain_rows, *shift_rows; // [n,d]
    // Of row i, which the other pointers point to: dz += (d LN / dz)^T dy
    __device__ void output(int64_t i, const float *z, const float *dy, float *dz) const {
        float *const dg = gain_rows + i * norm.d, *const db = shift_rows + i * norm.d;
        float mean, inverse;
        norm.moments(z, mean, inverse);
        float sum_u = 0, sum_uh = 0;
        lanes(norm.d, [&](int64_t j) {
            const float h = (z[j] - mean) * inverse, u = norm.g[j] * dy[j];
            dg[j] += dy[j] * h;
            db[j] += dy[j];
            sum_u += u;
            sum_uh += u * h;
        });
        const float mean_u = warp_sum(sum_u) / float(norm.d),
                    mean_uh = warp_sum(sum_uh) / float(norm.d);
        lanes(norm.d, [&](int64_t j) {
            const float h = (z[j] - mean) * inverse;
            dz[j] += (norm.g[j] * dy[j] - mean_u - h * mean_uh) * inverse;
        });
    }
    // Of weight mean((LN(z) - target)^2); dy is scratch.
    __device__ void error(int64_t i, const float *z, const float *target, float weight, float *dy,
                          float *dz, float *dtarget) const {
        float mean, inverse;
        norm.moments(z, mean, inverse);
        lanes(norm.d, [&](int64_t j) {
            const float y = norm.g[j] * ((z[j] - mean) * inverse) + norm.b[j];
            dy[j] = 2 * weight / float(norm.d) * (y - target[j]);
            dtarget[j] -= dy[j];
        });
        __syncwarp();
        output(i, z, dy, dz);
    }
    // Of the gradient of 0.5 |LN(z) - target|^2 in z; see NormGradient::loss_gradient.
    __device__ void loss_gradient(int64_t i, const float *z, const float *target, const float *dp,
                                  float *dz, float *dtarget) const {
        const int64_t d = norm.d;
        float *const dg = gain_rows + i * d, *const db = shift_rows + i * d;
        const float *g = norm.g, *b = norm.b;
        float mean, r;
        norm.moments(z, mean, r);
        float sums[4] = {};
        lanes(d, [&](int64_t j) {
            const float h = (z[j] - mean) * r, u = g[j] * (g[j] * h + b[j] - target[j]);
            const float e = r * dp[j];
            sums[0] += u;
            sums[1] += u * h;
            sums[2] += e;
            sums[3] += e * h;
        });
        const float mean_u = warp_sum(sums[0]) / float(d), mean_uh = warp_sum(sums[1]) / float(d),
                    mean_e = warp_sum(sums[2]) / float(d), mean_eh = warp_sum(sums[3]) / float(d);
        float dr = 0, sum_dh = 0, sum_dhh = 0;
        const auto dh_of = [&](int64_t j, float h, float u, float du) {
            return -r * dp[j] * mean_uh - u * mean_eh + g[j] * g[j] * du;
        };
        lanes(d, [&](int64_t j) {
            const float h = (z[j] - mean) * r, residual = g[j] * h + b[j] - target[j];
            const float u = g[j] * residual, du = r * dp[j] - mean_e - h * mean_eh;
            dr += dp[j] * (u - mean_u - h * mean_uh);
            dg[j] += du * (residual + g[j] * h);
            db[j] += du * g[j];
            const float dh = dh_of(j, h, u, du);
            sum_dh += dh;
            sum_dhh += dh * h;
        });
        const float mean_dh = warp_sum(sum_dh) / float(d),
                    mean_dhh = (warp_sum(sum_dhh) + warp_sum(dr) * r) / float(d);
        lanes(d, [&](int64_t j) {
            const float h = (z[j] - mean) * r, u = g[j] * (g[j] * h + b[j] - target[j]);
            const float du = r * dp[j] - mean_e - h * mean_eh;
            dtarget[j] -= du * g[j];
            dz[j] += r * (dh_of(j, h, u, du) - mean_dh - h * mean_dhh);
        });
    }
    // Adds up what n rows left.
    __device__ void sum_rows(int64_t n, float *gain, float *shift) const {
        const int64_t d = norm.d;
        each(d, [&](int64_t c) {
            for (int64_t j = 0; j < n; ++j) {
                gain[c] += gain_rows[j * d + c];
                shift[c] += shift_rows[j * d + c];
            }
        });
    }
};

// take_step backwards. xw [n,out] and gw [n,in] are scratch.
__device__ __noinline__ static void step_vjp(int64_t n, int64_t in, int64_t out, const float *x,
                                             const float *g, const Rates &eta, const float *dw,
                                             const float *db, float *xw, float *gw, float *dx,
                                             float *dg, float *deta) {
    affine(n, in, out, x, dw, db, xw);
    times_transposed(n, in, out, g, dw, gw, false);
    rows(n, [&](int64_t j) {
        const float dot =
            lane_sum(out, [&](int64_t c) { return xw[j * out + c] * g[j * out + c]; });
        if (threadIdx.x % 32 == 0)
            deta[(n - 1) * n + j] -= dot;
    });
    each(n * out, [&](int64_t i) { dg[i] -= eta(n - 1, i / out) * xw[i]; });
    each(n * in, [&](int64_t i) { dx[i] -= eta(n - 1, i / in) * gw[i]; });
}

// dual_form backwards. am and pm [n,n] are scratch.
__device__ __noinline__ static void dual_vjp(int64_t n, int64_t in, int64_t out, const float *q,
                                             const float *x, const float *g, const Rates &eta,
                                             int64_t causal_k, const float *w, const float *du,
                                             float *am, float *pm, float *dq, float *dx, float *dg,
                                             float *deta, float *dw, float *db) {
    rows(n * n, [&](int64_t i) {
        const int64_t row = i / n, j = i % n;
        const float a =
            lane_sum(in, [&](int64_t c) { return q[row * in + c] * x[j * in + c]; }) + 1;
        const float b =
            lane_sum(out, [&](int64_t c) { return du[row * out + c] * g[j * out + c]; });
        if (threadIdx.x % 32 == 0) {
            const bool seen = j <= row + causal_k;
            am[i] = seen ? eta(row, j) * a : 0.0f;
            pm[i] = seen ? eta(row, j) * b : 0.0f;
            if (seen)
                deta[i] -= a * b;
        }
    });
    each(n * in, [&](int64_t i) {
        const int64_t row = i / in, c = i % in;
        float to_q = 0, to_x = 0;
        for (int64_t j = 0; j < n; ++j) {
            to_q += pm[row * n + j] * x[j * in + c];
            to_x += pm[j * n + row] * q[j * in + c];
        }
        dq[i] -= to_q;
        dx[i] -= to_x;
    });
    each(n * out, [&](int64_t i) {
        const int64_t row = i / out, c = i % out;
        float to_g = 0;
        for (int64_t j = 0; j < n; ++j)
            to_g += am[j * n + row] * du[j * out + c];
        dg[i] -= to_g;
    });
    add_outer(n, in, out, q, du, dw, db);
    times_transposed(n, in, out, du, w, dq, true);
}

// Rates backwards: dlr of each key, and what is added to the gradients of token_rates' results.
template <class R>
__device__ inline void rates_vjp(int64_t n, const Rates &eta, const float *deta, int64_t stride,
                                 R *dlr, float *dtoken) {
    each(n, [&](int64_t i) {
        float to_lr = 0, to_token = 0;
        for (int64_t j = 0; j < n; ++j) {
            to_lr += eta.scale * deta[j * n + i] * eta.token[eta.by_key ? i : j];
            to_token +=
                eta.scale * deta[eta.by_key ? j * n + i : i * n + j] * eta.lr[eta.by_key ? i : j];
        }
        dlr[i * stride] = from_float<R>(to_lr);
        dtoken[i] += to_token;
    });
}
// token_rates backwards, in place
__device__ inline void token_rates_vjp(int64_t m, const float *index, double decay, float *dtoken) {
    each(m, [&](int64_t i) {
        dtoken[i] = 1 / float(i + 1) + index[i] > 0
                        ? dtoken[i] * float(exp(decay * double(i - (m - 1))))
                        : 0.0f;
    });
}

// The outputs that all gradients begin with.
template <class T, class R> struct Gradients {
    T *q, *k, *v;
    R *lr;
    Gradients(const Run &run, size_t out)
        : q(run.at<T>(out)), k(run.at<T>(out + 1)), v(run.at<T>(out + 2)), lr(run.at<R>(out + 3)) {}
    // The rows of a mini-batch.
    __device__ void write(const Shape &p, const Batch &batch, const float *dq, const float *dk,
                          const float *dtarget) const {
        each(batch.n * p.d, [&](int64_t i) {
            const int64_t to = batch.at + i / p.d * p.width + i % p.d;
            q[to] = from_float<T>(dq[i]);
            k[to] = from_float<T>(dk[i] - dtarget[i]);
            v[to] = from_float<T>(dtarget[i]);
        });
    }
};

// Of each head, gradients of g, b and the token rates.
__host__ __device__ inline int64_t partial_floats(const Shape &p) { return 2 * p.d + p.m; }
// Their sums over streams, into outputs dindex, dg and db, which are `out` + 4 to 6.
void queue_sums(const Run &run, size_t out, const float *partial, const Shape &p);

// Plans gradients whose dy is tensor `dy`; see plan_scan.
template <class Queue>
int32_t plan_vjp(const Call &call, const Shape &p, int64_t scratch, size_t dy, Queue queue) {
    const size_t out = call.out(0);
    if (!types_fit(call, {1, 2, dy, out, out + 1, out + 2}, {4, 5, 6}) ||
        call.type(out + 3) != call.type(3))
        return PONDER_PLAN_NONE;
    return plan_scan(
        call, p, partial_floats(p), scratch,
        [=]<class T, class R>(const Run &run, const Inputs<T, R> &x, float *partial, float *free) {
            queue(run, x, Gradients<T, R>(run, out), partial, free);
            queue_sums(run, out, partial, p);
        });
}

} // namespace ponder::cuda::plain
