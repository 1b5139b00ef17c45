// ttt_mlp_vjp on the plain scans. The equations and names are those of
// src/backend/reference/ttt_mlp_vjp.cpp. The state is kept before every few mini-batches, about the
// root of their number, and those between are computed again when their turn comes.
#include "scan_plain_vjp.cuh"

#include <cmath>

namespace ponder::cuda {
namespace plain {
namespace {

struct SegmentedShape : MlpShape {
    int64_t segment; // in mini-batches
    explicit SegmentedShape(const Call &call)
        : MlpShape(call), segment(int64_t(std::ceil(std::sqrt(double(batches))))) {}
    __host__ __device__ int64_t state() const { return 2 * d * inner() + inner() + d; }
    __host__ __device__ int64_t segments() const { return (batches + segment - 1) / segment; }
};

struct State {
    float *w1, *b1, *w2, *b2;
};
__device__ inline State state_at(const SegmentedShape &p, float *at) {
    State s;
    s.w1 = at;
    s.b1 = s.w1 + p.d * p.inner();
    s.w2 = s.b1 + p.inner();
    s.b2 = s.w2 + p.inner() * p.d;
    return s;
}

// Floats that a block works in.
__host__ __device__ inline int64_t scratch_of(const SegmentedShape &p) {
    return p.m * (16 * p.d + 11 * p.inner() + 4 * p.m + 2) + 3 * p.inner() + 3 * p.d +
           (p.segments() + p.segment + 2) * p.state();
}

__device__ inline float gelu_curve(float x) {
    const float t = tanhf(gelu_scale * (x + gelu_cube * x * x * x)), p = 1 - t * t;
    const float u1 = gelu_scale * (1 + 3 * gelu_cube * x * x), u2 = 6 * gelu_scale * gelu_cube * x;
    return p * u1 + 0.5f * x * (p * u2 - 2 * t * p * u1 * u1);
}

template <class T> struct MlpTensors {
    const T *dy;
    const float *state[4], *next[4], *dloss; // w1, b1, w2, b2; gradients of those after the chunk
    float *gradient[4];
};

template <class T, class R>
__global__ void mlp_vjp_kernel(SegmentedShape p, Inputs<T, R> x, Gradients<T, R> dx_all,
                               MlpTensors<T> t, float *partial, float *scratch) {
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
    float *token = take(m), *lr = take(m);
    float *one_z1 = take(f), *one_x = take(f), *one_dx = take(f), *one_z = take(d),
          *one_dz = take(d), *one_dy = take(d);
    float *const kept = take(p.segments() * size), *const states = take((p.segment + 1) * size);
    const State first_gradient = state_at(p, take(size));
    float *const gain = partial + head * partial_floats(p), *const shift = gain + d,
                 *const dtoken = shift + d;
    const int64_t sizes[4] = {d * f, f, f * d, d};
    State now{}, dw{}; // dw: the gradient of the state after the mini-batch, then that before it
    dw.w1 = t.gradient[0] + head * sizes[0];
    dw.b1 = t.gradient[1] + head * sizes[1];
    dw.w2 = t.gradient[2] + head * sizes[2];
    dw.b2 = t.gradient[3] + head * sizes[3];
    const Norm norm{x.g + h * d, x.b + h * d, d, p.eps};
    const Back back{norm, gain_rows, shift_rows};

    token_rates(m, x.index, 0.0, token);
    each(m, [&](int64_t i) { dtoken[i] = 0; });
    {
        float *to = kept;
        for (int i = 0; i < 4; ++i) {
            const float *const from = t.state[i] + head * sizes[i];
            const float *const next = t.next[i] ? t.next[i] + head * sizes[i] : nullptr;
            float *const gradient = t.gradient[i] + head * sizes[i];
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
        const Batch batch(p, i);
        const int64_t n = batch.n;
        x.read(p, batch, q, k, target, lr);
        affine(n, d, f, k, now.w1, now.b1, z1);
        each(n * f, [&](int64_t j) { hidden[j] = gelu_of(z1[j]); });
        affine(n, f, d, hidden, now.w2, now.b2, z2);
        rows(n, [&](int64_t j) { norm.loss_gradient(z2 + j * d, target + j * d, g2 + j * d); });
        times_transposed(n, f, d, g2, now.w2, y, false);
        each(n * f, [&](int64_t j) { g1[j] = y[j] * gelu_slope(z1[j]); });
    };
    const Rates eta{token, lr, p.scale, false};
    const auto advance = [&](int64_t i, float *from, float *to) {
        const int64_t n = Batch(p, i).n;
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
    const float *const dloss = t.dloss ? t.dloss + s * 3 : nullptr;
    for (int64_t i = p.batches - 1; i >= 0; --i) {
        const int64_t begin = i / p.segment * p.segment;
        if (i == p.batches - 1 || (i + 1) % p.segment == 0) { // into this segment
            each(size, [&](int64_t j) { states[j] = kept[begin / p.segment * size + j]; });
            for (int64_t j = begin; j <= i; ++j)
                advance(j, states + (j - begin) * size, states + (j - begin + 1) * size);
        }
        const State next = state_at(p, states + (i - begin + 1) * size);
        now = state_at(p, states + (i - begin) * size);
        forward(i);
        const Batch batch(p, i);
        const int64_t n = batch.n, last = (n - 1) * d;
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
                back.error(n - 1, one_z, target + last, weight, one_dy, one_dz, dtarget + last);
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
                back.error(n - 1, z2 + last, target + last, dloss[1] * share, one_dy, dz2 + last,
                           dtarget + last);
            });
        }
        step_vjp(n, d, f, k, g1, eta, dw.w1, dw.b1, wide, narrow, dk, dg1, deta);
        step_vjp(n, f, d, hidden, g2, eta, dw.w2, dw.b2, narrow, wide, dx, dg2, deta);

        if (t.dy) {
            dual_form(n, d, f, q, k, g1, eta, 0, now.w1, now.b1, attend, zq);
            each(n * f, [&](int64_t j) { xq[j] = gelu_of(zq[j]); });
            dual_form(n, f, d, xq, hidden, g2, eta, 0, now.w2, now.b2, attend, u);
            gather(n, d, t.dy + batch.at, p.width, dy);
            each(n * d, [&](int64_t j) {
                dq[j] += dy[j];
                du[j] = 0;
            });
            rows(n, [&](int64_t j) { back.output(j, u + j * d, dy + j * d, du + j * d); });
            dual_vjp(n, f, d, xq, hidden, g2, eta, 0, now.w2, du, am, pm, dzq, dx, dg2, deta, dw.w2,
                     dw.b2);
            each(n * f, [&](int64_t j) { dzq[j] *= gelu_slope(zq[j]); });
            dual_vjp(n, d, f, q, k, g1, eta, 0, now.w1, dzq, am, pm, dq, dk, dg1, deta, dw.w1,
                     dw.b1);
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
            back.loss_gradient(j, z2 + j * d, target + j * d, dg2 + j * d, dz2 + j * d,
                               dtarget + j * d);
        });
        add_outer(n, f, d, hidden, dz2, dw.w2, dw.b2);
        times_transposed(n, f, d, dz2, now.w2, dx, true);
        each(n * f, [&](int64_t j) { dz1[j] += dx[j] * gelu_slope(z1[j]); });
        add_outer(n, d, f, k, dz1, dw.w1, dw.b1);
        times_transposed(n, d, f, dz1, now.w1, dk, true);

