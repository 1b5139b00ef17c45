// ttt_linear_vjp: ttt_linear's mini-batches read backwards, with the state before each kept.
// One mini-batch is z = k W + b, G = clip(gradient of 0.5 |LN(z) - target|^2), then
//   y = q + LN(u), u_i = q_i W + b - sum_j eta_ij (q_i k_j + 1) G_j,
//   W' = W - sum_j last_j k_j^T G_j, b' = b - sum_j last_j G_j, last: the last row of eta
// and its gradient arrives at G from u and from W', b'; G's own is that of HeadNorm::loss_gradient,
// a second derivative of LN. The three losses add theirs at the last token's row.
#include "backend/reference/ttt_gradient.hpp"

namespace ponder::reference {
namespace {

// Up to the loss's gradient, before (raw) and after (g) the clip.
template <class T> struct Batch : Rows<T> {
    std::vector<T> z, raw, g;
    T factor = 1, length = 0; // of the clip; |raw|
};

template <class T> class LinearGradient {
public:
    explicit LinearGradient(Args<T> &args)
        : args_(args),
          scan_(args, 2, args.attr_int(0) == 1, T(args.attr(1)), args.attr(2), args.attr(3)),
          d_(scan_.d), max_norm_(args.attr(4)), causal_k_(args.attr_int(5)) {}

    void run() {
        const T *w = args_.in(7), *b = args_.in(8), *dw_next = args_.in(10),
                *db_next = args_.in(11);
        T *dw = args_.out(7), *db = args_.out(8);
        scan_.run([&](int64_t s, int64_t h, NormGradient<T> &back) {
            const int64_t head = s * scan_.heads + h;
            Layer<T> state(d_, d_), gradient(d_, d_);
            state.read(w, b, head);
            gradient.read(dw_next, db_next, head);
            one_head(s, h, back, state, gradient);
            gradient.write(dw, db, head);
        });
    }

private:
    Batch<T> forward(int64_t s, int64_t h, int64_t batch, const HeadNorm<T> &norm,
                     const Layer<T> &w) const {
        Batch<T> x{scan_.read(s, h, batch), {}, {}, {}};
        x.z.resize(x.k.size());
        x.raw.resize(x.k.size());
        affine(x.n, d_, d_, x.k.data(), w.w.data(), w.b.data(), x.z.data());
        norm.loss_gradient(x.n, x.z.data(), x.target.data(), x.raw.data());
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

    // `gradient` is that of the state after the chunk, then that before it.
    void one_head(int64_t s, int64_t h, NormGradient<T> &back, const Layer<T> &state,
                  Layer<T> &gradient) {
        std::vector<Layer<T>> w{state};
        std::vector<Batch<T>> batch;
        for (int64_t i = 0; i < scan_.batches; ++i) {
            batch.push_back(forward(s, h, i, back.norm, w.back()));
            const Batch<T> &x = batch.back();
            Layer<T> next = w.back();
            take_step(x.n, d_, d_, x.k.data(), x.g.data(), x.eta.data(), next.w.data(),
                      next.b.data());
            w.push_back(std::move(next));
        }
        Layer<T> initial(d_, d_); // through the initial loss
        for (size_t i = batch.size(); i-- > 0;)
            backward(s, batch[i], back, w[i], w[i + 1], state, gradient, initial);
        gradient.add(initial);
    }

    // weight mean((LN(key W + b) - target)^2) for one row; adds to all but its inputs.
    void error(NormGradient<T> &back, T weight, const T *key, const T *target, const Layer<T> &w,
               T *dkey, T *dtarget, Layer<T> &dw) const {
        std::vector<T> z(static_cast<size_t>(d_)), dz(static_cast<size_t>(d_));
        affine(1, d_, d_, key, w.w.data(), w.b.data(), z.data());
        back.error(z.data(), target, weight, dz.data(), dtarget);
        dw.add(1, key, dz.data());
        product_nt(1, d_, d_, dz.data(), w.w.data(), dkey);
    }

    void backward(int64_t s, const Batch<T> &x, NormGradient<T> &back, const Layer<T> &w,
                  const Layer<T> &w_next, const Layer<T> &w_initial, Layer<T> &dw,
                  Layer<T> &dw_initial) {
        const int64_t n = x.n, last = (n - 1) * d_;
        const size_t size = size_t(n * d_);
        std::vector<T> dq(size), dk(size), dtarget(size), dg(size), dz(size), deta(x.eta.size());
        const T *k = x.k.data(), *q = x.q.data(), *g = x.g.data(), *eta = x.eta.data();

        if (scan_.dloss) {
            const T *dloss = scan_.dloss + s * 3,
                    share = T(1 / double(scan_.heads * scan_.batches));
            error(back, dloss[0] * share, k + last, x.target.data() + last, w_initial,
                  dk.data() + last, dtarget.data() + last, dw_initial);
            error(back, dloss[2] * share, k + last, x.target.data() + last, w_next,
                  dk.data() + last, dtarget.data() + last, dw);
            back.error(x.z.data() + last, x.target.data() + last, dloss[1] * share,
                       dz.data() + last, dtarget.data() + last);
        }
        step_vjp(n, d_, d_, k, g, eta, dw, dk.data(), dg.data(), deta.data());

        if (scan_.dy) {
            std::vector<T> u(size), du(size);
            dual_form(n, d_, d_, q, k, g, eta, causal_k_, w.w.data(), w.b.data(), u.data());
            for (int64_t i = 0; i < n; ++i) {
                const T *dy = scan_.dy + x.at + i * scan_.width;
                axpy(d_, T(1), dy, dq.data() + i * d_);
                back.output(u.data() + i * d_, dy, du.data() + i * d_);
            }
            dual_vjp(n, d_, d_, q, k, g, eta, causal_k_, w, du.data(), dq.data(), dk.data(),
                     dg.data(), deta.data(), dw);
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
        dw.add(n, k, dz.data());
        product_nt(n, d_, d_, dz.data(), w.w.data(), dk.data());
        scan_.write(x, dq, dk, dtarget, deta);
    }

    Args<T> &args_;
    ScanGradient<T> scan_;
    const int64_t d_;
    const double max_norm_;
    const int64_t causal_k_;
};

template <class T> void ttt_linear_vjp(Args<T> &args) { LinearGradient<T>(args).run(); }

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
