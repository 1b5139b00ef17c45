// ttt_mlp: the fast weights of each head are an MLP, D -> 4D -> D, with one step a mini-batch.
//   z1 = k W1 + b1, x2 = gelu(z1), z2 = x2 W2 + b2
//   g2 = gradient of 0.5 |LN(z2) - (v - k)|^2, g1 = (g2 W2^T) gelu'(z1)
//   x2' = gelu(dual form of layer 1 for q), y = q + LN(dual form of layer 2 for x2')
// Sun et al. 2024, arXiv 2407.04620 (ttt-lm-pytorch).
#include "backend/reference/ttt.hpp"

namespace ponder::reference {
namespace {

template <class T> void ttt_mlp(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'], heads = args['H'];
    const int64_t d = args['D'], f = 4 * d, m = args['M'], batches = (tokens + m - 1) / m;
    const T scale = T(args.attr(0));
    const double eps = args.attr(1);
    const T *q_all = args.in(0), *k_all = args.in(1), *v_all = args.in(2), *lr_all = args.in(3);
    const T *g = args.in(5), *beta = args.in(6);
    const T *w1_first = args.in(7), *b1_first = args.in(8);
    const T *w2_first = args.in(9), *b2_first = args.in(10);
    T *y = args.out(0), *loss = args.out(5);
    T *w1_out = args.out(1), *b1_out = args.out(2), *w2_out = args.out(3), *b2_out = args.out(4);
    std::copy_n(w1_first, streams * heads * d * f, w1_out);
    std::copy_n(b1_first, streams * heads * f, b1_out);
    std::copy_n(w2_first, streams * heads * f * d, w2_out);
    std::copy_n(b2_first, streams * heads * d, b2_out);

    T *token = args.scratch(m), *lr = args.scratch(m), *eta = args.scratch(m * m);
    T *q = args.scratch(m * d), *k = args.scratch(m * d), *target = args.scratch(m * d);
    T *z1 = args.scratch(m * f), *x2 = args.scratch(m * f), *z2 = args.scratch(m * d);
    T *g1 = args.scratch(m * f), *g2 = args.scratch(m * d), *hidden = args.scratch(m * f);
    token_rates(m, args.in(4), 0.0, token);

    // Squared error of one row of keys under the given weights.
    const auto error = [&](const HeadNorm<T> &norm, const T *key, const T *goal, const T *w1,
                           const T *b1, const T *w2, const T *b2) {
        affine(1, d, f, key, w1, b1, hidden);
        std::transform(hidden, hidden + f, hidden, gelu_of<T>);
        affine(1, f, d, hidden, w2, b2, z2);
        return norm.error(z2, goal);
    };
    for (int64_t s = 0; s < streams; ++s) {
        double initial = 0, before = 0, after = 0;
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t head = s * heads + h;
            const HeadNorm<T> norm{g + h * d, beta + h * d, d, eps};
            T *w1 = w1_out + head * d * f, *b1 = b1_out + head * f;
            T *w2 = w2_out + head * f * d, *b2 = b2_out + head * d;
            for (int64_t first = 0; first < tokens; first += m) {
                const int64_t n = std::min(m, tokens - first), last = (n - 1) * d;
                const int64_t at = (s * tokens + first) * width + h * d;
                gather(n, d, q_all + at, width, q);
                gather(n, d, k_all + at, width, k);
                gather(n, d, v_all + at, width, target);
                axpy(n * d, T(-1), k, target);
                gather(n, 1, lr_all + (s * tokens + first) * heads + h, heads, lr);
                learning_rates(n, token, lr, scale, false, eta);

                affine(n, d, f, k, w1, b1, z1);
                std::transform(z1, z1 + n * f, x2, gelu_of<T>);
                affine(n, f, d, x2, w2, b2, z2);
                before += norm.error(z2 + last, target + last);
                norm.loss_gradient(n, z2, target, g2);
                std::fill_n(g1, n * f, T(0));
                product_nt(n, f, d, g2, w2, g1);
                for (int64_t i = 0; i < n * f; ++i)
                    g1[i] *= gelu_slope(z1[i]);

                dual_form(n, d, f, q, k, g1, eta, 0, w1, b1, hidden);
                std::transform(hidden, hidden + n * f, hidden, gelu_of<T>);
                dual_form(n, f, d, hidden, x2, g2, eta, 0, w2, b2, z2);
                norm.forward(n, z2, z2);
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t j = 0; j < d; ++j)
                        y[at + i * width + j] = q[i * d + j] + z2[i * d + j];

                take_step(n, d, f, k, g1, eta, w1, b1);
                take_step(n, f, d, x2, g2, eta, w2, b2);
                initial += error(norm, k + last, target + last, w1_first + head * d * f,
                                 b1_first + head * f, w2_first + head * f * d, b2_first + head * d);
                after += error(norm, k + last, target + last, w1, b1, w2, b2);
            }
        }
        const double count = double(heads * batches);
        loss[s * 3] = T(initial / count);
        loss[s * 3 + 1] = T(before / count);
        loss[s * 3 + 2] = T(after / count);
    }
}

} // namespace

const Op ttt_mlp_op = {
    "ttt_mlp",
    "q[S,T,C] k[S,T,C] v[S,T,C] lr[S,T,H] index[M] g[H,D] b[H,D] "
    "w1:w[S,H,D,4D] b1:w[S,H,4D] w2:w[S,H,4D,D] b2:w[S,H,D] -> "
    "y[S,T,C] w1:w[S,H,D,4D] b1:w[S,H,4D] w2:w[S,H,4D,D] b2:w[S,H,D] loss:w[S,3]",
    2,
    ttt_mlp<float>,
    ttt_mlp<double>,
    check_ttt_mlp};

} // namespace ponder::reference
