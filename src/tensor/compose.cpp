// Fused ops as compositions of primitives: what a recording holds where gradients of gradients are
// wanted, and what every fused kernel is tested against.
#include "tensor/compose.hpp"

#include <cmath>

namespace ponder::compose {

namespace {

// (x - mean) / sqrt(var + eps) over the last dim, and 1 / sqrt(var + eps).
struct Normed {
    Id h, inverse_std;
};
Normed normalise(Graph &g, Id x, double eps) {
    const Shape &s = g.shape(x);
    const double each = 1 / double(s[s.rank - 1]);
    const Id centred = sub(g, x, affine(g, sum_last(g, x), each, 0));
    const Id variance = affine(g, sum_last(g, mul(g, centred, centred)), each, eps);
    const Id inverse_std = power(g, variance, -0.5);
    return {mul(g, centred, inverse_std), inverse_std};
}

Id scaled(Graph &g, Id h, Id scale, Id shift) { return add(g, mul(g, h, scale), shift, g.wide); }

} // namespace

Id layer_norm(Graph &g, Id x, Id scale, Id shift, double eps) {
    return scaled(g, normalise(g, x, eps).h, scale, shift);
}

Id lora_linear(Graph &g, Id x, Id w, Id b, Id a, Id bb, Id residual, double scale) {
    Id low = matmul(g, matmul(g, x, a, false, false), bb, false, false);
    if (scale != 1)
        low = affine(g, low, scale, 0);
    return add(g, linear(g, x, w, b, residual, false, g.wide), low, g.wide);
}

// softmax(q k^T / sqrt(D)) v under a causal mask; its weights may be dropped out
Id attention(Graph &g, Id qkv, int64_t heads, double drop, int64_t salt) {
    const Id wide = converted(g, qkv, g.wide);
    const Id q = split_heads(g, wide, heads, 0, 3), k = split_heads(g, wide, heads, 1, 3),
             v = split_heads(g, wide, heads, 2, 3);
    const double scale = 1 / std::sqrt(double(g.shape(q)[3]));
    const Id p =
        dropout(g, softmax(g, affine(g, matmul(g, q, k, false, true), scale, 0), true), drop, salt);
    return converted(g, merge_heads(g, matmul(g, p, v, false, false), 0, 1), g.act);
}

// -log softmax(h table^T)[target], 0 where the target is -1
Id cross_entropy(Graph &g, Id h, Id table, Id target) {
    const Shape s = g.shape(h);
    const Id logits = linear(g, h, table, none, none, true, g.wide);
    const Id log_p = pick(g, sub(g, logits, log_sum_exp(g, logits)), target);
    return reshape(g, affine(g, log_p, -1, 0), {s[0], s[1]});
}

// y_t = b + sum_j w_j x_{t-3-shift+j}
Id conv1d(Graph &g, Id x, Id w, Id b, int64_t shift) {
    const int64_t tokens = g.shape(x)[1];
    Id y = broadcast(g, b, g.shape(x));
    for (int64_t j = 0; j < 4; ++j) {
        const int64_t back = 3 + shift - j;
        if (back >= tokens)
            continue;
        const Id moved =
            back == 0 ? x : pad_rows(g, slice_rows(g, x, 0, tokens - back), back, tokens);
        const Id tap = slice_rows(g, w, j, 1);
        y = add(g, y, mul(g, moved, tap), g.wide);
    }
    return y;
}

namespace {

// One head norm, applied to [S,H,n,D] with its parameters as [1,H,1,D].
struct HeadNorm {
    Graph &g;
    Id scale, shift;
    double eps;

