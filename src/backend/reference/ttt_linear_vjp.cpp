// ttt_linear_vjp: ttt_linear's mini-batches read backwards, with the state before each kept.
// One mini-batch is z = k W + b, G = clip(gradient of 0.5 |LN(z) - target|^2), then
//   y = q + LN(u), u_i = q_i W + b - sum_j eta_ij (q_i k_j + 1) G_j,
//   W' = W - sum_j last_j k_j^T G_j, b' = b - sum_j last_j G_j, last: the last row of eta
// and its gradient arrives at G from u and from W', b'; G's own is that of HeadNorm::loss_gradient,
// a second derivative of LN. The three losses add theirs at the last token's row.
#include "backend/reference/ttt_gradient.hpp"

namespace ponder::reference {
namespace {

// The rows of one head in one mini-batch.
template <class T> struct Batch {
    int64_t n = 0;
    std::vector<T> q, k, target, lr, eta, z, raw,
        g;                    // raw, g: the loss's gradient before, after clip
    T factor = 1, length = 0; // of the clip; |raw|
};

template <class T> class Scan {
public:
    explicit Scan(Args<T> &args)
        : args_(args), streams_(args['S']), tokens_(args['T']), width_(args['C']),
          heads_(args['H']), d_(args['D']), m_(args['M']), batches_((tokens_ + m_ - 1) / m_),
          by_key_(args.attr_int(0) == 1), scale_(T(args.attr(1))), decay_(args.attr(2)),
          eps_(args.attr(3)), max_norm_(args.attr(4)), causal_k_(args.attr_int(5)), q_(args.in(0)),
          k_(args.in(1)), v_(args.in(2)), lr_(args.in(3)), index_(args.in(4)), dy_(args.in(9)),
          dloss_(args.in(12)), dq_(args.out(0)), dk_(args.out(1)), dv_(args.out(2)),
          dlr_(args.out(3)), token_(size_t(m_)), dtoken_(size_t(m_)) {
        token_rates(m_, index_, decay_, token_.data());
    }

    void run() {
        const T *g = args_.in(5), *b = args_.in(6), *w1 = args_.in(7), *b1 = args_.in(8);
        const T *dw_next = args_.in(10), *db_next = args_.in(11);
        T *dindex = args_.out(4), *dg = args_.out(5), *db = args_.out(6);
        T *dw = args_.out(7), *db1 = args_.out(8);
        std::fill_n(dg, heads_ * d_, T(0));
        std::fill_n(db, heads_ * d_, T(0));
        for (int64_t s = 0; s < streams_; ++s)
            for (int64_t h = 0; h < heads_; ++h) {
                const int64_t head = s * heads_ + h;
                const HeadNorm<T> norm{g + h * d_, b + h * d_, d_, eps_};
                NormGradient<T> back(norm, dg + h * d_, db + h * d_);
                T *w = dw + head * d_ * d_, *bias = db1 + head * d_;
                copy_or_zero(dw_next, head * d_ * d_, d_ * d_, w);
                copy_or_zero(db_next, head * d_, d_, bias);
                one_head(s, h, norm, back, w1 + head * d_ * d_, b1 + head * d_, w, bias);
            }
        for (int64_t i = 0; i < m_; ++i)
            dindex[i] = 1 / T(i + 1) + index_[i] > 0
                            ? dtoken_[size_t(i)] * T(std::exp(decay_ * double(i - (m_ - 1))))
                            : T(0);
    }

private:
    Batch<T> forward(int64_t at, int64_t lr_at, int64_t n, const HeadNorm<T> &norm, const T *w,
                     const T *b) const {
        Batch<T> x;
        const size_t size = size_t(n * d_);
        x.n = n;
        for (auto *rows : {&x.q, &x.k, &x.target, &x.z, &x.raw})
            rows->resize(size);
        x.lr.resize(size_t(n));
        x.eta.resize(size_t(n * n));
        gather(n, d_, q_ + at, width_, x.q.data());
        gather(n, d_, k_ + at, width_, x.k.data());
        gather(n, d_, v_ + at, width_, x.target.data());
        axpy(n * d_, T(-1), x.k.data(), x.target.data());
        gather(n, 1, lr_ + lr_at, heads_, x.lr.data());
        learning_rates(n, token_.data(), x.lr.data(), scale_, by_key_, x.eta.data());
        affine(n, d_, d_, x.k.data(), w, b, x.z.data());
        norm.loss_gradient(n, x.z.data(), x.target.data(), x.raw.data());
        x.g = x.raw;
        if (max_norm_ > 0) {
            double sum = 0;
            for (const T e : x.raw)
                sum += double(e) * e;
            x.length = T(std::sqrt(sum));
            x.factor = T(std::min(1.0, max_norm_ / (std::sqrt(sum) + 1e-6)));
            for (T &e : x.g)
                e *= x.factor;
        }
        return x;
    }

    // dw and db hold the gradient of the state after the chunk, then that before it.
    void one_head(int64_t s, int64_t h, const HeadNorm<T> &norm, NormGradient<T> &back, const T *w0,
                  const T *b0, T *dw, T *db) {
        const size_t d2 = size_t(d_ * d_);
        std::vector<std::vector<T>> w{{w0, w0 + d2}}, b{{b0, b0 + d_}};
        std::vector<Batch<T>> batch;
        for (int64_t first = 0; first < tokens_; first += m_) {
            batch.push_back(
                forward((s * tokens_ + first) * width_ + h * d_, (s * tokens_ + first) * heads_ + h,
                        std::min(m_, tokens_ - first), norm, w.back().data(), b.back().data()));
            const Batch<T> &x = batch.back();
            w.push_back(w.back());
            b.push_back(b.back());
            take_step(x.n, d_, d_, x.k.data(), x.g.data(), x.eta.data(), w.back().data(),
                      b.back().data());
        }
        std::vector<T> dw_first(d2), db_first(static_cast<size_t>(d_)); // through the initial loss
        for (int64_t i = batches_ - 1; i >= 0; --i) {
            const size_t at = size_t(i);
            const int64_t row = s * tokens_ + i * m_;
            backward(batch[at], back, w[at].data(), b[at].data(), w[at + 1].data(),
                     b[at + 1].data(), w0, b0, dloss_ ? dloss_ + s * 3 : nullptr,
                     row * width_ + h * d_, row * heads_ + h, dw, db, dw_first.data(),
                     db_first.data());
        }
        axpy(int64_t(d2), T(1), dw_first.data(), dw);
        axpy(d_, T(1), db_first.data(), db);
    }

    // weight mean((LN(key W + b) - target)^2) for one row; adds to all but its inputs.
    void error(NormGradient<T> &back, T weight, const T *key, const T *target, const T *w,
               const T *b, T *dkey, T *dtarget, T *dw, T *db) const {
        std::vector<T> z(static_cast<size_t>(d_)), dz(static_cast<size_t>(d_));
        affine(1, d_, d_, key, w, b, z.data());
        back.error(z.data(), target, weight, dz.data(), dtarget);
        product_tn(d_, d_, 1, key, dz.data(), dw);
        axpy(d_, T(1), dz.data(), db);
        product_nt(1, d_, d_, dz.data(), w, dkey);
    }

    void backward(const Batch<T> &x, NormGradient<T> &back, const T *w, const T *b, const T *w_next,
                  const T *b_next, const T *w0, const T *b0, const T *dloss, int64_t at,
                  int64_t lr_at, T *dw, T *db, T *dw_first, T *db_first) {
        const int64_t n = x.n, last = (n - 1) * d_;
        const size_t size = size_t(n * d_);
        std::vector<T> dq(size), dk(size), dtarget(size), dg(size), dz(size), deta(x.eta.size());
        const T *k = x.k.data(), *q = x.q.data(), *g = x.g.data(), *eta = x.eta.data();
        const T share = T(1 / double(heads_ * batches_));

        if (dloss) {
            error(back, dloss[0] * share, k + last, x.target.data() + last, w0, b0,
                  dk.data() + last, dtarget.data() + last, dw_first, db_first);
            error(back, dloss[2] * share, k + last, x.target.data() + last, w_next, b_next,
                  dk.data() + last, dtarget.data() + last, dw, db);
            back.error(x.z.data() + last, x.target.data() + last, dloss[1] * share,
                       dz.data() + last, dtarget.data() + last);
        }

        // The step: from W' and b' to k, G and the last row of eta.
        std::vector<T> kw(size), gw(size);
        affine(n, d_, d_, k, dw, db, kw.data()); // k dW' + db'
        product_nt(n, d_, d_, g, dw, gw.data()); // G dW'^T
        const T *rate = eta + (n - 1) * n;
        for (int64_t j = 0; j < n; ++j) {
            deta[size_t((n - 1) * n + j)] -= dot(d_, kw.data() + j * d_, g + j * d_);
            axpy(d_, -rate[j], kw.data() + j * d_, dg.data() + j * d_);
            axpy(d_, -rate[j], gw.data() + j * d_, dk.data() + j * d_);
        }

        // The queries.
        if (dy_) {
            std::vector<T> u(size), du(size);
            dual_form(n, d_, d_, q, k, g, eta, causal_k_, w, b, u.data());
            for (int64_t i = 0; i < n; ++i) {
                const T *dy = dy_ + at + i * width_;
                axpy(d_, T(1), dy, dq.data() + i * d_);
                back.output(u.data() + i * d_, dy, du.data() + i * d_);
                for (int64_t j = 0; j <= i + causal_k_; ++j) {
                    const T rate_ij = eta[i * n + j];
                    const T a = dot(d_, q + i * d_, k + j * d_) + 1;
                    const T p = dot(d_, du.data() + i * d_, g + j * d_);
                    deta[size_t(i * n + j)] -= a * p;
                    axpy(d_, -rate_ij * p, k + j * d_, dq.data() + i * d_);
                    axpy(d_, -rate_ij * p, q + i * d_, dk.data() + j * d_);
                    axpy(d_, -rate_ij * a, du.data() + i * d_, dg.data() + j * d_);
                }
                axpy(d_, T(1), du.data() + i * d_, db);
            }
            product_tn(d_, d_, n, q, du.data(), dw);
            product_nt(n, d_, d_, du.data(), w, dq.data());
        }

        // The clip: f = limit / (|raw| + 1e-6) where that is below 1.
        if (x.factor < 1) {
            const T along = dot(n * d_, dg.data(), x.raw.data());
            const T inward = along * x.factor / ((x.length + T(1e-6)) * x.length);
            for (size_t i = 0; i < size; ++i)
                dg[i] = x.factor * dg[i] - inward * x.raw[i];
        }

        // G's gradient, and z = k W + b.
        for (int64_t j = 0; j < n; ++j)
            back.loss_gradient(x.z.data() + j * d_, x.target.data() + j * d_, dg.data() + j * d_,
                               dz.data() + j * d_, dtarget.data() + j * d_);
        product_tn(d_, d_, n, k, dz.data(), dw);
        product_nt(n, d_, d_, dz.data(), w, dk.data());
        for (int64_t j = 0; j < n; ++j)
            axpy(d_, T(1), dz.data() + j * d_, db);

        for (int64_t j = 0; j < n; ++j) {
            T dlr = 0;
            for (int64_t i = 0; i < n; ++i) {
                const T de = scale_ * deta[size_t(i * n + j)];
                const int64_t place = by_key_ ? j : i;
                dlr += de * token_[size_t(place)];
                dtoken_[size_t(place)] += double(de * x.lr[size_t(j)]);
            }
            dlr_[lr_at + j * heads_] = dlr;
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
    const int64_t streams_, tokens_, width_, heads_, d_, m_, batches_;
    const bool by_key_;
    const T scale_;
    const double decay_, eps_, max_norm_;
    const int64_t causal_k_;
    const T *q_, *k_, *v_, *lr_, *index_, *dy_, *dloss_;
    T *dq_, *dk_, *dv_, *dlr_;
    std::vector<T> token_;
    std::vector<double> dtoken_; // summed over everything
};

template <class T> void ttt_linear_vjp(Args<T> &args) { Scan<T>(args).run(); }

} // namespace

const Op ttt_linear_vjp_op = {
    "ttt_linear_vjp",
    "q[S,T,C] k[S,T,C] v[S,T,C] lr[S,T,H] index[M] g[H,D] b[H,D] w1:w[S,H,D,D] b1:w[S,H,D] "
    "dy?[S,T,C] dw1'?:w[S,H,D,D] db1'?:w[S,H,D] dloss?:w[S,3] -> "
    "dq[S,T,C] dk[S,T,C] dv[S,T,C] dlr[S,T,H] dindex:w[M] dg:w[H,D] db:w[H,D] dw1:w[S,H,D,D] "
    "db1:w[S,H,D]",
    6,
    ttt_linear_vjp<float>,
    ttt_linear_vjp<double>,
    check_ttt_linear};

} // namespace ponder::reference
