// ttt_linear_vjp on the plain scans: the mini-batches read backwards, with the state before each
// kept. The equations are those of src/backend/reference/ttt_linear_vjp.cpp.
#include "scan.hpp"
#include "scan_plain_vjp.cuh"

#include <algorithm>

namespace ponder::cuda {
namespace plain {
namespace {

struct Shape {
    int64_t tokens, width, heads, d, m, batches;
    bool by_key;
    float scale;
    double decay;
    float eps, max_norm;
    int64_t causal_k;
};

// Floats that a block works in.
__host__ __device__ inline int64_t scratch_of(const Shape &p) {
    return 17 * p.m * p.d + 4 * p.m * p.m + 4 * p.m + 8 * p.d + (p.batches + 2) * (p.d * p.d + p.d);
}

template <class T, class R>
__global__ void vjp_kernel(Shape p, const T *q_all, const T *k_all, const T *v_all, const R *lr_all,
                           const float *index, const float *g_all, const float *b_all,
                           const float *w1, const float *b1, const T *dy_all, const float *dw_next,
                           const float *db_next, const float *dloss_all, T *dq_all, T *dk_all,
                           T *dv_all, R *dlr_all, float *dw1, float *db1, float *partial,
                           float *scratch) {
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
          *dz = take(md), *kw = take(md), *gw = take(md), *u = take(md), *du = take(md),
          *gain_rows = take(md), *shift_rows = take(md);
    float *attend = take(m * m), *deta = take(m * m), *am = take(m * m), *pm = take(m * m);
    float *token = take(m), *lr = take(m), *dtoken = take(2 * m);
    float *one_z = take(d), *one_dz = take(d), *one_dy = take(d), *gain = take(d), *shift = take(d);
    take(3 * d);
    float *states = take((p.batches + 1) * (d2 + d)), *dw_first = take(d2), *db_first = take(d);
    float *const dw = dw1 + head * d2, *const db = db1 + head * d;
    const Norm norm{g_all + h * d, b_all + h * d, d, p.eps};
    const Back back{norm};

    token_rates(m, index, p.decay, token);
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
        const int64_t first = i * m, n = min(m, p.tokens - first);
        const int64_t at = (s * p.tokens + first) * p.width + h * d;
        const float *const w = states + i * (d2 + d);
        gather(n, d, q_all + at, p.width, q);
        gather(n, d, k_all + at, p.width, k);
        gather(n, d, v_all + at, p.width, target);
        each(n * d, [&](int64_t j) { target[j] -= k[j]; });
        gather(n, 1, lr_all + (s * p.tokens + first) * p.heads + h, p.heads, lr);
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
        const int64_t n = min(m, p.tokens - i * m);
        float *const w = states + i * (d2 + d), *const w2 = w + d2 + d;
        take_step(n, d, d, k, g, eta, w, w + d2, w2, w2 + d2);
    }

    const float share = 1 / float(p.heads * p.batches);
    const float *const dloss = dloss_all ? dloss_all + s * 3 : nullptr;
    for (int64_t i = p.batches - 1; i >= 0; --i) {
        const float factor = forward(i);
        const int64_t n = min(m, p.tokens - i * m), last = (n - 1) * d;
        const int64_t at = (s * p.tokens + i * m) * p.width + h * d,
                      lr_at = (s * p.tokens + i * m) * p.heads + h;
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
                back.error(one_z, target + last, weight, one_dy, one_dz, dtarget + last,
                           gain_rows + last, shift_rows + last);
            });
            add_outer(1, d, d, k + last, one_dz, dw, db);
            times_transposed(1, d, d, one_dz, w, dk + last, true);
        };
        if (dloss) {
            error(dloss[0] * share, states, dw_first, db_first);
            error(dloss[2] * share, w_next, dw, db);
            rows(1, [&](int64_t) {
                back.error(z + last, target + last, dloss[1] * share, one_dy, dz + last,
                           dtarget + last, gain_rows + last, shift_rows + last);
            });
        }

