// ttt_linear_vjp: ttt_linear's mini-batches read backwards. One is z = k W + b,
//     G = clip(gradient of 0.5 |LN(z) - target|^2), target = v - k
//     y = q + LN(u), u = q W + b - (eta o mask o (q k^T + 1)) G
//     W' = W - (last k)^T G, b' = b - last G,  last: the last row of eta
// Its gradient arrives at G from u, W' and b'; G's own in z is a second derivative of LN. The three
// losses add theirs at the last token's row. The states before the mini-batches are made again
// first and kept in the workspace, everything else is made again on the way back. One task: dg, db
// and dindex are sums over streams and heads.
#include "gemm.hpp"
#include "ops.hpp"
#include "ttt.hpp"

#include <math.h>

namespace ponder::cpu::PONDER_ISA {
namespace {

struct TttVjp : Kernel {
    int64_t streams, tokens, width, heads, d, batch, batches, causal_k;
    bool by_key;
    float scale, eps, max_norm;
    double decay;
    int32_t type[13], out[4]; // of the inputs; of dq, dk, dv, dlr
};

struct Work {
    uint32_t *left, *right;                           // packed operands
    float *states;                                    // W[D,D] and b[D] before each mini-batch
    float *q, *k, *target, *dy, *z, *raw, *g;         // [M, D]; raw, g: before and after the clip
    float *u, *du, *kw, *gw, *dq, *dk, *dt, *dg, *dz; // [M, D]
    float *a, *p, *mix, *deta;                        // [M, M]
    float *dstate, *first;                            // as a state: its gradient, that of the first
    float *row, *token, *lr;                          // [2 D], [M], [M]
};

size_t work(const TttVjp &t, void *workspace, Work *w) {
    const int64_t m = t.batch, d = t.d, most = larger(m, d);
    Carver c{static_cast<char *>(workspace)};
    w->left = c.take<uint32_t>(
        size_t(larger(int64_t(a_rows_units(most)), int64_t(a_columns_units(larger(m, 1))))));
    w->right = c.take<uint32_t>(b_units(most, most));
    w->states = c.take<float>(size_t((t.batches + 1) * d * (d + 1)));
    float **const rows[] = {&w->q,  &w->k,  &w->target, &w->dy, &w->z,  &w->raw, &w->g,  &w->u,
                            &w->du, &w->kw, &w->gw,     &w->dq, &w->dk, &w->dt,  &w->dg, &w->dz};
    for (float **p : rows)
        *p = c.take<float>(size_t(m * d));
    float **const squares[] = {&w->a, &w->p, &w->mix, &w->deta};
    for (float **p : squares)
        *p = c.take<float>(size_t(m * m));
    w->dstate = c.take<float>(size_t(d * (d + 1)));
    w->first = c.take<float>(size_t(d * (d + 1)));
    w->row = c.take<float>(size_t(2 * d));
    w->token = c.take<float>(size_t(m));
    w->lr = c.take<float>(size_t(m));
    return size_t(c.at - static_cast<char *>(workspace));
}

void axpy(int64_t n, float a, const float *x, float *y) {
    each_vector(
        n, PONDER_EACH(i, w) {
            plain(y).put(i, fma(set(a), plain(x).get(i, w), plain(y).get(i, w)), w);
        });
}

float dot(int64_t n, const float *x, const float *y) {
    vf total = set(0);
    each_vector(
        n, PONDER_EACH(i, w) { total = fma(plain(x).get(i, w), plain(y).get(i, w), total); });
    return sum(total);
}

enum Onto { fresh, added };

// y[m,n] (+)= alpha a[m,k] b[k,n] + bias
void nn(const Work &w, Onto onto, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
        const float *b, float *y, const float *bias = nullptr) {
    pack_a(w.left, plain(a), k, m, k, false);
    Product p;
    if (n % kPanel == 0) {
        p.part[0] = direct_part(w.left, b, k, n);
    } else {
        pack_b(w.right, plain(b), n, 1, k, n, false);
        p.part[0] = packed_part(w.left, w.right, k);
    }
    p.alpha = alpha, p.accumulate = onto == added;
    if (bias)
        p.bias = plain(bias);
    p.y = plain(y), p.y_row = n;
    product(p, m, n);
}

// y[m,n] (+)= a[m,k] b[n,k]^T
void nt(const Work &w, Onto onto, int64_t m, int64_t n, int64_t k, const float *a, const float *b,
        float *y) {
    pack_a(w.left, plain(a), k, m, k, false);
    pack_b(w.right, plain(b), 1, k, k, n, false);
    Product p;
    p.part[0] = packed_part(w.left, w.right, k);
    p.accumulate = onto == added;
    p.y = plain(y), p.y_row = n;
    product(p, m, n);
}

// y[m,n] += alpha a[k,m]^T b[k,n]
void tn(const Work &w, int64_t m, int64_t n, int64_t k, float alpha, const float *a, const float *b,
        float *y) {
    Product p;
    p.columns = p.accumulate = true;
    p.alpha = alpha, p.y_row = n;
    if (n % kPanel == 0) {
        p.part[0] = direct_part(w.left, b, k, n);
    } else {
        pack_b(w.right, plain(b), n, 1, k, n, false);
        p.part[0] = packed_part(w.left, w.right, k);
    }
    for (int64_t i = 0; i < m; i += kTile) {
        const int64_t rows = smaller(kTile, m - i);
        for (int64_t r = 0; r < k; ++r) {
            const View to = View::of(w.left + r * kStride, kF32);
            each_vector(
                rows, PONDER_EACH(e, n_) { to.put(e, plain(a).get(r * m + i + e, n_), n_); });
        }
        p.y = plain(y + i * n);
        product(p, rows, n);
    }
}

// One head's norm, and where the gradients of its weights are added up.
struct HeadNorm {
    View g, b;
    float *dg, *db;
    int64_t d;
    float eps;
};

// dz += (d LN / dz)^T dy for a row; onto = fresh: dz =
PONDER_INLINE void norm_vjp(const HeadNorm &norm, const Norm &s, const float *z, const float *dy,
                            Onto onto, float *dz) {
    const vf mean = set(s.mean), r = set(s.scale);
    vf su = set(0), suh = set(0);
    each_vector(
        norm.d, PONDER_EACH(i, n) {
            const vf h = (plain(z).get(i, n) - mean) * r, d = plain(dy).get(i, n);
            const vf u = norm.g.get(i, n) * d;
            su += u;
            suh = fma(u, h, suh);
            plain(norm.dg).put(i, fma(d, h, plain(norm.dg).get(i, n)), n);
            plain(norm.db).put(i, plain(norm.db).get(i, n) + d, n);
        });
    const vf mu = set(sum(su) / float(norm.d)), muh = set(sum(suh) / float(norm.d));
    each_vector(
        norm.d, PONDER_EACH(i, n) {
            const vf h = (plain(z).get(i, n) - mean) * r;
            const vf u = norm.g.get(i, n) * plain(dy).get(i, n);
            vf x = (u - mu - h * muh) * r;
            if (onto == added)
                x += plain(dz).get(i, n);
            plain(dz).put(i, x, n);
        });
}

// Of weight mean((LN(z) - target)^2) for a row: dz += and dtarget +=; `scratch` is [D].
void error_vjp(const HeadNorm &norm, const float *z, const float *target, float weight,
               float *scratch, float *dz, float *dtarget) {
    const Norm s = norm_of(z, norm.d, norm.eps);
    const vf twice = set(2 * weight / float(norm.d));
    each_vector(
        norm.d, PONDER_EACH(i, n) {
            const vf h = (plain(z).get(i, n) - set(s.mean)) * set(s.scale);
            const vf y = fma(h, norm.g.get(i, n), norm.b.get(i, n));
            const vf d = twice * (y - plain(target).get(i, n));
            plain(scratch).put(i, d, n);
            plain(dtarget).put(i, plain(dtarget).get(i, n) - d, n);
        });
    norm_vjp(norm, s, z, scratch, added, dz);
}

// Of p = r (u - mean(u) - h mean(u h)), u = g (g h + b - target), for a row. With E = r dp:
//   du = E - mean(E) - h mean(E h),  dh = -E mean(u h) - u mean(E h) + g (g du),
//   dr = dp p / r,  dz += r (dh - mean(dh) - h (mean(dh h) + r dr / D)),  dtarget -= g du
void loss_gradient_vjp(const HeadNorm &norm, const float *z, const float *target, const float *dp,
                       float *scratch, float *dz, float *dtarget) {
    const int64_t d = norm.d;
    const Norm s = norm_of(z, d, norm.eps);
    const vf mean = set(s.mean), r = set(s.scale);
    const auto h_of = [&](int64_t i, int n) __attribute__((always_inline)) {
        return (plain(z).get(i, n) - mean) * r;
    };
    const auto residual = [&](int64_t i, int n, vf h) __attribute__((always_inline)) {
        return fma(h, norm.g.get(i, n), norm.b.get(i, n)) - plain(target).get(i, n);
    };
    vf su = set(0), suh = set(0), se = set(0), seh = set(0);
    each_vector(
        d, PONDER_EACH(i, n) { // g and dp are 0 beyond the end
            const vf h = h_of(i, n), u = norm.g.get(i, n) * residual(i, n, h);
            const vf e = r * plain(dp).get(i, n);
            su += u, se += e;
            suh = fma(u, h, suh);
            seh = fma(e, h, seh);
        });
    const float count_ = float(d);
    const vf mu = set(sum(su) / count_), muh = set(sum(suh) / count_);
    const vf me = set(sum(se) / count_), meh = set(sum(seh) / count_);
    vf sr = set(0), sdh = set(0), sdhh = set(0);
    each_vector(
        d, PONDER_EACH(i, n) {
            const vf h = h_of(i, n), g = norm.g.get(i, n), t = residual(i, n, h), u = g * t;
            const vf p = plain(dp).get(i, n), e = r * p, du = e - me - h * meh;
            sr = fma(p, u - mu - h * muh, sr);
            plain(norm.dg).put(i, plain(norm.dg).get(i, n) + du * fma(g, h, t), n);
            plain(norm.db).put(i, fma(du, g, plain(norm.db).get(i, n)), n);
            plain(dtarget).put(i, plain(dtarget).get(i, n) - du * g, n);
            const vf dh = g * g * du - e * muh - u * meh;
            plain(scratch).put(i, dh, n);
            sdh += dh;
            sdhh = fma(dh, h, sdhh);
        });
    const vf mdh = set(sum(sdh) / count_);
    const vf mdhh = set((sum(sdhh) + sum(sr) * s.scale) / count_);
    each_vector(
        d, PONDER_EACH(i, n) {
            const vf x = r * (plain(scratch).get(i, n) - mdh - h_of(i, n) * mdhh);
            plain(dz).put(i, plain(dz).get(i, n) + x, n);
        });
}

struct Clip {
    float factor, length;
};

// z, raw and g of a mini-batch under a state.
Clip gradients(const TttVjp &t, const Work &w, const HeadNorm &norm, int64_t n,
               const float *state) {
    const int64_t d = t.d;
    nn(w, fresh, n, d, d, 1, w.k, state, w.z, state + d * d);
    double squares = 0;
    for (int64_t i = 0; i < n; ++i)
        squares += double(
            loss_gradient(w.z + i * d, w.target + i * d, w.raw + i * d, norm.g, norm.b, d, t.eps));
    const double length = __builtin_sqrt(squares);
    const double f = t.max_norm > 0 ? double(t.max_norm) / (length + 1e-6) : 1;
    const Clip clip = {f < 1 ? float(f) : 1, float(length)};
    each_vector(
        n * d,
        PONDER_EACH(i, m) { plain(w.g).put(i, plain(w.raw).get(i, m) * set(clip.factor), m); });
    return clip;
}

void gather(View from, int64_t step, int64_t n, int64_t d, float *x) {
    for (int64_t i = 0; i < n; ++i)
        each_vector(
            d, PONDER_EACH(c, w) { plain(x + i * d).put(c, from.get(i * step + c, w), w); });
}

PONDER_INLINE float rate_of(const TttVjp &t, const Work &w, int64_t i, int64_t j) {
    return t.scale * w.token[t.by_key ? j : i] * w.lr[j];
}

// weight mean((LN(key W + b) - target)^2) for the last row: adds to dk, dt, dstate.
void last_error(const TttVjp &t, const Work &w, const HeadNorm &norm, int64_t last, float weight,
                const float *state, float *dstate) {
    const int64_t d = t.d;
    float *z = w.u, *dz = w.row + d; // u is not needed yet
    nn(w, fresh, 1, d, d, 1, w.k + last * d, state, z, state + d * d);
    memset(dz, 0, size_t(d) * 4);
    error_vjp(norm, z, w.target + last * d, weight, w.row, dz, w.dt + last * d);
    for (int64_t i = 0; i < d; ++i) {
        axpy(d, w.k[last * d + i], dz, dstate + i * d);
        w.dk[last * d + i] += dot(d, dz, state + i * d);
    }
    axpy(d, 1, dz, dstate + d * d);
}

// From the gradient of the state after a mini-batch, in dstate, to that before it.
void mini_batch(const TttVjp &t, const Work &w, const HeadNorm &norm, int64_t n, bool with_dy,
                const float *dloss, const float *first, const float *state, const float *next,
                float *dstate) {
    const int64_t d = t.d, last = n - 1;
    const Clip clip = gradients(t, w, norm, n, state);
    float *const zeroed[] = {w.dk, w.dt, w.dg, w.dz, w.dq};
    for (float *x : zeroed)
        memset(x, 0, size_t(n * d) * 4);
    memset(w.deta, 0, size_t(n * n) * 4);
    if (dloss) {
        const float share = 1 / float(t.heads * t.batches);
        last_error(t, w, norm, last, dloss[0] * share, first, w.first);
        last_error(t, w, norm, last, dloss[2] * share, next, dstate);
        error_vjp(norm, w.z + last * d, w.target + last * d, dloss[1] * share, w.row,
                  w.dz + last * d, w.dt + last * d);
    }

    // The step.
    nn(w, fresh, n, d, d, 1, w.k, dstate, w.kw, dstate + d * d);
    nt(w, fresh, n, d, d, w.g, dstate, w.gw);
    for (int64_t j = 0; j < n; ++j) {
        const float rate = rate_of(t, w, last, j);
        w.deta[last * n + j] -= dot(d, w.kw + j * d, w.g + j * d);
        axpy(d, -rate, w.kw + j * d, w.dg + j * d);
        axpy(d, -rate, w.gw + j * d, w.dk + j * d);
    }

    // The queries.
    if (with_dy) {
        nt(w, fresh, n, n, d, w.q, w.k, w.a);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) {
                const float a = w.a[i * n + j] + 1;
                w.a[i * n + j] = j <= i + t.causal_k ? a : 0;
                w.mix[i * n + j] = rate_of(t, w, i, j) * w.a[i * n + j];
            }
        nn(w, fresh, n, d, d, 1, w.q, state, w.u, state + d * d);
        nn(w, added, n, d, n, -1, w.mix, w.g, w.u);
        for (int64_t i = 0; i < n; ++i) {
            const Norm s = norm_of(w.u + i * d, d, t.eps);
            norm_vjp(norm, s, w.u + i * d, w.dy + i * d, fresh, w.du + i * d);
            axpy(d, 1, w.du + i * d, dstate + d * d);
        }
        tn(w, n, d, n, -1, w.mix, w.du, w.dg);
        nt(w, fresh, n, n, d, w.du, w.g, w.p);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) {
                w.deta[i * n + j] -= w.a[i * n + j] * w.p[i * n + j];
                w.mix[i * n + j] = j <= i + t.causal_k ? rate_of(t, w, i, j) * w.p[i * n + j] : 0;
            }
        memcpy(w.dq, w.dy, size_t(n * d) * 4);
        nn(w, added, n, d, n, -1, w.mix, w.k, w.dq);
        nt(w, added, n, d, d, w.du, state, w.dq);
        tn(w, n, d, n, -1, w.mix, w.q, w.dk);
        tn(w, d, d, n, 1, w.q, w.du, dstate);
    }

