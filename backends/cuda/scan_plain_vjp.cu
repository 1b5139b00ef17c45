// ttt_linear_vjp on the plain scans: the mini-batches read backwards, with the state before each
// kept. The equations are those of src/backend/reference/ttt_linear_vjp.cpp.
#include "scan_plain_vjp.cuh"

#include <algorithm>

namespace ponder::cuda {
namespace plain {
namespace {

// Floats that a block works in.
__host__ __device__ inline int64_t scratch_of(const LinearShape &p) {
    return 18 * p.m * p.d + 4 * p.m * p.m + 2 * p.m + 3 * p.d + (p.batches + 2) * (p.d * p.d + p.d);
}

template <class T, class R>
__global__ void vjp_kernel(LinearShape p, Inputs<T, R> x, Gradients<T, R> dx, const T *dy_all,
                           const float *w1, const float *b1, const float *dw_next,
                           const float *db_next, const float *dloss_all, float *dw1, float *db1,
                           float *partial, float *scratch) {
    __shared__ float cell[33];
    const int64_t d = p.d, m = p.m, d2 = d * d, md = m * d;
    const int64_t head = blockIdx.x, s = head / p.heads, h = head % p.heads;
    float *next = scratch + head * scratch_of(p);
    const auto take = [&](int64_t n) {
        float *at = next;
        next += n;
        return at;
    };
    float *q = take(md), *k = take(md), *target = take(md), *z = take(md), *raw = take(md),
          *g = take(md), *dq = take(md), *dk = take(md), *dtarget = take(md), *dg = take(md),
          *dz = take(md), *kw = take(md), *gw = take(md), *dy = take(md), *u = take(md),
          *du = take(md), *gain_rows = take(md), *shift_rows = take(md);
    float *attend = take(m * m), *deta = take(m * m), *am = take(m * m), *pm = take(m * m);
    float *token = take(m), *lr = take(m);
    float *one_z = take(d), *one_dz = take(d), *one_dy = take(d);
    float *states = take((p.batches + 1) * (d2 + d)), *dw_first = take(d2), *db_first = take(d);
    float *const gain = partial + head * partial_floats(p), *const shift = gain + d,
                 *const dtoken = shift + d;
    float *const dw = dw1 + head * d2, *const db = db1 + head * d;
    const Norm norm{x.g + h * d, x.b + h * d, d, p.eps};
    const Back back{norm, gain_rows, shift_rows};

    token_rates(m, x.index, p.decay, token);
    each(m, [&](int64_t i) { dtoken[i] = 0; });
    each(d2, [&](int64_t i) {
        states[i] = w1[head * d2 + i];
        dw[i] = dw_next ? dw_next[head * d2 + i] : 0.0f;
        dw_first[i] = 0;
    });
    each(d, [&](int64_t i) {
        states[d2 + i] = b1[head * d + i];
        db[i] = db_next ? db_next[head * d + i] : 0.0f;
        db_first[i] = gain[i] = shift[i] = 0;
    });

    // Up to the gradients g of mini-batch i, clipped; returns the clip's factor.
    float size = 0;
    const auto forward = [&](int64_t i) {
        const Batch batch(p, i);
        const int64_t n = batch.n;
        const float *const w = states + i * (d2 + d);
        x.read(p, batch, q, k, target, lr);
        affine(n, d, d, k, w, w + d2, z);
        rows(n, [&](int64_t j) { norm.loss_gradient(z + j * d, target + j * d, raw + j * d); });
        float factor = 1;
        if (p.max_norm > 0) {
            size = length(n * d, raw, cell);
            factor = fminf(1.0f, p.max_norm / (size + 1e-6f));
        }
        each(n * d, [&](int64_t j) { g[j] = factor * raw[j]; });
        return factor;
    };
    const Rates eta{token, lr, p.scale, p.by_key};
    for (int64_t i = 0; i < p.batches; ++i) {
        forward(i);
        float *const w = states + i * (d2 + d), *const w2 = w + d2 + d;
        take_step(Batch(p, i).n, d, d, k, g, eta, w, w + d2, w2, w2 + d2);
    }

    const float share = 1 / float(p.heads * p.batches);
    const float *const dloss = dloss_all ? dloss_all + s * 3 : nullptr;
    for (int64_t i = p.batches - 1; i >= 0; --i) {
        const float factor = forward(i);
        const Batch batch(p, i);
        const int64_t n = batch.n, last = (n - 1) * d;
        const float *const w = states + i * (d2 + d), *const w_next = w + d2 + d;
        each(n * d, [&](int64_t j) {
            dq[j] = dk[j] = dtarget[j] = dg[j] = dz[j] = gain_rows[j] = shift_rows[j] = 0;
        });
        each(n * n, [&](int64_t j) { deta[j] = 0; });

        // weight mean((LN(key W + b) - target)^2) at the last token
        const auto error = [&](float weight, const float *w, float *dw, float *db) {
            affine(1, d, d, k + last, w, w + d2, one_z);
            each(d, [&](int64_t j) { one_dz[j] = 0; });
            rows(1, [&](int64_t) {
                back.error(n - 1, one_z, target + last, weight, one_dy, one_dz, dtarget + last);
            });
            add_outer(1, d, d, k + last, one_dz, dw, db);
            times_transposed(1, d, d, one_dz, w, dk + last, true);
        };
        if (dloss) {
            error(dloss[0] * share, states, dw_first, db_first);
            error(dloss[2] * share, w_next, dw, db);
            rows(1, [&](int64_t) {
                back.error(n - 1, z + last, target + last, dloss[1] * share, one_dy, dz + last,
                           dtarget + last);
            });
        }

        step_vjp(n, d, d, k, g, eta, dw, db, kw, gw, dk, dg, deta);

        if (dy_all) {
            dual_form(n, d, d, q, k, g, eta, p.causal_k, w, w + d2, attend, u);
            gather(n, d, dy_all + batch.at, p.width, dy);
            each(n * d, [&](int64_t j) {
                dq[j] += dy[j];
                du[j] = 0;
            });
            rows(n, [&](int64_t j) { back.output(j, u + j * d, dy + j * d, du + j * d); });
            dual_vjp(n, d, d, q, k, g, eta, p.causal_k, w, du, am, pm, dq, dk, dg, deta, dw, db);
        }

        // The clip.
        if (factor < 1) {
            float along = 0;
            for (int64_t j = threadIdx.x; j < n * d; j += threads)
                along += dg[j] * raw[j];
            along = block_sum(along, cell);
            const float inward = along * factor / ((size + 1e-6f) * size);
            each(n * d, [&](int64_t j) { dg[j] = factor * dg[j] - inward * raw[j]; });
        }

        rows(n, [&](int64_t j) {
            back.loss_gradient(j, z + j * d, target + j * d, dg + j * d, dz + j * d,
                               dtarget + j * d);
        });
        add_outer(n, d, d, k, dz, dw, db);
        times_transposed(n, d, d, dz, w, dk, true);

        rates_vjp(n, eta, deta, p.heads, dx.lr + batch.lr_at, dtoken);
        dx.write(p, batch, dq, dk, dtarget);
        back.sum_rows(n, gain, shift);
    }
    each(d2, [&](int64_t i) { dw[i] += dw_first[i]; });
    each(d, [&](int64_t i) { db[i] += db_first[i]; });
    token_rates_vjp(m, x.index, p.decay, dtoken);
}

__global__ void sum_streams(const float *partial, float *dg, float *db, float *dindex, Shape p) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x, each = partial_floats(p);
    if (i < p.heads * p.d) {
        float g = 0, b = 0;
        for (int64_t s = 0; s < p.streams; ++s) {
            const float *mine = partial + (s * p.heads + i / p.d) * each;
            g += mine[i % p.d];
            b += mine[p.d + i % p.d];
        }
        dg[i] = g;
        db[i] = b;
    }
    if (i < p.m) {
        float sum = 0;
        for (int64_t head = 0; head < p.streams * p.heads; ++head)
            sum += partial[head * each + 2 * p.d + i];
        dindex[i] = sum;
    }
}

} // namespace

void queue_sums(const Run &run, size_t out, const float *partial, const Shape &p) {
    sum_streams<<<blocks_for(std::max(p.heads * p.d, p.m), threads), threads, 0, run.stream>>>(
        partial, run.at<float>(out + 5), run.at<float>(out + 6), run.at<float>(out + 4), p);
}

} // namespace plain

int32_t plan_plain_ttt_linear_vjp(const Call &call) {
    using namespace plain;
    const LinearShape p(call);
    const size_t out = call.out(0);
    return plan_vjp(
        call, p, scratch_of(p), 9,
        [=]<class T, class R>(const Run &run, const Inputs<T, R> &x, const Gradients<T, R> &dx,
                              float *partial, float *scratch) {
            vjp_kernel<<<unsigned(p.blocks()), threads, 0, run.stream>>>(
                p, x, dx, run.at<const T>(9), run.at<const float>(7), run.at<const float>(8),
                run.at<const float>(10), run.at<const float>(11), run.at<const float>(12),
                run.at<float>(out + 7), run.at<float>(out + 8), partial, scratch);
        });
}

} // namespace ponder::cuda
