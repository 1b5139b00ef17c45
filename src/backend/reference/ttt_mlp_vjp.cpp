// ttt_mlp_vjp: ttt_mlp's mini-batches read backwards, with the state before each kept. Names are
// those of ttt_mlp.cpp; dX is the gradient that arrives at X. In each mini-batch both layers have a
// step and a dual form, whose gradients are those of ttt_linear_vjp.cpp, and between them
//   G1 = Y gelu'(Z1), Y = G2 W2^T:  dY = dG1 gelu'(Z1), dG2 += dY W2, dW2 += dY^T G2,
//                                   dZ1 += dG1 Y gelu''(Z1)
#include "backend/reference/ttt_gradient.hpp"

namespace ponder::reference {
namespace {

// gelu'' = t' + x t'' / 2, as in gelu.cpp
template <class T> T gelu_curve(T x) {
    const T t = std::tanh(T(gelu_scale) * (x + T(gelu_cube) * x * x * x)), p = 1 - t * t;
    const T u1 = T(gelu_scale) * (1 + 3 * T(gelu_cube) * x * x),
            u2 = 6 * T(gelu_scale) * T(gelu_cube) * x;
    return p * u1 + x * (p * u2 - 2 * t * p * u1 * u1) / 2;
}

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
};
template <class T> struct Mlp {
    Layer<T> first, second;
    Mlp(int64_t d, int64_t f) : first(d, f), second(f, d) {}
};

// The rows of one head in one mini-batch, up to the gradients of its loss.
template <class T> struct Rows {
    int64_t n;
    std::vector<T> q, k, target, lr, eta, z1, x, z2, g2, y, g1;
    Rows(int64_t n, int64_t d, int64_t f)
        : n(n), q(size_t(n * d)), k(q), target(q), lr(size_t(n)), eta(size_t(n * n)),
          z1(size_t(n * f)), x(z1), z2(q), g2(q), y(z1), g1(z1) {}
};

template <class T> class MlpScan {
public:
    explicit MlpScan(Args<T> &args)
        : args_(args), streams_(args['S']), tokens_(args['T']), width_(args['C']),
          heads_(args['H']), d_(args['D']), f_(4 * d_), m_(args['M']),
          batches_((tokens_ + m_ - 1) / m_), scale_(T(args.attr(0))), eps_(args.attr(1)),
          q_(args.in(0)), k_(args.in(1)), v_(args.in(2)), lr_(args.in(3)), index_(args.in(4)),
          dy_(args.in(11)), dloss_(args.in(16)), dq_(args.out(0)), dk_(args.out(1)),
          dv_(args.out(2)), dlr_(args.out(3)), token_(size_t(m_)), dtoken_(size_t(m_)) {
        token_rates(m_, index_, 0.0, token_.data());
    }

    void run() {
        const T *g = args_.in(5), *b = args_.in(6), *in[8];
        T *dindex = args_.out(4), *dg = args_.out(5), *db = args_.out(6), *out[4];
        for (size_t i = 0; i < 4; ++i) {
            in[i] = args_.in(7 + i);
            in[4 + i] = args_.in(12 + i);
            out[i] = args_.out(7 + i);
        }
        std::fill_n(dg, heads_ * d_, T(0));
        std::fill_n(db, heads_ * d_, T(0));
        for (int64_t s = 0; s < streams_; ++s)
            for (int64_t h = 0; h < heads_; ++h) {
                const int64_t head = s * heads_ + h;
                const HeadNorm<T> norm{g + h * d_, b + h * d_, d_, eps_};
                NormGradient<T> back(norm, dg + h * d_, db + h * d_);
                Mlp<T> state(d_, f_), gradient(d_, f_);
                state.first.read(in[0], in[1], head);
                state.second.read(in[2], in[3], head);
                gradient.first.read(in[4], in[5], head);
                gradient.second.read(in[6], in[7], head);
                one_head(s, h, back, state, gradient);
                gradient.first.write(out[0], out[1], head);
                gradient.second.write(out[2], out[3], head);
            }
        for (int64_t i = 0; i < m_; ++i)
            dindex[i] = 1 / T(i + 1) + index_[i] > 0 ? T(dtoken_[size_t(i)]) : T(0);
    }

private:
    Rows<T> forward(int64_t s, int64_t h, int64_t batch, const HeadNorm<T> &norm,
                    const Mlp<T> &w) const {
        const int64_t first = s * tokens_ + batch * m_, n = std::min(m_, tokens_ - batch * m_);
        const int64_t at = first * width_ + h * d_;
        Rows<T> r(n, d_, f_);
        gather(n, d_, q_ + at, width_, r.q.data());
        gather(n, d_, k_ + at, width_, r.k.data());
        gather(n, d_, v_ + at, width_, r.target.data());
        axpy(n * d_, T(-1), r.k.data(), r.target.data());
        gather(n, 1, lr_ + first * heads_ + h, heads_, r.lr.data());
        learning_rates(n, token_.data(), r.lr.data(), scale_, false, r.eta.data());
        affine(n, d_, f_, r.k.data(), w.first.w.data(), w.first.b.data(), r.z1.data());
        std::transform(r.z1.begin(), r.z1.end(), r.x.begin(), gelu_of<T>);
        affine(n, f_, d_, r.x.data(), w.second.w.data(), w.second.b.data(), r.z2.data());
        norm.loss_gradient(n, r.z2.data(), r.target.data(), r.g2.data());
        product_nt(n, f_, d_, r.g2.data(), w.second.w.data(), r.y.data());
        for (size_t i = 0; i < r.g1.size(); ++i)
            r.g1[i] = r.y[i] * gelu_slope(r.z1[i]);
        return r;
    }

    // `gradient` is that of the state after the chunk, then that before it.
    void one_head(int64_t s, int64_t h, NormGradient<T> &back, const Mlp<T> &state,
                  Mlp<T> &gradient) {
        std::vector<Mlp<T>> w{state};
        for (int64_t i = 0; i < batches_; ++i) {
            const Rows<T> r = forward(s, h, i, back.norm, w.back());
            Mlp<T> next = w.back();
            take_step(r.n, d_, f_, r.k.data(), r.g1.data(), r.eta.data(), next.first.w.data(),
                      next.first.b.data());
            take_step(r.n, f_, d_, r.x.data(), r.g2.data(), r.eta.data(), next.second.w.data(),
                      next.second.b.data());
            w.push_back(std::move(next));
        }
        Mlp<T> initial(d_, f_); // through the initial loss
        for (int64_t i = batches_ - 1; i >= 0; --i)
            backward(s, h, i, back, w[size_t(i)], w[size_t(i + 1)], state, gradient, initial);
        for (const auto part : {&Mlp<T>::first, &Mlp<T>::second}) {
            axpy(int64_t((gradient.*part).w.size()), T(1), (initial.*part).w.data(),
                 (gradient.*part).w.data());
            axpy(int64_t((gradient.*part).b.size()), T(1), (initial.*part).b.data(),
                 (gradient.*part).b.data());
        }
    }

    // weight mean((LN(z) - target)^2) of one key under the weights w; adds to all but its inputs.
    void error(NormGradient<T> &back, T weight, const T *key, const T *target, const Mlp<T> &w,
               T *dkey, T *dtarget, Mlp<T> &dw) const {
        std::vector<T> z1(static_cast<size_t>(f_)), x(z1.size()), dx(z1.size()),
            z(static_cast<size_t>(d_)), dz(z.size());
        affine(1, d_, f_, key, w.first.w.data(), w.first.b.data(), z1.data());
        std::transform(z1.begin(), z1.end(), x.begin(), gelu_of<T>);
        affine(1, f_, d_, x.data(), w.second.w.data(), w.second.b.data(), z.data());
        back.error(z.data(), target, weight, dz.data(), dtarget);
        dw.second.add(1, x.data(), dz.data());
        product_nt(1, f_, d_, dz.data(), w.second.w.data(), dx.data());
        for (size_t i = 0; i < dx.size(); ++i)
            dx[i] *= gelu_slope(z1[i]);
        dw.first.add(1, key, dx.data());
        product_nt(1, d_, f_, dx.data(), w.first.w.data(), dkey);
    }

    // take_step backwards: from W' and b' to x, G and the last row of eta.
    void step(int64_t n, int64_t in, int64_t out, const T *x, const T *g, const T *eta,
              const Layer<T> &dw, T *dx, T *dg, T *deta) const {
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
    void dual(int64_t n, int64_t in, int64_t out, const T *q, const T *x, const T *g, const T *eta,
              const Layer<T> &w, const T *du, T *dq, T *dx, T *dg, T *deta, Layer<T> &dw) const {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j <= i; ++j) {
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

    void backward(int64_t s, int64_t h, int64_t batch, NormGradient<T> &back, const Mlp<T> &w,
                  const Mlp<T> &w_next, const Mlp<T> &w_initial, Mlp<T> &dw, Mlp<T> &dw_initial) {
        const Rows<T> r = forward(s, h, batch, back.norm, w);
        const int64_t n = r.n, last = (n - 1) * d_, first = s * tokens_ + batch * m_;
        const int64_t at = first * width_ + h * d_;
        const T *q = r.q.data(), *k = r.k.data(), *x = r.x.data(), *eta = r.eta.data();
        const T *g1 = r.g1.data(), *g2 = r.g2.data(), *target = r.target.data();
        std::vector<T> dq(r.q.size()), dk(dq), dtarget(dq), dz2(dq), dg2(dq), deta(r.eta.size());
        std::vector<T> dz1(r.z1.size()), dx(dz1), dg1(dz1);

        if (dloss_) {
            const T *dloss = dloss_ + s * 3, share = T(1 / double(heads_ * batches_));
            error(back, dloss[0] * share, k + last, target + last, w_initial, dk.data() + last,
                  dtarget.data() + last, dw_initial);
            error(back, dloss[2] * share, k + last, target + last, w_next, dk.data() + last,
                  dtarget.data() + last, dw);
            back.error(r.z2.data() + last, target + last, dloss[1] * share, dz2.data() + last,
                       dtarget.data() + last);
        }
        step(n, d_, f_, k, g1, eta, dw.first, dk.data(), dg1.data(), deta.data());
        step(n, f_, d_, x, g2, eta, dw.second, dx.data(), dg2.data(), deta.data());

        if (dy_) {
            std::vector<T> zq(r.z1.size()), xq(zq), dzq(zq), u(r.z2.size()), du(u);
            dual_form(n, d_, f_, q, k, g1, eta, 0, w.first.w.data(), w.first.b.data(), zq.data());
            std::transform(zq.begin(), zq.end(), xq.begin(), gelu_of<T>);
            dual_form(n, f_, d_, xq.data(), x, g2, eta, 0, w.second.w.data(), w.second.b.data(),
                      u.data());
            for (int64_t i = 0; i < n; ++i) {
                axpy(d_, T(1), dy_ + at + i * width_, dq.data() + i * d_);
                back.output(u.data() + i * d_, dy_ + at + i * width_, du.data() + i * d_);
            }
            dual(n, f_, d_, xq.data(), x, g2, eta, w.second, du.data(), dzq.data(), dx.data(),
                 dg2.data(), deta.data(), dw.second);
            for (size_t i = 0; i < dzq.size(); ++i)
                dzq[i] *= gelu_slope(zq[i]);
            dual(n, d_, f_, q, k, g1, eta, w.first, dzq.data(), dq.data(), dk.data(), dg1.data(),
                 deta.data(), dw.first);
        }

        std::vector<T> dy(r.y.size());
        for (size_t i = 0; i < dy.size(); ++i) {
            dy[i] = dg1[i] * gelu_slope(r.z1[i]);
            dz1[i] += dg1[i] * r.y[i] * gelu_curve(r.z1[i]);
        }
        product(n, d_, f_, dy.data(), w.second.w.data(), dg2.data());
        product_tn(f_, d_, n, dy.data(), g2, dw.second.w.data());

        for (int64_t j = 0; j < n; ++j)
            back.loss_gradient(r.z2.data() + j * d_, target + j * d_, dg2.data() + j * d_,
                               dz2.data() + j * d_, dtarget.data() + j * d_);
        dw.second.add(n, x, dz2.data());
        product_nt(n, f_, d_, dz2.data(), w.second.w.data(), dx.data());
        for (size_t i = 0; i < dz1.size(); ++i)
            dz1[i] += dx[i] * gelu_slope(r.z1[i]);
        dw.first.add(n, k, dz1.data());
        product_nt(n, d_, f_, dz1.data(), w.first.w.data(), dk.data());

        for (int64_t j = 0; j < n; ++j) {
            T dlr = 0;
            for (int64_t i = 0; i < n; ++i) {
                const T de = scale_ * deta[size_t(i * n + j)];
                dlr += de * token_[size_t(i)];
                dtoken_[size_t(i)] += double(de * r.lr[size_t(j)]);
            }
            dlr_[(first + j) * heads_ + h] = dlr;
            for (int64_t c = 0; c < d_; ++c) {
                const int64_t to = at + j * width_ + c;
                const size_t from = size_t(j * d_ + c);
                dq_[to] = dq[from];
                dk_[to] = dk[from] - dtarget[from];
                dv_[to] = dtarget[from];
            }
        }
    }

    Args<T> &args_;
    const int64_t streams_, tokens_, width_, heads_, d_, f_, m_, batches_;
    const T scale_;
    const double eps_;
    const T *q_, *k_, *v_, *lr_, *index_, *dy_, *dloss_;
    T *dq_, *dk_, *dv_, *dlr_;
    std::vector<T> token_;
    std::vector<double> dtoken_; // summed over everything
};

template <class T> void ttt_mlp_vjp(Args<T> &args) { MlpScan<T>(args).run(); }

const char *check(const Sizes &sizes, const double *) {
    return sizes['C'] == sizes['H'] * sizes['D'] ? nullptr : "C must be H x D";
}

} // namespace

const Op ttt_mlp_vjp_op = {
    "ttt_mlp_vjp",
    "q[S,T,C] k[S,T,C] v[S,T,C] lr[S,T,H] index[M] g[H,D] b[H,D] "
    "w1:w[S,H,D,4D] b1:w[S,H,4D] w2:w[S,H,4D,D] b2:w[S,H,D] dy?[S,T,C] dw1'?:w[S,H,D,4D] "
    "db1'?:w[S,H,4D] dw2'?:w[S,H,4D,D] db2'?:w[S,H,D] dloss?:w[S,3] -> "
    "dq[S,T,C] dk[S,T,C] dv[S,T,C] dlr[S,T,H] dindex:w[M] dg:w[H,D] db:w[H,D] "
    "dw1:w[S,H,D,4D] db1:w[S,H,4D] dw2:w[S,H,4D,D] db2:w[S,H,D]",
    2,
    ttt_mlp_vjp<float>,
    ttt_mlp_vjp<double>,
    check};

} // namespace ponder::reference
