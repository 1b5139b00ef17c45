// What gradients of the TTT scans share.
#pragma once

#include "backend/reference/ttt.hpp"

namespace ponder::reference {

// One row of LN backwards. dg and db are added to.
template <class T> struct NormGradient {
    const HeadNorm<T> &norm;
    T *dg, *db; // [D]
    std::vector<T> y, h, u;
    NormGradient(const HeadNorm<T> &norm, T *dg, T *db)
        : norm(norm), dg(dg), db(db), y(size_t(norm.d)), h(size_t(norm.d)), u(size_t(norm.d)) {}

    // dz += (d LN / dz)^T dy
    void output(const T *z, const T *dy, T *dz) {
        T inverse_std;
        norm.forward(z, y.data(), h.data(), &inverse_std);
        normalised(dy, inverse_std, dz);
    }
    // Of weight mean((LN(z) - target)^2).
    void error(const T *z, const T *target, T weight, T *dz, T *dtarget) {
        T inverse_std;
        norm.forward(z, y.data(), h.data(), &inverse_std);
        std::vector<T> dy(y.size());
        for (int64_t j = 0; j < norm.d; ++j) {
            dy[size_t(j)] = 2 * weight / T(norm.d) * (y[size_t(j)] - target[j]);
            dtarget[j] -= dy[size_t(j)];
        }
        normalised(dy.data(), inverse_std, dz);
    }
    // Of p = r (u - mean(u) - h mean(u h)), u = g (g h + b - target): with D = dp and E = r D,
    //   du = E - mean(E) - h mean(E h),  dh = -E mean(u h) - u mean(E h) + g (g du),
    //   dr = D p / r,  dz = r (dh - mean(dh) - h mean(dh h)) - dr r^2 h / d
    void loss_gradient(const T *z, const T *target, const T *dp, T *dz, T *dtarget) {
        const int64_t d = norm.d;
        const T *g = norm.g;
        T r;
        norm.forward(z, y.data(), h.data(), &r);
        double mean_u = 0, mean_uh = 0, mean_e = 0, mean_eh = 0;
        for (int64_t j = 0; j < d; ++j) {
            const size_t i = size_t(j);
            u[i] = g[j] * (y[i] - target[j]);
            mean_u += u[i];
            mean_uh += double(u[i]) * h[i];
            mean_e += r * dp[j];
            mean_eh += double(r * dp[j]) * h[i];
        }
        mean_u /= double(d);
        mean_uh /= double(d);
        mean_e /= double(d);
        mean_eh /= double(d);
        double dr = 0, mean_dh = 0, mean_dhh = 0;
        std::vector<T> dh(y.size());
        for (int64_t j = 0; j < d; ++j) {
            const size_t i = size_t(j);
            const T e = r * dp[j], residual = y[i] - target[j];
            const T du = e - T(mean_e) - h[i] * T(mean_eh);
            dr += double(dp[j]) * (u[i] - T(mean_u) - h[i] * T(mean_uh));
            dg[j] += du * (residual + g[j] * h[i]);
            db[j] += du * g[j];
            dtarget[j] -= du * g[j];
            dh[i] = -e * T(mean_uh) - u[i] * T(mean_eh) + g[j] * g[j] * du;
            mean_dh += dh[i];
            mean_dhh += double(dh[i]) * h[i];
        }
        mean_dh /= double(d);
        mean_dhh = (mean_dhh + dr * r) / double(d);
        for (int64_t j = 0; j < d; ++j)
            dz[j] += r * (dh[size_t(j)] - T(mean_dh) - h[size_t(j)] * T(mean_dhh));
    }

private:
    void normalised(const T *dy, T inverse_std, T *dz) {
        const int64_t d = norm.d;
        double mean_u = 0, mean_uh = 0;
        for (int64_t j = 0; j < d; ++j) {
            const size_t i = size_t(j);
            u[i] = norm.g[j] * dy[j];
            mean_u += u[i];
            mean_uh += double(u[i]) * h[i];
            dg[j] += dy[j] * h[i];
            db[j] += dy[j];
        }
        mean_u /= double(d);
        mean_uh /= double(d);
        for (int64_t j = 0; j < d; ++j)
            dz[j] += inverse_std * (u[size_t(j)] - T(mean_u) - h[size_t(j)] * T(mean_uh));
    }
};

template <class T> void copy_or_zero(const T *from, int64_t first, int64_t n, T *to) {
    if (from)
        std::copy_n(from + first, n, to);
    else
        std::fill_n(to, n, T(0));
}

// An affine map of a head, or its gradient.
template <class T> struct Layer {
    std::vector<T> w, b; // [in,out], [out]
    Layer(int64_t in, int64_t out) : w(size_t(in * out)), b(size_t(out)) {}
    void read(const T *from_w, const T *from_b, int64_t head) {
        copy_or_zero(from_w, head * int64_t(w.size()), int64_t(w.size()), w.data());
        copy_or_zero(from_b, head * int64_t(b.size()), int64_t(b.size()), b.data());
    }
    void write(T *to_w, T *to_b, int64_t head) const {
        std::copy(w.begin(), w.end(), to_w + head * int64_t(w.size()));
        std::copy(b.begin(), b.end(), to_b + head * int64_t(b.size()));
    }
    // W += x^T y, b += sum y
    void add(int64_t n, const T *x, const T *y) {
        const int64_t out = int64_t(b.size()), in = int64_t(w.size()) / out;
        product_tn(in, out, n, x, y, w.data());
        for (int64_t j = 0; j < n; ++j)
            axpy(out, T(1), y + j * out, b.data());
    }
    void add(const Layer &other) {
        axpy(int64_t(w.size()), T(1), other.w.data(), w.data());
        axpy(int64_t(b.size()), T(1), other.b.data(), b.data());
    }
};

// take_step backwards: from W' and b' to x, G and the last row of eta.
template <class T>
void step_vjp(int64_t n, int64_t in, int64_t out, const T *x, const T *g, const T *eta,
              const Layer<T> &dw, T *dx, T *dg, T *deta) {
    std::vector<T> xw(size_t(n * out)), gw(size_t(n * in));
    affine(n, in, out, x, dw.w.data(), dw.b.data(), xw.data()); // x dW' + db'
    product_nt(n, in, out, g, dw.w.data(), gw.data());          // G dW'^T
    for (int64_t j = 0; j < n; ++j) {
        const T rate = eta[(n - 1) * n + j];
        deta[(n - 1) * n + j] -= dot(out, xw.data() + j * out, g + j * out);
        axpy(out, -rate, xw.data() + j * out, dg + j * out);
        axpy(in, -rate, gw.data() + j * in, dx + j * in);
    }
}
// dual_form backwards: from its result's gradient du to q, x, G, eta and the weights.
template <class T>
void dual_vjp(int64_t n, int64_t in, int64_t out, const T *q, const T *x, const T *g, const T *eta,
              int64_t causal_k, const Layer<T> &w, const T *du, T *dq, T *dx, T *dg, T *deta,
              Layer<T> &dw) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i + causal_k; ++j) {
            const T a = dot(in, q + i * in, x + j * in) + 1;
            const T p = dot(out, du + i * out, g + j * out), rate = eta[i * n + j];
            deta[i * n + j] -= a * p;
            axpy(in, -rate * p, x + j * in, dq + i * in);
            axpy(in, -rate * p, q + i * in, dx + j * in);
            axpy(out, -rate * a, du + i * out, dg + j * out);
        }
    dw.add(n, q, du);
    product_nt(n, in, out, du, w.w.data(), dq);
}