    // The clip, then G's own gradient, then z = k W + b.
    if (clip.factor < 1) {
        const float inward =
            dot(n * d, w.dg, w.raw) * clip.factor / ((clip.length + 1e-6f) * clip.length);
        each_vector(
            n * d, PONDER_EACH(i, m) {
                const vf x = plain(w.dg).get(i, m) * set(clip.factor);
                plain(w.dg).put(i, x - set(inward) * plain(w.raw).get(i, m), m);
            });
    }
    for (int64_t j = 0; j < n; ++j) {
        loss_gradient_vjp(norm, w.z + j * d, w.target + j * d, w.dg + j * d, w.row, w.dz + j * d,
                          w.dt + j * d);
        axpy(d, 1, w.dz + j * d, dstate + d * d);
    }
    tn(w, d, d, n, 1, w.k, w.dz, dstate);
    nt(w, added, n, d, d, w.dz, state, w.dk);
}

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t) {
    const TttVjp &t = *static_cast<const TttVjp *>(kernel);
    Work w;
    work(t, workspace, &w);
    const auto input = [&](uint32_t i) { return View::of(buffers[i], t.type[i]); };
    const auto floats_of = [&](uint32_t i) { return static_cast<float *>(buffers[i]); };
    const int64_t d = t.d, size = d * (d + 1);
    const View index = input(4);
    double dtoken[kTile] = {};
    for (int64_t i = 0; i < t.batch; ++i) {
        const float rate = 1 / float(i + 1) + index.one(i);
        w.token[i] = (rate > 0 ? rate : 0) * float(::exp(t.decay * double(i - (t.batch - 1))));
    }
    memset(buffers[18], 0, size_t(t.width) * 4);
    memset(buffers[19], 0, size_t(t.width) * 4);
    for (int64_t stream = 0; stream < t.streams; ++stream)
        for (int64_t h = 0; h < t.heads; ++h) {
            const int64_t head = stream * t.heads + h;
            const HeadNorm norm = {input(5).at(h * d),
                                   input(6).at(h * d),
                                   floats_of(18) + h * d,
                                   floats_of(19) + h * d,
                                   d,
                                   t.eps};
            const auto load_rows = [&](int64_t b) {
                const int64_t n = smaller(t.batch, t.tokens - b * t.batch);
                const int64_t row = stream * t.tokens + b * t.batch, at = row * t.width + h * d;
                gather(input(1).at(at), t.width, n, d, w.k);
                gather(input(2).at(at), t.width, n, d, w.target);
                axpy(n * d, -1, w.k, w.target);
                const View lr = input(3).at(row * t.heads + h);
                for (int64_t i = 0; i < n; ++i)
                    w.lr[i] = lr.one(i * t.heads);
                return n;
            };
            memcpy(w.states, floats_of(7) + head * d * d, size_t(d * d) * 4);
            memcpy(w.states + d * d, floats_of(8) + head * d, size_t(d) * 4);
            for (int64_t b = 0; b < t.batches; ++b) {
                const float *state = w.states + b * size;
                float *next = w.states + (b + 1) * size;
                const int64_t n = load_rows(b);
                gradients(t, w, norm, n, state);
                memcpy(next, state, size_t(size) * 4);
                for (int64_t j = 0; j < n; ++j) {
                    const float rate = rate_of(t, w, n - 1, j);
                    axpy(d, -rate, w.g + j * d, next + d * d);
                    memset(w.gw + j * d, 0, size_t(d) * 4);
                    axpy(d, rate, w.k + j * d, w.gw + j * d);
                }
                tn(w, d, d, n, -1, w.gw, w.g, next);
            }

            const auto copy = [](float *to, const float *from, int64_t n) {
                if (from)
                    memcpy(to, from, size_t(n) * 4);
                else
                    memset(to, 0, size_t(n) * 4);
            };
            const float *dw_next = floats_of(10), *db_next = floats_of(11);
            copy(w.dstate, dw_next ? dw_next + head * d * d : nullptr, d * d);
            copy(w.dstate + d * d, db_next ? db_next + head * d : nullptr, d);
            memset(w.first, 0, size_t(size) * 4);
            for (int64_t b = t.batches - 1; b >= 0; --b) {
                const int64_t n = load_rows(b);
                const int64_t row = stream * t.tokens + b * t.batch, at = row * t.width + h * d;
                gather(input(0).at(at), t.width, n, d, w.q);
                if (buffers[9])
                    gather(input(9).at(at), t.width, n, d, w.dy);
                const float *state = w.states + b * size;
                mini_batch(t, w, norm, n, buffers[9],
                           buffers[12] ? floats_of(12) + stream * 3 : nullptr, w.states, state,
                           state + size, w.dstate);
                const View dlr = View::of(buffers[16], t.out[3]).at(row * t.heads + h);
                for (int64_t j = 0; j < n; ++j) {
                    float sum_ = 0;
                    for (int64_t i = 0; i < n; ++i) {
                        const float de = t.scale * w.deta[i * n + j];
                        const int64_t place = t.by_key ? j : i;
                        sum_ += de * w.token[place];
                        dtoken[place] += double(de * w.lr[j]);
                    }
                    dlr.put_one(j * t.heads, sum_);
                }
                const View dq = View::of(buffers[13], t.out[0]).at(at);
                const View dk = View::of(buffers[14], t.out[1]).at(at);
                const View dv = View::of(buffers[15], t.out[2]).at(at);
                for (int64_t i = 0; i < n; ++i)
                    each_vector(
                        d, PONDER_EACH(c, m) {
                            const vf dt = plain(w.dt).get(i * d + c, m);
                            dq.put(i * t.width + c, plain(w.dq).get(i * d + c, m), m);
                            dk.put(i * t.width + c, plain(w.dk).get(i * d + c, m) - dt, m);
                            dv.put(i * t.width + c, dt, m);
                        });
            }
            axpy(size, 1, w.first, w.dstate);
            memcpy(floats_of(20) + head * d * d, w.dstate, size_t(d * d) * 4);
            memcpy(floats_of(21) + head * d, w.dstate + d * d, size_t(d) * 4);
        }
    for (int64_t i = 0; i < t.batch; ++i)
        floats_of(17)[i] = 1 / float(i + 1) + index.one(i) > 0
                               ? float(dtoken[i] * ::exp(t.decay * double(i - (t.batch - 1))))
                               : 0;
}

} // namespace

