// ttt_linear: fast weights W[D,D], b[D] of each head take one gradient step a mini-batch.
//   z = k W + b, gz = gradient of 0.5 |LN(z) - (v - k)|^2, scaled to at most max_grad_norm
//   y = q + LN(dual form of q), then W and b take the step of the last row of eta
// Form 0: Sun et al. 2024, arXiv 2407.04620 (ttt-lm-pytorch). Form 1: PonderTTT, whose rates follow
// the key alone; it also uses decay, max_grad_norm and causal_k, which work in both forms.
#include "backend/reference/ttt.hpp"

namespace ponder::reference {
namespace {

template <class T> void scale_to_norm(int64_t n, T *g, double limit) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i)
        sum += double(g[i]) * g[i];
    const T factor = T(std::min(1.0, limit / (std::sqrt(sum) + 1e-6)));
    for (int64_t i = 0; i < n; ++i)
        g[i] *= factor;
}

template <class T> void ttt_linear(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'], heads = args['H'];
    const int64_t d = args['D'], m = args['M'], batches = (tokens + m - 1) / m;
    const bool by_key = args.attr_int(0) == 1;
    const double decay = args.attr(2), eps = args.attr(3), max_norm = args.attr(4);
    const int64_t causal_k = args.attr_int(5);
    const T scale = T(args.attr(1));
    const T *q_all = args.in(0), *k_all = args.in(1), *v_all = args.in(2), *lr_all = args.in(3);
    const T *g = args.in(5), *beta = args.in(6), *w_first = args.in(7), *b_first = args.in(8);
    T *y = args.out(0), *w_out = args.out(1), *b_out = args.out(2), *loss = args.out(3);
    std::copy_n(w_first, streams * heads * d * d, w_out);
    std::copy_n(b_first, streams * heads * d, b_out);

    T *token = args.scratch(m), *lr = args.scratch(m), *eta = args.scratch(m * m);
    T *q = args.scratch(m * d), *k = args.scratch(m * d), *target = args.scratch(m * d);
    T *z = args.scratch(m * d), *gz = args.scratch(m * d);
    token_rates(m, args.in(4), decay, token);
    for (int64_t s = 0; s < streams; ++s) {
        double initial = 0, before = 0, after = 0;
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t head = s * heads + h;
            const HeadNorm<T> norm{g + h * d, beta + h * d, d, eps};
            const T *w0 = w_first + head * d * d, *b0 = b_first + head * d;
            T *w = w_out + head * d * d, *b = b_out + head * d;
            for (int64_t first = 0; first < tokens; first += m) {
                const int64_t n = std::min(m, tokens - first), last = (n - 1) * d;
                const int64_t at = (s * tokens + first) * width + h * d;
                gather(n, d, q_all + at, width, q);
                gather(n, d, k_all + at, width, k);
                gather(n, d, v_all + at, width, target);
                axpy(n * d, T(-1), k, target);
                gather(n, 1, lr_all + (s * tokens + first) * heads + h, heads, lr);
                learning_rates(n, token, lr, scale, by_key, eta);

                affine(n, d, d, k, w, b, z);
                before += norm.error(z + last, target + last);
                norm.loss_gradient(n, z, target, gz);
                if (max_norm > 0)
                    scale_to_norm(n * d, gz, max_norm);

                dual_form(n, d, d, q, k, gz, eta, causal_k, w, b, z);
                norm.forward(n, z, z);
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t j = 0; j < d; ++j)
                        y[at + i * width + j] = q[i * d + j] + z[i * d + j];

                take_step(n, d, d, k, gz, eta, w, b);
                affine(1, d, d, k + last, w0, b0, z);
                initial += norm.error(z, target + last);
                affine(1, d, d, k + last, w, b, z);
                after += norm.error(z, target + last);
            }
        }
        const double count = double(heads * batches);
        loss[s * 3] = T(initial / count);
        loss[s * 3 + 1] = T(before / count);
        loss[s * 3 + 2] = T(after / count);
    }
}

} // namespace

const Op ttt_linear_op = {
    "ttt_linear",
    "q[S,T,C] k[S,T,C] v[S,T,C] lr[S,T,H] index[M] g[H,D] b[H,D] w1:w[S,H,D,D] b1:w[S,H,D] -> "
    "y[S,T,C] w1:w[S,H,D,D] b1:w[S,H,D] loss:w[S,3]",
    6,
    ttt_linear<float>,
    ttt_linear<double>,
    check_ttt_linear};

} // namespace ponder::reference
