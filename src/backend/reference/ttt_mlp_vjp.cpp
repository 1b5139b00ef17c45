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

template <class T> struct Mlp {
    Layer<T> first, second;
    Mlp(int64_t d, int64_t f) : first(d, f), second(f, d) {}
};

// Up to the gradients of the loss.
template <class T> struct Batch : Rows<T> { std::vector<T> z1, x, z2, g2, y, g1; };

template <class T> class MlpGradient {
public:
    explicit MlpGradient(Args<T> &args)
        : args_(args), scan_(args, 4, false, T(args.attr(0)), 0.0, args.attr(1)), d_(scan_.d),
          f_(4 * d_) {}

    void run() {
        const T *in[8];
        T *out[4];
        for (size_t i = 0; i < 4; ++i) {
            in[i] = args_.in(7 + i);
            in[4 + i] = args_.in(12 + i);
            out[i] = args_.out(7 + i);
        }
        scan_.run([&](int64_t s, int64_t h, NormGradient<T> &back) {
            const int64_t head = s * scan_.heads + h;
            Mlp<T> state(d_, f_), gradient(d_, f_);
            state.first.read(in[0], in[1], head);
            state.second.read(in[2], in[3], head);
            gradient.first.read(in[4], in[5], head);
            gradient.second.read(in[6], in[7], head);
            one_head(s, h, back, state, gradient);
            gradient.first.write(out[0], out[1], head);
            gradient.second.write(out[2], out[3], head);
        });
    }

private:
    Batch<T> forward(int64_t s, int64_t h, int64_t batch, const HeadNorm<T> &norm,
                     const Mlp<T> &w) const {
        Batch<T> r{scan_.read(s, h, batch), {}, {}, {}, {}, {}, {}};
        const int64_t n = r.n;
        for (auto *narrow : {&r.z2, &r.g2})
            narrow->resize(size_t(n * d_));
        for (auto *wide : {&r.z1, &r.x, &r.y, &r.g1})
            wide->resize(size_t(n * f_));
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
        for (int64_t i = 0; i < scan_.batches; ++i) {
            const Batch<T> r = forward(s, h, i, back.norm, w.back());
            Mlp<T> next = w.back();
            take_step(r.n, d_, f_, r.k.data(), r.g1.data(), r.eta.data(), next.first.w.data(),
                      next.first.b.data());
            take_step(r.n, f_, d_, r.x.data(), r.g2.data(), r.eta.data(), next.second.w.data(),
                      next.second.b.data());
            w.push_back(std::move(next));
        }
        Mlp<T> initial(d_, f_); // through the initial loss
        for (int64_t i = scan_.batches - 1; i >= 0; --i)
            backward(s, h, i, back, w[size_t(i)], w[size_t(i + 1)], state, gradient, initial);
        gradient.first.add(initial.first);
        gradient.second.add(initial.second);
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

    void backward(int64_t s, int64_t h, int64_t batch, NormGradient<T> &back, const Mlp<T> &w,
                  const Mlp<T> &w_next, const Mlp<T> &w_initial, Mlp<T> &dw, Mlp<T> &dw_initial) {
        const Batch<T> r = forward(s, h, batch, back.norm, w);
        const int64_t n = r.n, last = (n - 1) * d_;
        const T *q = r.q.data(), *k = r.k.data(), *x = r.x.data(), *eta = r.eta.data();
        const T *g1 = r.g1.data(), *g2 = r.g2.data(), *target = r.target.data();
        std::vector<T> dq(r.q.size()), dk(dq), dtarget(dq), dz2(dq), dg2(dq), deta(r.eta.size());
        std::vector<T> dz1(r.z1.size()), dx(dz1), dg1(dz1);

        if (scan_.dloss) {
            const T *dloss = scan_.dloss + s * 3,
                    share = T(1 / double(scan_.heads * scan_.batches));
            error(back, dloss[0] * share, k + last, target + last, w_initial, dk.data() + last,
                  dtarget.data() + last, dw_initial);
            error(back, dloss[2] * share, k + last, target + last, w_next, dk.data() + last,
                  dtarget.data() + last, dw);
            back.error(r.z2.data() + last, target + last, dloss[1] * share, dz2.data() + last,
                       dtarget.data() + last);
        }
        step_vjp(n, d_, f_, k, g1, eta, dw.first, dk.data(), dg1.data(), deta.data());
        step_vjp(n, f_, d_, x, g2, eta, dw.second, dx.data(), dg2.data(), deta.data());

        if (scan_.dy) {
            std::vector<T> zq(r.z1.size()), xq(zq), dzq(zq), u(r.z2.size()), du(u);
            dual_form(n, d_, f_, q, k, g1, eta, 0, w.first.w.data(), w.first.b.data(), zq.data());
            std::transform(zq.begin(), zq.end(), xq.begin(), gelu_of<T>);
            dual_form(n, f_, d_, xq.data(), x, g2, eta, 0, w.second.w.data(), w.second.b.data(),
                      u.data());
            for (int64_t i = 0; i < n; ++i) {
                const T *dy = scan_.dy + r.at + i * scan_.width;
                axpy(d_, T(1), dy, dq.data() + i * d_);
                back.output(u.data() + i * d_, dy, du.data() + i * d_);
            }
            dual_vjp(n, f_, d_, xq.data(), x, g2, eta, 0, w.second, du.data(), dzq.data(),
                     dx.data(), dg2.data(), deta.data(), dw.second);
            for (size_t i = 0; i < dzq.size(); ++i)
                dzq[i] *= gelu_slope(zq[i]);
            dual_vjp(n, d_, f_, q, k, g1, eta, 0, w.first, dzq.data(), dq.data(), dk.data(),
                     dg1.data(), deta.data(), dw.first);
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

        scan_.write(r, dq, dk, dtarget, deta);
    }

    Args<T> &args_;
    ScanGradient<T> scan_;
    const int64_t d_, f_;
};

template <class T> void ttt_mlp_vjp(Args<T> &args) { MlpGradient<T>(args).run(); }

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
    check_ttt_mlp};

} // namespace ponder::reference
