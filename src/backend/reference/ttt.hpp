// What the TTT scans share. One head, one mini-batch of n tokens, head width d:
//
//   reconstruction loss  0.5 |LN(z) - (v - k)|^2 of z, the inner model's output for k
//   rates                eta[i,j] of key j as seen by query i; the state takes the last row
//   dual form            a step after every token, without a state for every token:
//                        z_i = q_i W + b - sum_{j <= i} eta[i,j] (q_i x_j + 1) g_j
//
// Sun et al. 2024, arXiv 2407.04620, section 2.5 and appendix A.
#pragma once

#include "backend/reference/kernel.hpp"

namespace ponder::reference {

// LN(z) for n rows, and with `target` the gradient of 0.5 |LN(z) - target|^2 in z.
template <class T> struct HeadNorm {
    const T *g, *b; // [D]
    int64_t d;
    double eps;

    void forward(const T *z, T *y, T *normed, T *inverse_std) const {
        double mean = 0, variance = 0;
        for (int64_t j = 0; j < d; ++j)
            mean += z[j];
        mean /= double(d);
        for (int64_t j = 0; j < d; ++j)
            variance += (z[j] - mean) * (z[j] - mean);
        *inverse_std = T(1 / std::sqrt(variance / double(d) + eps));
        for (int64_t j = 0; j < d; ++j) {
            normed[j] = (z[j] - T(mean)) * *inverse_std;
            y[j] = g[j] * normed[j] + b[j];
        }
    }
    // y[n,d] = LN(z)
    void forward(int64_t n, const T *z, T *y) const {
        std::vector<T> normed(static_cast<size_t>(d));
        T inverse_std;
        for (int64_t i = 0; i < n; ++i)
            forward(z + i * d, y + i * d, normed.data(), &inverse_std);
    }
    // r = LN(z) - target, u = g r, dz = (u - mean(u) - h mean(u h)) / std
    void loss_gradient(int64_t n, const T *z, const T *target, T *dz) const {
        std::vector<T> y(static_cast<size_t>(d)), h(static_cast<size_t>(d));
        T inverse_std;
        for (int64_t i = 0; i < n; ++i, z += d, target += d, dz += d) {
            forward(z, y.data(), h.data(), &inverse_std);
            double mean_u = 0, mean_uh = 0;
            for (int64_t j = 0; j < d; ++j) {
                dz[j] = g[j] * (y[size_t(j)] - target[j]);
                mean_u += dz[j];
                mean_uh += double(dz[j]) * h[size_t(j)];
            }
            mean_u /= double(d);
            mean_uh /= double(d);
            for (int64_t j = 0; j < d; ++j)
                dz[j] = (dz[j] - T(mean_u) - h[size_t(j)] * T(mean_uh)) * inverse_std;
        }
    }
    // mean over d of (LN(z) - target)^2 for one row
    double error(const T *z, const T *target) const {
        std::vector<T> y(static_cast<size_t>(d));
        forward(1, z, y.data());
        double sum = 0;
        for (int64_t j = 0; j < d; ++j) {
            const double r = double(y[size_t(j)]) - double(target[j]);
            sum += r * r;
        }
        return sum / double(d);
    }
};

// token_i = max(0, 1/(i+1) + index_i) exp(decay (i - (M-1)))
template <class T> void token_rates(int64_t m, const T *index, double decay, T *rate) {
    for (int64_t i = 0; i < m; ++i)
        rate[i] =
            std::max(T(0), 1 / T(i + 1) + index[i]) * T(std::exp(decay * double(i - (m - 1))));
}

// eta[n,n]: scale token_i lr_j where the rate follows the query's place in the mini-batch
// (official), scale token_j lr_j where it follows the key's (PonderTTT).
template <class T>
void learning_rates(int64_t n, const T *token, const T *lr, T scale, bool by_key, T *eta) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j)
            eta[i * n + j] = scale * token[by_key ? j : i] * lr[j];
}

// z[n,out] = x W + b for x[n,in], W[in,out]
template <class T>
void affine(int64_t n, int64_t in, int64_t out, const T *x, const T *w, const T *b, T *z) {
    for (int64_t i = 0; i < n; ++i)
        std::copy_n(b, out, z + i * out);
    product(n, out, in, x, w, z);
}

// z_i = q_i W + b - sum_{j <= i + causal_k} eta[i,j] (q_i x_j + 1) g_j
template <class T>
void dual_form(int64_t n, int64_t in, int64_t out, const T *q, const T *x, const T *g, const T *eta,
               int64_t causal_k, const T *w, const T *b, T *z) {
    affine(n, in, out, q, w, b, z);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i + causal_k; ++j)
            axpy(out, -eta[i * n + j] * (dot(in, q + i * in, x + j * in) + 1), g + j * out,
                 z + i * out);
}

// W -= (eta x)^T g, b -= eta^T g for the last row of eta
template <class T>
void take_step(int64_t n, int64_t in, int64_t out, const T *x, const T *g, const T *eta, T *w,
               T *b) {
    const T *last = eta + (n - 1) * n;
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < in; ++i)
            axpy(out, -last[j] * x[j * in + i], g + j * out, w + i * out);
        axpy(out, -last[j], g + j * out, b);
    }
}

// Rows [n, d] of one head out of rows `stride` apart
template <class T> void gather(int64_t n, int64_t d, const T *from, int64_t stride, T *to) {
    for (int64_t i = 0; i < n; ++i)
        std::copy_n(from + i * stride, d, to + i * d);
}

// What signatures cannot say of the ops and their vjp.
inline const char *check_ttt_mlp(const Sizes &sizes, const double *) {
    return sizes['C'] == sizes['H'] * sizes['D'] ? nullptr : "C must be H x D";
}
inline const char *check_ttt_linear(const Sizes &sizes, const double *attr) {
    if (const char *wrong = check_ttt_mlp(sizes, attr))
        return wrong;
    if (attr[0] != 0 && attr[0] != 1)
        return "form must be 0 or 1";
    return attr[5] <= 0 ? nullptr : "causal_k above 0 would read later tokens";
}

} // namespace ponder::reference
