// ttt_linear: fast weights W[D,D], b[D] of each head take one gradient step a mini-batch.
//     z = k W + b, gz = gradient of 0.5 |LN(z) - (v - k)|^2, scaled to at most max_grad_norm
//     y = q + LN(q W + b - (eta o tril(q k^T + 1)) gz)      the dual form
//     W -= (eta_last o k)^T gz,  b -= eta_last gz           Sun et al. 2024, arXiv 2407.04620
// Forms differ in eta only: it follows the query's place in the mini-batch (official) or the key's
// (PonderTTT). A task is a stream: the losses are sums over its heads. The state of a head stays in
// the first-level cache; the dual form is one product of two parts.
#include "gemm.hpp"
#include "ops.hpp"
#include "ttt.hpp"

#include <math.h>

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Ttt : Kernel {
    int64_t tokens, width, heads, d, batch, causal_k;
    bool by_key;
    float scale, eps, max_norm;
    double decay;
    int32_t q, k, v, lr, index, g, b, y;
};

struct Work {
    uint32_t *q_left, *k_left, *mix_left; // rows layout: q, k [M, D], coefficients [M, M]
    uint32_t *k_columns;                  // columns layout: rated keys, transposed
    uint32_t *k_right, *g_right, *w_right;
    float *q, *k, *target, *z, *gz, *qk; // [M, D], the last [M, M]
    float *token, *eta;                  // [M]: what eta takes from the place and from lr
};

size_t work(const Ttt &t, void *workspace, Work *w) {
    const int64_t m = t.batch, d = t.d;
    Carver c{static_cast<char *>(workspace)};
    w->q_left = c.take<uint32_t>(a_rows_units(d));
    w->k_left = c.take<uint32_t>(a_rows_units(d));
    w->mix_left = c.take<uint32_t>(a_rows_units(m));
    w->k_columns = c.take<uint32_t>(size_t(m * tiles(d, kTile) * kStride + 16));
    w->k_right = c.take<uint32_t>(b_units(d, m));
    w->g_right = c.take<uint32_t>(b_units(m, d));
    w->w_right = c.take<uint32_t>(b_units(d, d));
    float **const rows[] = {&w->q, &w->k, &w->target, &w->z, &w->gz};
    for (float **p : rows)
        *p = c.take<float>(size_t(m * d));
    w->qk = c.take<float>(size_t(m * m));
    w->token = c.take<float>(size_t(m));
    w->eta = c.take<float>(size_t(m));
    return size_t(c.at - static_cast<char *>(workspace));
}

// The right operand x[n, D]: where it stands, or packed.
Part right(const uint32_t *left, uint32_t *packed, const float *x, int64_t n, int64_t d) {
    if (d % kPanel == 0)
        return direct_part(left, x, n, d);
    pack_b(packed, plain(x), d, 1, n, d, false);
    return packed_part(left, packed, n);
}

struct Losses {
    double initial = 0, before = 0, after = 0;
};

// n rows of a head into x[n, D] and, where asked, into the rows layout.
void gather(View from, int64_t step, int64_t n, int64_t d, float *x, uint32_t *left) {
    for (int64_t i = 0; i < n; ++i)
        each_vector(
            d, PONDER_EACH(c, w) { plain(x + i * d).put(c, from.get(i * step + c, w), w); });
    if (left)
        pack_a(left, plain(x), d, n, d, false);
}

// state += (-rate k)^T gz by 64 rows of the state, bias += -rate gz; `gz` is the right operand.
void take_step(const Ttt &t, const Work &w, int64_t n, const Part &gz, float *state, float *bias) {
    const int64_t d = t.d;
    Product step;
    step.columns = true, step.accumulate = true;
    step.y_row = d;
    step.part[0] = gz;
    for (int64_t j = 0; j < n; ++j) {
        const float rate = -t.scale * w.token[t.by_key ? j : n - 1] * w.eta[j];
        for (int64_t i = 0; i < d; i += kTile) {
            const View to =
                plain(reinterpret_cast<float *>(w.k_columns) + (i / kTile * t.batch + j) * kStride);
            each_vector(
                smaller(kTile, d - i),
                PONDER_EACH(c, m) { to.put(c, plain(w.k).get(j * d + i + c, m) * set(rate), m); });
        }
        each_vector(
            d, PONDER_EACH(c, m) {
                const vf v = fma(plain(w.gz).get(j * d + c, m), set(rate), plain(bias).get(c, m));
                plain(bias).put(c, v, m);
            });
    }
    for (int64_t i = 0; i < d; i += kTile) {
        step.part[0].a = w.k_columns + i / kTile * t.batch * kStride;
        step.y = plain(state + i * d);
        product(step, smaller(kTile, d - i), d);
    }
}