// The rows of one head in one mini-batch.
template <class T> struct Rows {
    int64_t n, at, lr_at; // where they begin in [S,T,C] and in [S,T,H]
    std::vector<T> q, k, target, lr, eta;
};

// What the gradients of all scans do with tensors other than the fast weights, of which there are
// `states`.
template <class T> class ScanGradient {
public:
    ScanGradient(Args<T> &args, size_t states, bool by_key, T scale, double decay, double eps)
        : streams(args['S']), tokens(args['T']), width(args['C']), heads(args['H']), d(args['D']),
          m(args['M']), batches((tokens + m - 1) / m), dy(args.in(7 + states)),
          dloss(args.in(8 + 2 * states)), by_key_(by_key), scale_(scale), decay_(decay), eps_(eps),
          q_(args.in(0)), k_(args.in(1)), v_(args.in(2)), lr_(args.in(3)), index_(args.in(4)),
          g_(args.in(5)), b_(args.in(6)), dq_(args.out(0)), dk_(args.out(1)), dv_(args.out(2)),
          dlr_(args.out(3)), dindex_(args.out(4)), dg_(args.out(5)), db_(args.out(6)),
          token_(size_t(m)), dtoken_(size_t(m)) {
        token_rates(m, index_, decay, token_.data());
    }

    const int64_t streams, tokens, width, heads, d, m, batches;
    const T *const dy, *const dloss;

    // f(stream, head, norm) for each head, then the gradients that are summed over heads.
    template <class F> void run(F f) {
        std::fill_n(dg_, heads * d, T(0));
        std::fill_n(db_, heads * d, T(0));
        for (int64_t s = 0; s < streams; ++s)
            for (int64_t h = 0; h < heads; ++h) {
                const HeadNorm<T> norm{g_ + h * d, b_ + h * d, d, eps_};
                NormGradient<T> back(norm, dg_ + h * d, db_ + h * d);
                f(s, h, back);
            }
        for (int64_t i = 0; i < m; ++i)
            dindex_[i] = 1 / T(i + 1) + index_[i] > 0
                             ? T(dtoken_[size_t(i)] * T(std::exp(decay_ * double(i - (m - 1)))))
                             : T(0);
    }

    Rows<T> read(int64_t s, int64_t h, int64_t batch) const {
        const int64_t first = s * tokens + batch * m, n = std::min(m, tokens - batch * m);
        Rows<T> r{n, first * width + h * d, first * heads + h, {}, {}, {}, {}, {}};
        for (auto *rows : {&r.q, &r.k, &r.target})
            rows->resize(size_t(n * d));
        r.lr.resize(size_t(n));
        r.eta.resize(size_t(n * n));
        gather(n, d, q_ + r.at, width, r.q.data());
        gather(n, d, k_ + r.at, width, r.k.data());
        gather(n, d, v_ + r.at, width, r.target.data());
        axpy(n * d, T(-1), r.k.data(), r.target.data());
        gather(n, 1, lr_ + r.lr_at, heads, r.lr.data());
        learning_rates(n, token_.data(), r.lr.data(), scale_, by_key_, r.eta.data());
        return r;
    }
    void write(const Rows<T> &r, const std::vector<T> &dq, const std::vector<T> &dk,
               const std::vector<T> &dtarget, const std::vector<T> &deta) {
        for (int64_t j = 0; j < r.n; ++j) {
            T dlr = 0;
            for (int64_t i = 0; i < r.n; ++i) {
                const T de = scale_ * deta[size_t(i * r.n + j)];
                const size_t place = size_t(by_key_ ? j : i);
                dlr += de * token_[place];
                dtoken_[place] += double(de * r.lr[size_t(j)]);
            }
            dlr_[r.lr_at + j * heads] = dlr;
            for (int64_t c = 0; c < d; ++c) {
                const int64_t to = r.at + j * width + c;
                const size_t from = size_t(j * d + c);
                dq_[to] = dq[from];
                dk_[to] = dk[from] - dtarget[from];
                dv_[to] = dtarget[from];
            }
        }
    }

private:
    const bool by_key_;
    const T scale_;
    const double decay_, eps_;
    const T *q_, *k_, *v_, *lr_, *index_, *g_, *b_;
    T *dq_, *dk_, *dv_, *dlr_, *dindex_, *dg_, *db_;
    std::vector<T> token_;
    std::vector<double> dtoken_; // summed over everything
};

} // namespace ponder::reference