        rates_vjp(n, eta, deta, p.heads, dx_all.lr + batch.lr_at, dtoken);
        dx_all.write(p, batch, dq, dk, dtarget);
        back.sum_rows(n, gain, shift);
    }
    const float *initial = first_gradient.w1;
    for (int i = 0; i < 4; ++i) {
        float *const gradient = t.gradient[i] + head * sizes[i];
        each(sizes[i], [&](int64_t j) { gradient[j] += initial[j]; });
        initial += sizes[i];
    }
    token_rates_vjp(m, x.index, 0.0, dtoken);
}

} // namespace
} // namespace plain

int32_t plan_plain_ttt_mlp_vjp(const Call &call) {
    using namespace plain;
    const SegmentedShape p(call);
    const size_t out = call.out(0);
    return plan_vjp(
        call, p, scratch_of(p), 11,
        [=]<class T, class R>(const Run &run, const Inputs<T, R> &x, const Gradients<T, R> &dx,
                              float *partial, float *scratch) {
            MlpTensors<T> t{};
            t.dy = run.at<const T>(11);
            t.dloss = run.at<const float>(16);
            for (size_t i = 0; i < 4; ++i) {
                t.state[i] = run.at<const float>(7 + i);
                t.next[i] = run.at<const float>(12 + i);
                t.gradient[i] = run.at<float>(out + 7 + i);
            }
            mlp_vjp_kernel<<<unsigned(p.blocks()), threads, 0, run.stream>>>(p, x, dx, t, partial,
                                                                             scratch);
        });
}

} // namespace ponder::cuda
