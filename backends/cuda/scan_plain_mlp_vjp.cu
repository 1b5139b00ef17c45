// ttt_mlp_vjp on the plain scans. The equations and names are those of
// src/backend/reference/ttt_mlp_vjp.cpp. The state is kept before every few mini-batches, about the
// root of their number, and those between are computed again when their turn comes.
#include "scan.hpp"
#include "scan_plain_vjp.cuh"

#include <cmath>

namespace ponder::cuda {
namespace plain {
namespace {

struct Shape {
    int64_t tokens, width, heads, d, m, batches, segment; // segment: in mini-batches
    float scale, eps;
    __host__ __device__ int64_t inner() const { return 4 * d; }
    __host__ __device__ int64_t state() const { return 2 * d * inner() + inner() + d; }
    __host__ __device__ int64_t segments() const { return (batches + segment - 1) / segment; }
};

struct State {
    float *w1, *b1, *w2, *b2;
};
__device__ inline State state_at(const Shape &p, float *at) {
    State s;
    s.w1 = at;
    s.b1 = s.w1 + p.d * p.inner();
    s.w2 = s.b1 + p.inner();
    s.b2 = s.w2 + p.inner() * p.d;
    return s;
}

// Floats that a block works in.
__host__ __device__ inline int64_t scratch_of(const Shape &p) {
    return p.m * (16 * p.d + 11 * p.inner() + 4 * p.m + 3) + 3 * p.inner() + 6 * p.d +
           (p.segments() + p.segment + 2) * p.state();
}

__device__ inline float gelu_curve(float x) {
    const float t = tanhf(gelu_scale * (x + gelu_cube * x * x * x)), p = 1 - t * t;
    const float u1 = gelu_scale * (1 + 3 * gelu_cube * x * x), u2 = 6 * gelu_scale * gelu_cube * x;
    return p * u1 + 0.5f * x * (p * u2 - 2 * t * p * u1 * u1);
}

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
                                             const float *w, const float *du, float *am, float *pm,
                                             float *dq, float *dx, float *dg, float *deta,
                                             float *dw, float *db) {
    rows(n * n, [&](int64_t i) {
        const int64_t row = i / n, j = i % n;
        const float a =
            lane_sum(in, [&](int64_t c) { return q[row * in + c] * x[j * in + c]; }) + 1;
        const float b =
            lane_sum(out, [&](int64_t c) { return du[row * out + c] * g[j * out + c]; });
        if (threadIdx.x % 32 == 0) {
            const bool seen = j <= row;
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

template <class T> struct MlpTensors {
    const T *q, *k, *v, *dy;
    const float *index, *g, *b;
    const float *state[4], *next[4], *dloss; // w1, b1, w2, b2; gradients of those after the chunk
    T *dq, *dk, *dv;
    float *gradient[4];
};

template <class T, class R>
__global__ void mlp_vjp_kernel(Shape p, MlpTensors<T> x, const R *lr_all, R *dlr_all,
                               float *partial, float *scratch) {
    const int64_t d = p.d, f = p.inner(), m = p.m, md = m * d, mf = m * f, size = p.state();
    const int64_t head = blockIdx.x, s = head / p.heads, h = head % p.heads;
    float *free = scratch + head * scratch_of(p);
    const auto take = [&](int64_t n) {
        float *at = free;
        free += n;
        return at;
    };
    float *q = take(md), *k = take(md), *target = take(md), *z2 = take(md), *g2 = take(md),
          *dq = take(md), *dk = take(md), *dtarget = take(md), *dg2 = take(md), *dz2 = take(md),
          *u = take(md), *du = take(md), *dy = take(md), *gain_rows = take(md),
          *shift_rows = take(md), *narrow = take(md);
    float *z1 = take(mf), *hidden = take(mf), *y = take(mf), *g1 = take(mf), *zq = take(mf),
          *xq = take(mf), *dzq = take(mf), *dx = take(mf), *dg1 = take(mf), *dz1 = take(mf),
          *wide = take(mf);
    float *attend = take(m * m), *deta = take(m * m), *am = take(m * m), *pm = take(m * m);
    float *token = take(m), *lr = take(m), *dtoken = take(m);
    float *one_z1 = take(f), *one_x = take(f), *one_dx = take(f), *one_z = take(d),
          *one_dz = take(d), *one_dy = take(d), *gain = take(d), *shift = take(d);
    take(d);
    float *const kept = take(p.segments() * size), *const states = take((p.segment + 1) * size);
    const State first_gradient = state_at(p, take(size));
    const int64_t sizes[4] = {d * f, f, f * d, d};
    State now{}, dw{}; // dw: the gradient of the state after the mini-batch, then that before it
    dw.w1 = x.gradient[0] + head * sizes[0];
    dw.b1 = x.gradient[1] + head * sizes[1];
    dw.w2 = x.gradient[2] + head * sizes[2];
    dw.b2 = x.gradient[3] + head * sizes[3];
    const Norm norm{x.g + h * d, x.b + h * d, d, p.eps};
    const Back back{norm};

    token_rates(m, x.index, 0.0, token);
    each(m, [&](int64_t i) { dtoken[i] = 0; });
    {
        float *to = kept;
        for (int i = 0; i < 4; ++i) {
            const float *const from = x.state[i] + head * sizes[i], *const next =
                                                                        x.next[i]
                                                                            ? x.next[i] +
                                                                                  head * sizes[i]
                                                                            : nullptr;
            float *const gradient = x.gradient[i] + head * sizes[i];
            each(sizes[i], [&](int64_t j) {
                to[j] = from[j];
                gradient[j] = next ? next[j] : 0.0f;
            });
            to += sizes[i];
        }
    }
    each(size, [&](int64_t i) { first_gradient.w1[i] = 0; });
    each(d, [&](int64_t i) { gain[i] = shift[i] = 0; });

    // Up to the gradients of mini-batch i's loss under the state `now`.
    const auto forward = [&](int64_t i) {
        const int64_t n = min(m, p.tokens - i * m);
        const int64_t at = (s * p.tokens + i * m) * p.width + h * d;
        gather(n, d, x.q + at, p.width, q);
        gather(n, d, x.k + at, p.width, k);
        gather(n, d, x.v + at, p.width, target);
        each(n * d, [&](int64_t j) { target[j] -= k[j]; });
        gather(n, 1, lr_all + (s * p.tokens + i * m) * p.heads + h, p.heads, lr);
        affine(n, d, f, k, now.w1, now.b1, z1);
        each(n * f, [&](int64_t j) { hidden[j] = gelu_of(z1[j]); });
        affine(n, f, d, hidden, now.w2, now.b2, z2);
        rows(n, [&](int64_t j) { norm.loss_gradient(z2 + j * d, target + j * d, g2 + j * d); });
        times_transposed(n, f, d, g2, now.w2, y, false);
        each(n * f, [&](int64_t j) { g1[j] = y[j] * gelu_slope(z1[j]); });
    };
    const Rates eta{token, lr, p.scale, false};
    const auto advance = [&](int64_t i, float *from, float *to) {
        const int64_t n = min(m, p.tokens - i * m);
        const State next = state_at(p, to);
        now = state_at(p, from);
        forward(i);
        take_step(n, d, f, k, g1, eta, now.w1, now.b1, next.w1, next.b1);
        take_step(n, f, d, hidden, g2, eta, now.w2, now.b2, next.w2, next.b2);
    };
    for (int64_t i = 0; i < (p.segments() - 1) * p.segment; ++i) {
        float *const from = i % p.segment ? states + i % 2 * size : kept + i / p.segment * size;
        float *const to =
            (i + 1) % p.segment ? states + (i + 1) % 2 * size : kept + (i + 1) / p.segment * size;
        advance(i, from, to);
    }

    const float share = 1 / float(p.heads * p.batches);
    const float *const dloss = x.dloss ? x.dloss + s * 3 : nullptr;
    for (int64_t i = p.batches - 1; i >= 0; --i) {
        const int64_t begin = i / p.segment * p.segment, n = min(m, p.tokens - i * m);
        if (i == p.batches - 1 || (i + 1) % p.segment == 0) { // into this segment
            each(size, [&](int64_t j) { states[j] = kept[begin / p.segment * size + j]; });
            for (int64_t j = begin; j <= i; ++j)
                advance(j, states + (j - begin) * size, states + (j - begin + 1) * size);
        }
        const State next = state_at(p, states + (i - begin + 1) * size);
        now = state_at(p, states + (i - begin) * size);
        forward(i);
        const int64_t last = (n - 1) * d, at = (s * p.tokens + i * m) * p.width + h * d,
                      lr_at = (s * p.tokens + i * m) * p.heads + h;
        each(n * d, [&](int64_t j) {
            dq[j] = dk[j] = dtarget[j] = dg2[j] = dz2[j] = gain_rows[j] = shift_rows[j] = 0;
        });
        each(n * f, [&](int64_t j) { dx[j] = dg1[j] = dz1[j] = dzq[j] = 0; });
        each(n * n, [&](int64_t j) { deta[j] = 0; });

        // weight mean((LN(z) - target)^2) at the last token under a state
        const auto error = [&](float weight, const State &w, const State &to) {
            affine(1, d, f, k + last, w.w1, w.b1, one_z1);
            each(f, [&](int64_t j) { one_x[j] = gelu_of(one_z1[j]); });
            affine(1, f, d, one_x, w.w2, w.b2, one_z);
            each(d, [&](int64_t j) { one_dz[j] = 0; });
            rows(1, [&](int64_t) {
                back.error(one_z, target + last, weight, one_dy, one_dz, dtarget + last,
                           gain_rows + last, shift_rows + last);
            });
            add_outer(1, f, d, one_x, one_dz, to.w2, to.b2);
            times_transposed(1, f, d, one_dz, w.w2, one_dx, false);
            each(f, [&](int64_t j) { one_dx[j] *= gelu_slope(one_z1[j]); });
            add_outer(1, d, f, k + last, one_dx, to.w1, to.b1);
            times_transposed(1, d, f, one_dx, w.w1, dk + last, true);
        };
        if (dloss) {
            error(dloss[0] * share, state_at(p, kept), first_gradient);
            error(dloss[2] * share, next, dw);
            rows(1, [&](int64_t) {
                back.error(z2 + last, target + last, dloss[1] * share, one_dy, dz2 + last,
                           dtarget + last, gain_rows + last, shift_rows + last);
            });
        }
        step_vjp(n, d, f, k, g1, eta, dw.w1, dw.b1, wide, narrow, dk, dg1, deta);
        step_vjp(n, f, d, hidden, g2, eta, dw.w2, dw.b2, narrow, wide, dx, dg2, deta);

        if (x.dy) {
            dual_form(n, d, f, q, k, g1, eta, 0, now.w1, now.b1, attend, zq);
            each(n * f, [&](int64_t j) { xq[j] = gelu_of(zq[j]); });
            dual_form(n, f, d, xq, hidden, g2, eta, 0, now.w2, now.b2, attend, u);
            each(n * d, [&](int64_t j) {
                dy[j] = to_float(x.dy[at + j / d * p.width + j % d]);
                dq[j] += dy[j];
                du[j] = 0;
            });
            rows(n, [&](int64_t j) {
                back.output(u + j * d, dy + j * d, du + j * d, gain_rows + j * d,
                            shift_rows + j * d);
            });
            dual_vjp(n, f, d, xq, hidden, g2, eta, now.w2, du, am, pm, dzq, dx, dg2, deta, dw.w2,
                     dw.b2);
            each(n * f, [&](int64_t j) { dzq[j] *= gelu_slope(zq[j]); });
            dual_vjp(n, d, f, q, k, g1, eta, now.w1, dzq, am, pm, dq, dk, dg1, deta, dw.w1, dw.b1);
        }

        each(n * f, [&](int64_t j) {
            wide[j] = dg1[j] * gelu_slope(z1[j]);
            dz1[j] += dg1[j] * y[j] * gelu_curve(z1[j]);
        });
        each(n * d, [&](int64_t j) { // dG2 += dY W2
            const int64_t row = j / d, c = j % d;
            float sum = dg2[j];
#pragma unroll 1
            for (int64_t l = 0; l < f; ++l)
                sum += wide[row * f + l] * now.w2[l * d + c];
            dg2[j] = sum;
        });
        each(f * d, [&](int64_t j) { // dW2 += dY^T G2
            const int64_t row = j / d, c = j % d;
            float sum = dw.w2[j];
            for (int64_t l = 0; l < n; ++l)
                sum += wide[l * f + row] * g2[l * d + c];
            dw.w2[j] = sum;
        });
        rows(n, [&](int64_t j) {
            back.loss_gradient(z2 + j * d, target + j * d, dg2 + j * d, dz2 + j * d,
                               dtarget + j * d, gain_rows + j * d, shift_rows + j * d);
        });
        add_outer(n, f, d, hidden, dz2, dw.w2, dw.b2);
        times_transposed(n, f, d, dz2, now.w2, dx, true);
        each(n * f, [&](int64_t j) { dz1[j] += dx[j] * gelu_slope(z1[j]); });
        add_outer(n, d, f, k, dz1, dw.w1, dw.b1);
        times_transposed(n, d, f, dz1, now.w1, dk, true);

        each(n, [&](int64_t j) {
            float sum = 0;
            for (int64_t row = 0; row < n; ++row)
                sum += p.scale * deta[row * n + j] * token[row];
            dlr_all[lr_at + j * p.heads] = from_float<R>(sum);
        });
        each(n, [&](int64_t row) {
            float to_token = 0;
            for (int64_t j = 0; j < n; ++j)
                to_token += p.scale * deta[row * n + j] * lr[j];
            dtoken[row] += to_token;
        });
        each(n * d, [&](int64_t j) {
            const int64_t to = at + j / d * p.width + j % d;
            x.dq[to] = from_float<T>(dq[j]);
            x.dk[to] = from_float<T>(dk[j] - dtarget[j]);
            x.dv[to] = from_float<T>(dtarget[j]);
        });
        each(d, [&](int64_t c) {
            for (int64_t j = 0; j < n; ++j) {
                gain[c] += gain_rows[j * d + c];
                shift[c] += shift_rows[j * d + c];
            }
        });
    }
    const float *initial = first_gradient.w1;
    for (int i = 0; i < 4; ++i) {
        float *const gradient = x.gradient[i] + head * sizes[i];
        each(sizes[i], [&](int64_t j) { gradient[j] += initial[j]; });
        initial += sizes[i];
    }
    float *const mine = partial + head * (2 * d + m);
    each(d, [&](int64_t i) {
        mine[i] = gain[i];
        mine[d + i] = shift[i];
    });
    each(m, [&](int64_t i) {
        mine[2 * d + i] = 1 / float(i + 1) + x.index[i] > 0 ? dtoken[i] : 0.0f;
    });
}

} // namespace
} // namespace plain

int32_t plan_plain_ttt_mlp_vjp(const Call &call) {
    const int64_t streams = call.dim(0, 0), tokens = call.dim(0, 1), m = call.dim(4, 0);
    const int64_t batches = (tokens + m - 1) / m;
    const plain::Shape p{tokens,
                         call.dim(0, 2),
                         call.dim(5, 0),
                         call.dim(5, 1),
                         m,
                         batches,
                         int64_t(std::ceil(std::sqrt(double(batches)))),
                         float(call.attr(0)),
                         float(call.attr(1))};
    const size_t out = call.out(0);
    if (!types_fit(call, {1, 2, 11, out, out + 1, out + 2}, {4, 5, 6}) ||
        call.type(out + 3) != call.type(3))
        return PONDER_PLAN_NONE;
    const int64_t blocks = streams * p.heads;
    const size_t partial = (size_t(blocks * (2 * p.d + m)) * sizeof(float) + 255) / 256 * 256;
    return by_types(call.type(0), call.type(3), [&]<class T, class R>(T, R) {
        return call.is(
            partial + size_t(blocks * plain::scratch_of(p)) * sizeof(float), [=](const Run &run) {
                plain::MlpTensors<T> x{};
                x.q = run.at<const T>(0);
                x.k = run.at<const T>(1);
                x.v = run.at<const T>(2);
                x.index = run.at<const float>(4);
                x.g = run.at<const float>(5);
                x.b = run.at<const float>(6);
                x.dy = run.at<const T>(11);
                x.dloss = run.at<const float>(16);
                x.dq = run.at<T>(out);
                x.dk = run.at<T>(out + 1);
                x.dv = run.at<T>(out + 2);
                for (size_t i = 0; i < 4; ++i) {
                    x.state[i] = run.at<const float>(7 + i);
                    x.next[i] = run.at<const float>(12 + i);
                    x.gradient[i] = run.at<float>(out + 7 + i);
                }
                float *const parts = reinterpret_cast<float *>(run.workspace);
                plain::mlp_vjp_kernel<<<unsigned(blocks), plain::threads, 0, run.stream>>>(
                    p, x, run.at<const R>(3), run.at<R>(out + 3), parts,
                    reinterpret_cast<float *>(run.workspace + partial));
                plain::queue_sums(run, out, parts, streams, p.heads, p.d, m);
            });
    });
}

} // namespace ponder::cuda