// One mini-batch of one head; state[D, D] and bias[D] take the step.
void mini_batch(const Ttt &t, const Work &w, int64_t n, View g, View b, const float *first_state,
                const float *first_bias, float *state, float *bias, View y, Losses &losses) {
    const int64_t d = t.d, last = n - 1;
    Product into_z;
    into_z.part[0] = right(w.k_left, w.w_right, state, d, d);
    into_z.bias = plain(bias);
    into_z.y = plain(w.z), into_z.y_row = d;
    product(into_z, n, d);
    losses.before += error(w.z + last * d, w.target + last * d, g, b, d, t.eps);
    double squares = 0;
    for (int64_t i = 0; i < n; ++i)
        squares +=
            double(loss_gradient(w.z + i * d, w.target + i * d, w.gz + i * d, g, b, d, t.eps));
    if (t.max_norm > 0) {
        const double f = double(t.max_norm) / (__builtin_sqrt(squares) + 1e-6);
        const vf factor = set(f < 1 ? float(f) : 1.0f);
        each_vector(
            n * d, PONDER_EACH(i, m) { plain(w.gz).put(i, plain(w.gz).get(i, m) * factor, m); });
    }

    // -eta (q k^T + 1) where the key is not after the query (shifted by causal_k)
    pack_b(w.k_right, plain(w.k), 1, d, d, n, false);
    Product scores;
    scores.part[0] = packed_part(w.q_left, w.k_right, d);
    scores.y = plain(w.qk), scores.y_row = n;
    product(scores, n, n);
    for (int64_t i = 0; i < n; ++i) {
        float *mix = reinterpret_cast<float *>(w.mix_left + i * kStride);
        for (int64_t j = 0; j < n; ++j) {
            const float rate = t.scale * w.token[t.by_key ? j : i] * w.eta[j];
            mix[j] = j <= i + t.causal_k ? -rate * (w.qk[i * n + j] + 1) : 0;
        }
    }
    into_z.part[0].a = w.q_left;
    into_z.part[1] = right(w.mix_left, w.g_right, w.gz, n, d);
    into_z.parts = 2;
    product(into_z, n, d);
    for (int64_t i = 0; i < n; ++i) {
        const float *z = w.z + i * d, *q = w.q + i * d;
        const Norm s = norm_of(z, d, t.eps);
        each_vector(
            d, PONDER_EACH(c, m) {
                const vf h = (plain(z).get(c, m) - set(s.mean)) * set(s.scale);
                y.put(i * t.width + c, fma(h, g.get(c, m), b.get(c, m)) + plain(q).get(c, m), m);
            });
    }

    take_step(t, w, n, into_z.part[1], state, bias);

    // What the first and the new weights make of the last token.
    Product one;
    one.y = plain(w.z), one.y_row = d;
    one.part[0] = right(w.k_left + last * kStride, w.w_right, first_state, d, d);
    one.bias = plain(first_bias);
    product(one, 1, d);
    losses.initial += error(w.z, w.target + last * d, g, b, d, t.eps);
    one.part[0] = right(w.k_left + last * kStride, w.w_right, state, d, d);
    one.bias = plain(bias);
    product(one, 1, d);
    losses.after += error(w.z, w.target + last * d, g, b, d, t.eps);
}

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Ttt &t = *static_cast<const Ttt *>(kernel);
    Work w;
    work(t, workspace, &w);
    const int64_t stream = task, d = t.d;
    const View index = View::of(buffers[4], t.index);
    for (int64_t i = 0; i < t.batch; ++i) {
        const float rate = 1 / float(i + 1) + index.one(i);
        w.token[i] = (rate > 0 ? rate : 0) * float(::exp(t.decay * double(i - (t.batch - 1))));
    }
    Losses losses;
    for (int64_t h = 0; h < t.heads; ++h) {
        const int64_t head = stream * t.heads + h;
        const View g = View::of(buffers[5], t.g).at(h * d), b = View::of(buffers[6], t.b).at(h * d);
        const float *state0 = static_cast<const float *>(buffers[7]) + head * d * d;
        const float *bias0 = static_cast<const float *>(buffers[8]) + head * d;
        float *state = static_cast<float *>(buffers[10]) + head * d * d;
        float *bias = static_cast<float *>(buffers[11]) + head * d;
        memcpy(state, state0, size_t(d * d) * sizeof(float));
        memcpy(bias, bias0, size_t(d) * sizeof(float));
        for (int64_t first = 0; first < t.tokens; first += t.batch) {
            const int64_t n = smaller(t.batch, t.tokens - first);
            const int64_t row = stream * t.tokens + first, at = row * t.width + h * d;
            gather(View::of(buffers[0], t.q).at(at), t.width, n, d, w.q, w.q_left);
            gather(View::of(buffers[1], t.k).at(at), t.width, n, d, w.k, w.k_left);
            gather(View::of(buffers[2], t.v).at(at), t.width, n, d, w.target, nullptr);
            each_vector(
                n * d, PONDER_EACH(i, m) {
                    plain(w.target).put(i, plain(w.target).get(i, m) - plain(w.k).get(i, m), m);
                });
            const View lr = View::of(buffers[3], t.lr).at(row * t.heads + h);
            for (int64_t i = 0; i < n; ++i)
                w.eta[i] = lr.one(i * t.heads);
            mini_batch(t, w, n, g, b, state0, bias0, state, bias, View::of(buffers[9], t.y).at(at),
                       losses);
        }
    }
    const double count_ = double(t.heads * tiles(t.tokens, t.batch));
    float *loss = static_cast<float *>(buffers[12]) + stream * 3;
    loss[0] = float(losses.initial / count_);
    loss[1] = float(losses.before / count_);
    loss[2] = float(losses.after / count_);
}

} // namespace