        // The step.
        affine(n, d, d, k, dw, db, kw);
        times_transposed(n, d, d, g, dw, gw, false);
        rows(n, [&](int64_t j) {
            const float dot = lane_sum(d, [&](int64_t c) { return kw[j * d + c] * g[j * d + c]; });
            if (threadIdx.x % 32 == 0)
                deta[(n - 1) * n + j] -= dot;
        });
        each(n * d, [&](int64_t j) {
            const float rate = eta(n - 1, j / d);
            dg[j] -= rate * kw[j];
            dk[j] -= rate * gw[j];
        });

        // The queries.
        if (dy_all) {
            dual_form(n, d, d, q, k, g, eta, p.causal_k, w, w + d2, attend, u);
            each(n * d, [&](int64_t j) {
                kw[j] = to_float(dy_all[at + j / d * p.width + j % d]);
                dq[j] += kw[j];
                du[j] = 0;
            });
            rows(n, [&](int64_t j) {
                back.output(u + j * d, kw + j * d, du + j * d, gain_rows + j * d,
                            shift_rows + j * d);
            });
            rows(n * n, [&](int64_t x) {
                const int64_t row = x / n, j = x % n;
                const float a =
                    lane_sum(d, [&](int64_t c) { return q[row * d + c] * k[j * d + c]; }) + 1;
                const float b =
                    lane_sum(d, [&](int64_t c) { return du[row * d + c] * g[j * d + c]; });
                if (threadIdx.x % 32 == 0) {
                    const bool seen = j <= row + p.causal_k;
                    am[x] = seen ? eta(row, j) * a : 0.0f;
                    pm[x] = seen ? eta(row, j) * b : 0.0f;
                    if (seen)
                        deta[x] -= a * b;
                }
            });
            each(n * d, [&](int64_t x) {
                const int64_t row = x / d, c = x % d;
                float to_q = 0, to_k = 0, to_g = 0;
                for (int64_t j = 0; j < n; ++j) {
                    to_q += pm[row * n + j] * k[j * d + c];
                    to_k += pm[j * n + row] * q[j * d + c];
                    to_g += am[j * n + row] * du[j * d + c];
                }
                dq[x] -= to_q;
                dk[x] -= to_k;
                dg[x] -= to_g;
            });
            add_outer(n, d, d, q, du, dw, db);
            times_transposed(n, d, d, du, w, dq, true);
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
            back.loss_gradient(z + j * d, target + j * d, dg + j * d, dz + j * d, dtarget + j * d,
                               gain_rows + j * d, shift_rows + j * d);
        });
        add_outer(n, d, d, k, dz, dw, db);
        times_transposed(n, d, d, dz, w, dk, true);

        each(n, [&](int64_t j) { // by key: dlr, and dtoken where it is the key's
            float sum = 0, to_token = 0;
            for (int64_t row = 0; row < n; ++row) {
                const float de = p.scale * deta[row * n + j];
                sum += de * token[p.by_key ? j : row];
                to_token += de * lr[j];
            }
            dlr_all[lr_at + j * p.heads] = from_float<R>(sum);
            if (p.by_key)
                dtoken[j] += to_token;
        });
        if (!p.by_key)
            each(n, [&](int64_t row) {
                float to_token = 0;
                for (int64_t j = 0; j < n; ++j)
                    to_token += p.scale * deta[row * n + j] * lr[j];
                dtoken[row] += to_token;
            });
        each(n * d, [&](int64_t j) {
            const int64_t to = at + j / d * p.width + j % d;
            dq_all[to] = from_float<T>(dq[j]);
            dk_all[to] = from_float<T>(dk[j] - dtarget[j]);
            dv_all[to] = from_float<T>(dtarget[j]);
        });
        each(d, [&](int64_t c) {
            for (int64_t j = 0; j < n; ++j) {
                gain[c] += gain_rows[j * d + c];
                shift[c] += shift_rows[j * d + c];
            }
        });
    }
    each(d2, [&](int64_t i) { dw[i] += dw_first[i]; });
    each(d, [&](int64_t i) { db[i] += db_first[i]; });
    float *const mine = partial + head * (2 * d + m);
    each(d, [&](int64_t i) {
        mine[i] = gain[i];
        mine[d + i] = shift[i];
    });
    each(m, [&](int64_t i) {
        mine[2 * d + i] = 1 / float(i + 1) + index[i] > 0
                              ? dtoken[i] * float(exp(p.decay * double(i - (m - 1))))
                              : 0.0f;
    });
}