    Id forward(Id z) const { return scaled(g, normalise(g, z, eps).h, scale, shift); }
    // of 0.5 |LN(z) - target|^2: u = scale (LN(z) - target), (u - mean(u) - h mean(u h)) / std
    Id loss_gradient(Id z, Id target) const {
        const Normed n = normalise(g, z, eps);
        const Id u = mul(g, sub(g, scaled(g, n.h, scale, shift), target), scale);
        const Shape &s = g.shape(z);
        const double each = 1 / double(s[s.rank - 1]);
        const Id mean_u = affine(g, sum_last(g, u), each, 0);
        const Id mean_uh = affine(g, sum_last(g, mul(g, u, n.h)), each, 0);
        return mul(g, sub(g, sub(g, u, mean_u), mul(g, n.h, mean_uh)), n.inverse_std);
    }
    // squared error, summed over heads and width: [S,1,1,1]
    Id error(Id z, Id target) const {
        const Id r = sub(g, forward(z), target);
        const Id sum = sum_last(g, mul(g, r, r));
        return sum_to(g, sum, {g.shape(z)[0], 1, 1, 1});
    }
};

// The inner model: one affine layer, or two with a GELU between them.
struct Layer {
    Id w, b; // [S,H,in,out], [S,H,1,out]
};
using Layers = std::vector<Layer>;

Id apply(Graph &g, Id x, const Layer &l) {
    return add(g, matmul(g, x, l.w, false, false), l.b, g.wide);
}

Id apply(Graph &g, Id x, const Layers &layers) {
    for (size_t i = 0; i < layers.size(); ++i)
        x = apply(g, i == 0 ? x : ponder::gelu(g, x), layers[i]);
    return x;
}

// z_i = q_i W + b - sum_j rates[i,j] (q_i x_j + 1) grad_j
Id dual_form(Graph &g, Id q, Id x, Id grad, Id rates, const Layer &l) {
    const Id scores = mul(g, affine(g, matmul(g, q, x, false, true), 1, 1), rates);
    return sub(g, apply(g, q, l), matmul(g, scores, grad, false, false));
}

// W -= (last x)^T grad, b -= last^T grad; last [S,H,n,1]
Layer take_step(Graph &g, Id x, Id grad, Id last, const Layer &l) {
    const Id weighted = mul(g, grad, last);
    return {sub(g, l.w, matmul(g, x, weighted, true, false)),
            sub(g, l.b, sum_to(g, weighted, g.shape(l.b)))};
}

// grad scaled to a norm of at most `limit` in each head: min(1, c) = 1 - relu(1 - c)
Id scale_to_norm(Graph &g, Id grad, double limit) {
    const Shape &s = g.shape(grad);
    const Id square = sum_to(g, mul(g, grad, grad), {s[0], s[1], 1, 1});
    const Id c = affine(g, power(g, affine(g, power(g, square, 0.5), 1, 1e-6), -1), limit, 0);
    return mul(g, grad, affine(g, relu(g, affine(g, c, -1, 1)), -1, 1));
}

} // namespace

TttResult ttt_scan(Graph &g, Id q, Id k, Id v, Id lr, Id index, Id scale, Id shift,
                   const std::vector<Id> &state, const TttScan &form) {
    const Shape s = g.shape(q), first_w = g.shape(state[0]);
    const int64_t tokens = s[1], heads = first_w[1], d = first_w[2], m = g.shape(index)[0];
    const Id qh = split_heads(g, q, heads, 0, 1), kh = split_heads(g, k, heads, 0, 1),
             vh = split_heads(g, v, heads, 0, 1), lr_h = split_heads(g, lr, heads, 0, 1);
    const HeadNorm norm{g, reshape(g, scale, {1, heads, 1, d}), reshape(g, shift, {1, heads, 1, d}),
                        form.eps};
    // token_i = max(0, 1/(i+1) + index_i) exp(decay (i - (M-1)))
    std::vector<double> harmonic, fade;
    for (int64_t i = 0; i < m; ++i) {
        harmonic.push_back(1 / double(i + 1));
        fade.push_back(std::exp(form.decay * double(i - (m - 1))));
    }
    const Id token = reshape(
        g, mul(g, relu(g, add(g, index, g.literal({m}, harmonic), g.wide)), g.literal({m}, fade)),
        {1, 1, m, 1});

    Layers initial;
    for (size_t i = 0; i < state.size(); i += 2) {
        const Shape b = g.shape(state[i + 1]);
        initial.push_back({state[i], reshape(g, state[i + 1], {b[0], b[1], 1, b[2]})});
    }
    Layers now = initial;
    Id y = none, loss[3] = {none, none, none};
    const int64_t batches = (tokens + m - 1) / m;
    for (int64_t first = 0; first < tokens; first += m) {
        const int64_t n = std::min(m, tokens - first);
        const auto part = [&](Id x) { return slice_rows(g, x, first, n); };
        const Id qb = part(qh), kb = part(kh), target = sub(g, part(vh), kb), lr_b = part(lr_h);
        const Id token_b = n == m ? token : slice_rows(g, token, 0, n);
        const auto across = [&](Id column) { // [..,n,1] -> [..,1,n]
            const Shape c = g.shape(column);
            return reshape(g, column, {c[0], c[1], 1, n});
        };
        // What the state takes: the last row of the rates. [S,H,n,1]
        const Id token_s = form.ponder ? token_b : slice_rows(g, token_b, n - 1, 1);
        const Id last = affine(g, mul(g, lr_b, token_s), form.scale, 0);
        // Row i, column j, under the mask j <= i + causal_k.
        std::vector<double> mask(size_t(n * n));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j <= i + form.causal_k && j < n; ++j)
                mask[size_t(i * n + j)] = form.scale;
        const Id keys = form.ponder ? across(mul(g, lr_b, token_b)) : across(lr_b);
        Id rates = mul(g, keys, g.literal({n, n}, mask));
        if (!form.ponder)
            rates = mul(g, rates, token_b);

        // Forward and backward through the inner model.
        const Id z1 = apply(g, kb, now[0]);
        const Id x2 = form.mlp ? gelu(g, z1) : none;
        const Id z = form.mlp ? apply(g, x2, now[1]) : z1;
        Id grad = norm.loss_gradient(z, target);
        if (form.max_grad_norm > 0)
            grad = scale_to_norm(g, grad, form.max_grad_norm);
        const Id grad1 =
            form.mlp ? mul(g, matmul(g, grad, now[1].w, false, true), gelu_derivative(g, z1, 1))
                     : grad;
        Id out = dual_form(g, qb, kb, grad1, rates, now[0]);
        if (form.mlp)
            out = dual_form(g, gelu(g, out), x2, grad, rates, now[1]);
        const Id y_b = add(g, qb, norm.forward(out), g.wide);
        const Id placed = tokens == n ? y_b : pad_rows(g, y_b, first, tokens);
        y = y == none ? placed : add(g, y, placed, g.wide);

        const Layers before = now;
        now[0] = take_step(g, kb, grad1, last, now[0]);
        if (form.mlp)
            now[1] = take_step(g, x2, grad, last, now[1]);
        const Id key = slice_rows(g, kb, n - 1, 1), goal = slice_rows(g, target, n - 1, 1);
        const Layers *const under[3] = {&initial, &before, &now};
        for (int i = 0; i < 3; ++i) {
            const Id error = norm.error(apply(g, key, *under[i]), goal);
            loss[i] = loss[i] == none ? error : add(g, loss[i], error, g.wide);
        }
    }

    TttResult r{merge_heads(g, y, 0, 1), none, {}};
    for (size_t i = 0; i < now.size(); ++i) {
        r.state.push_back(now[i].w);
        r.state.push_back(reshape(g, now[i].b, g.shape(state[2 * i + 1])));
    }
    Id all = none;
    for (int i = 0; i < 3; ++i) {
        std::vector<double> place(3);
        place[size_t(i)] = 1 / double(heads * batches * d);
        const Id part = mul(g, reshape(g, loss[i], {s[0], 1}), g.literal({3}, place));
        all = all == none ? part : add(g, all, part, g.wide);
    }
    r.loss = all;
    return r;
}

} // namespace ponder::compose