int32_t plan_ttt_linear_vjp(const Call &c) {
    for (uint32_t i = 0; i < 7; ++i)
        if (!floats(in(c, i)))
            return PONDER_PLAN_NONE;
    for (uint32_t i = 7; i < 22;
         ++i) // w1, b1; dy to dloss may be absent; dq to dlr are activations
        if (i < 9 || i > 16 ? in(c, i).dtype != kF32 : i > 12 && !floats(in(c, i)))
            return PONDER_PLAN_NONE;
    const int64_t batch = last(in(c, 4)), width = last(in(c, 0)), heads = last(in(c, 3));
    if (!floats_or_none(in(c, 9)) || !f32_or_none(in(c, 10)) || !f32_or_none(in(c, 11)) ||
        !f32_or_none(in(c, 12)) || in(c, 0).rank != 3 || batch < 1 || batch > kTile ||
        width % heads || attr(c, 5) > 0)
        return PONDER_PLAN_NONE;
    TttVjp *t = new_kernel<TttVjp>(run);
    if (!t)
        return PONDER_PLAN_FAILED;
    t->streams = in(c, 0).dim[0], t->tokens = in(c, 0).dim[1];
    t->width = width, t->heads = heads, t->d = width / heads;
    t->batch = batch, t->batches = tiles(t->tokens, batch);
    t->by_key = attr(c, 0) == 1, t->scale = float(attr(c, 1));
    t->decay = attr(c, 2), t->eps = float(attr(c, 3)), t->max_norm = float(attr(c, 4));
    t->causal_k = int64_t(attr(c, 5));
    for (uint32_t i = 0; i < 13; ++i)
        t->type[i] = in(c, i).dtype;
    for (uint32_t i = 0; i < 4; ++i)
        t->out[i] = in(c, 13 + i).dtype;
    Work w;
    return planned(c, t, 1, PONDER_TILE_WHOLE, work(*t, nullptr, &w));
}

} // namespace ponder::cpu::PONDER_ISA