__global__ void sum_streams(const float *partial, float *dg, float *db, float *dindex,
                            int64_t streams, int64_t heads, int64_t d, int64_t m) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x, each = 2 * d + m;
    if (i < heads * d) {
        float g = 0, b = 0;
        for (int64_t s = 0; s < streams; ++s) {
            const float *mine = partial + (s * heads + i / d) * each;
            g += mine[i % d];
            b += mine[d + i % d];
        }
        dg[i] = g;
        db[i] = b;
    }
    if (i < m) {
        float sum = 0;
        for (int64_t head = 0; head < streams * heads; ++head)
            sum += partial[head * each + 2 * d + i];
        dindex[i] = sum;
    }
}

} // namespace

void queue_sums(const Run &run, size_t out, const float *partial, int64_t streams, int64_t heads,
                int64_t d, int64_t m) {
    sum_streams<<<blocks_for(std::max(heads * d, m), threads), threads, 0, run.stream>>>(
        partial, run.at<float>(out + 5), run.at<float>(out + 6), run.at<float>(out + 4), streams,
        heads, d, m);
}

} // namespace plain

int32_t plan_plain_ttt_linear_vjp(const Call &call) {
    const int64_t streams = call.dim(0, 0), tokens = call.dim(0, 1), m = call.dim(4, 0);
    const plain::Shape p{tokens,
                         call.dim(0, 2),
                         call.dim(5, 0),
                         call.dim(5, 1),
                         m,
                         (tokens + m - 1) / m,
                         call.attr(0) == 1,
                         float(call.attr(1)),
                         call.attr(2),
                         float(call.attr(3)),
                         float(call.attr(4)),
                         int64_t(call.attr(5))};
    const size_t out = call.out(0);
    if (!types_fit(call, {1, 2, 9, out, out + 1, out + 2}, {4, 5, 6}) ||
        call.type(out + 3) != call.type(3))
        return PONDER_PLAN_NONE;
    const int64_t blocks = streams * p.heads;
    const size_t partial = (size_t(blocks * (2 * p.d + m)) * sizeof(float) + 255) / 256 * 256;
    return by_types(call.type(0), call.type(3), [&]<class T, class R>(T, R) {
        return call.is(
            partial + size_t(blocks * plain::scratch_of(p)) * sizeof(float), [=](const Run &run) {
                float *const parts = reinterpret_cast<float *>(run.workspace);
                plain::vjp_kernel<<<unsigned(blocks), plain::threads, 0, run.stream>>>(
                    p, run.at<const T>(0), run.at<const T>(1), run.at<const T>(2),
                    run.at<const R>(3), run.at<const float>(4), run.at<const float>(5),
                    run.at<const float>(6), run.at<const float>(7), run.at<const float>(8),
                    run.at<const T>(9), run.at<const float>(10), run.at<const float>(11),
                    run.at<const float>(12), run.at<T>(out), run.at<T>(out + 1), run.at<T>(out + 2),
                    run.at<R>(out + 3), run.at<float>(out + 7), run.at<float>(out + 8), parts,
                    reinterpret_cast<float *>(run.workspace + partial));
                plain::queue_sums(run, out, parts, streams, p.heads, p.d, m);
            });
    });
}

} // namespace ponder::cuda