int32_t plan_ttt_linear(const Call &c) {
    for (uint32_t i = 0; i < 7; ++i)
        if (!floats(in(c, i)))
            return PONDER_PLAN_NONE;
    const int64_t batch = last(in(c, 4)), width = last(in(c, 0)), heads = last(in(c, 3));
    if (in(c, 7).dtype != kF32 || in(c, 8).dtype != kF32 || !floats(out(c, 0)) ||
        out(c, 1).dtype != kF32 || out(c, 2).dtype != kF32 || out(c, 3).dtype != kF32 ||
        in(c, 0).rank != 3 || batch < 1 || batch > kTile || width % heads || attr(c, 5) > 0)
        return PONDER_PLAN_NONE;
    Ttt *t = new_kernel<Ttt>(run);
    if (!t)
        return PONDER_PLAN_FAILED;
    t->tokens = in(c, 0).dim[1], t->width = width, t->heads = heads, t->d = width / heads;
    t->batch = batch, t->by_key = attr(c, 0) == 1, t->scale = float(attr(c, 1));
    t->decay = attr(c, 2), t->eps = float(attr(c, 3)), t->max_norm = float(attr(c, 4));
    t->causal_k = int64_t(attr(c, 5));
    t->q = in(c, 0).dtype, t->k = in(c, 1).dtype, t->v = in(c, 2).dtype, t->lr = in(c, 3).dtype;
    t->index = in(c, 4).dtype, t->g = in(c, 5).dtype, t->b = in(c, 6).dtype, t->y = out(c, 0).dtype;
    Work w;
    return planned(c, t, in(c, 0).dim[0], PONDER_TILE_ANY, work(*t, nullptr, &w));
}

} // namespace ponder::cpu::PONDER_ISA
