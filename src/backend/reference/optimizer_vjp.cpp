// The vjps of adam and sgd. With c the clip factor and g~ = c g the gradient that was used:
//   adam: Dm = dm' - rate dw' / (unbias1 (root + eps)),  root = sqrt(v' / unbias2)
//         Dv = dv' + rate dw' (m' / unbias1) / (root + eps)^2 / (2 root unbias2), nothing at v' = 0
//         dm = beta1 Dm, dv = beta2 Dv, dg~ = (1-beta1) Dm + 2 (1-beta2) g~ Dv
//   sgd:  dg~ = -rate dw'
//   both: dw = keep dw', dstart = (1-keep) dw', dkeep = (w - start) dw', drate = -update dw'
//         dg = c dg~ + (dg~ . g) dc/dg,  dc/dg = -c / (gnorm + 1e-6) g / gnorm where it clips:
// gnorm is taken to be |g|, of which the caller's tensor holds the value.
#include "backend/reference/optimizer.hpp"

namespace ponder::reference {
namespace {

// dg~ in dg becomes dg.
template <class T> void through_clip(int64_t n, const Hyper<T> &h, const T *g, T *dg) {
    if (!h.clipped)
        return;
    double along = 0;
    for (int64_t i = 0; i < n; ++i)
        along += double(dg[i]) * double(g[i]);
    const T back = h.gnorm > 0 ? T(along) * h.factor / ((h.gnorm + T(1e-6)) * h.gnorm) : T(0);
    for (int64_t i = 0; i < n; ++i)
        dg[i] = h.factor * dg[i] - back * g[i];
}

// What passes the step itself: dw and the optional three; `update` is that of element i.
template <class T> struct StepGradient {
    const Step<T> &step;
    T *dw, *rate, *keep, *start;
    void operator()(int64_t i, T w, T update, T dw_next) const {
        if (rate)
            rate[i] = -update * dw_next;
        if (keep)
            keep[i] = (w - step.start_of(i)) * dw_next;
        if (start)
            start[i] = (1 - step.keep_of(i)) * dw_next;
        dw[i] = step.keep_of(i) * dw_next;
    }
};

template <class T> void adam_vjp(Args<T> &args) {
    const int64_t n = args['.'];
    const T *w = args.in(0), *g = args.in(1), *m = args.in(2), *v = args.in(3);
    const Hyper<T> h(args.in(4), *args.in(5));
    const Step<T> step{h.lr, args.in(6), args.in(7), args.in(8)};
    const T *dw_next = args.in(9), *dm_next = args.in(10), *dv_next = args.in(11);
    T *dg = args.out(1), *dm = args.out(2), *dv = args.out(3);
    const StepGradient<T> back{step, args.out(0), args.out(4), args.out(5), args.out(6)};
    for (int64_t i = 0; i < n; ++i) {
        const Moments<T> next = h.moments(g[i], m[i], v[i]);
        const T root = std::sqrt(next.v / h.unbias2), below = root + h.eps;
        const T gw = dw_next ? dw_next[i] : T(0), du = -step.rate_of(i) * gw;
        const T to_m = (dm_next ? dm_next[i] : T(0)) + du / (h.unbias1 * below);
        T to_v = dv_next ? dv_next[i] : T(0);
        if (next.v > 0)
            to_v -= du * (next.m / h.unbias1) / (below * below) / (2 * root * h.unbias2);
        const T update = h.update(next);
        dm[i] = h.beta1 * to_m;
        dv[i] = h.beta2 * to_v;
        dg[i] = (1 - h.beta1) * to_m + 2 * (1 - h.beta2) * h.factor * g[i] * to_v;
        back(i, w[i], update, gw);
    }
    through_clip(n, h, g, dg);
}

template <class T> void sgd_vjp(Args<T> &args) {
    const int64_t n = args['.'];
    const T *w = args.in(0), *g = args.in(1);
    const Hyper<T> h(args.in(2), *args.in(3));
    const Step<T> step{h.lr, args.in(4), args.in(5), args.in(6)};
    const T *dw_next = args.in(7);
    T *dg = args.out(1);
    const StepGradient<T> back{step, args.out(0), args.out(2), args.out(3), args.out(4)};
    for (int64_t i = 0; i < n; ++i) {
        dg[i] = -step.rate_of(i) * dw_next[i];
        back(i, w[i], h.factor * g[i], dw_next[i]);
    }
    through_clip(n, h, g, dg);
}

} // namespace

const Op adam_vjp_op = {
    "adam_vjp",
    "w:w[...] g:w[...] m:w[...] v:w[...] h:w[8] gnorm:w[1] rate?:w[...] keep?:w[...] "
    "start?:w[...] dw'?:w[...] dm'?:w[...] dv'?:w[...] -> dw:w[...] dg:w[...] dm:w[...] dv:w[...] "
    "drate?:w[...] dkeep?:w[...] dstart?:w[...]",
    0, adam_vjp<float>, adam_vjp<double>};

const Op sgd_vjp_op = {
    "sgd_vjp",
    "w:w[...] g:w[...] h:w[8] gnorm:w[1] rate?:w[...] keep?:w[...] start?:w[...] dw':w[...] -> "
    "dw:w[...] dg:w[...] drate?:w[...] dkeep?:w[...] dstart?:w[...]",
    0, sgd_vjp<float>, sgd_vjp<double>};

} // namespace ponder::reference
