// adam:  m' = beta1 m + (1-beta1) g, v' = beta2 v + (1-beta2) g^2
//        update = (m' / (1-beta1^t)) / (sqrt(v' / (1-beta2^t)) + eps)
//        w' = start + keep (w - start) - rate update         Kingma & Ba 2014, arXiv 1412.6980
// sgd:   the same with g for the update
// adamw: w' = w - lr (update + decay w)                  Loshchilov & Hutter 2019, arXiv 1711.05101
// All take g min(1, clip / (gnorm + 1e-6)) for g when clip > 0. Without rate it is lr, without keep
// 1, without start 0. Each element is read before it is written, so outputs may alias inputs.
#include "backend/reference/optimizer.hpp"

namespace ponder::reference {
namespace {

template <class T> void adam(Args<T> &args) {
    const T *w = args.in(0), *g = args.in(1), *m = args.in(2), *v = args.in(3);
    const Hyper<T> h(args.in(4), *args.in(5));
    const Step<T> step{h.lr, args.in(6), args.in(7), args.in(8)};
    T *w_next = args.out(0), *m_next = args.out(1), *v_next = args.out(2);
    for (int64_t i = 0; i < args['.']; ++i) {
        const Moments<T> next = h.moments(g[i], m[i], v[i]);
        m_next[i] = next.m;
        v_next[i] = next.v;
        w_next[i] = step.kept(i, w[i]) - step.rate_of(i) * h.update(next);
    }
}

template <class T> void adamw(Args<T> &args) {
    const T *w = args.in(0), *g = args.in(1), *m = args.in(2), *v = args.in(3), *raw = args.in(4);
    const Hyper<T> h(raw, *args.in(5));
    const T decay = raw[7];
    T *w_next = args.out(0), *m_next = args.out(1), *v_next = args.out(2);
    for (int64_t i = 0; i < args['.']; ++i) {
        const Moments<T> next = h.moments(g[i], m[i], v[i]);
        m_next[i] = next.m;
        v_next[i] = next.v;
        w_next[i] = w[i] - h.lr * (h.update(next) + decay * w[i]);
    }
}

template <class T> void sgd(Args<T> &args) {
    const T *w = args.in(0), *g = args.in(1);
    const Hyper<T> h(args.in(2), *args.in(3));
    const Step<T> step{h.lr, args.in(4), args.in(5), args.in(6)};
    T *w_next = args.out(0);
    for (int64_t i = 0; i < args['.']; ++i)
        w_next[i] = step.kept(i, w[i]) - step.rate_of(i) * h.factor * g[i];
}

} // namespace

const Op adam_op = {"adam",
                    "w:w[...] g:w[...] m:w[...] v:w[...] h:w[8] gnorm:w[1] rate??:w[...] "
                    "keep??:w[...] start??:w[...] -> w:w[...] m:w[...] v:w[...]",
                    0, adam<float>, adam<double>};

const Op adamw_op = {
    "adamw", "w:w[...] g:w[...] m:w[...] v:w[...] h:w[8] gnorm:w[1] -> w:w[...] m:w[...] v:w[...]",
    0, adamw<float>, adamw<double>};

const Op sgd_op = {"sgd",
                   "w:w[...] g:w[...] h:w[8] gnorm:w[1] rate??:w[...] keep??:w[...] "
                   "start??:w[...] -> w:w[...]",
                   0, sgd<float>, sgd<double>};

} // namespace ponder::reference
