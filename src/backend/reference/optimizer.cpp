// adam: m' = beta1 m + (1-beta1) g, v' = beta2 v + (1-beta2) g^2
//       w' = w - lr (m' / (1-beta1^t)) / (sqrt(v' / (1-beta2^t)) + eps)
//                                                           Kingma & Ba 2014, arXiv 1412.6980
// sgd:  w' = w - lr g
// Both take g min(1, clip / (gnorm + 1e-6)) for g when clip > 0. Each element is read before it is
// written, so outputs may alias inputs.
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

// h = lr, beta1, beta2, eps, 1-beta1^t, 1-beta2^t, clip
template <class T> T clip_factor(const T *h, T gradient_norm) {
    const T clip = h[6];
    return clip > 0 ? std::min(T(1), clip / (gradient_norm + T(1e-6))) : T(1);
}

template <class T> void adam(Args<T> &args) {
    const T *w = args.in(0), *g = args.in(1), *m = args.in(2), *v = args.in(3), *h = args.in(4);
    const T factor = clip_factor(h, *args.in(5));
    const T lr = h[0], beta1 = h[1], beta2 = h[2], eps = h[3], unbias1 = h[4], unbias2 = h[5];
    T *w_next = args.out(0), *m_next = args.out(1), *v_next = args.out(2);
    for (int64_t i = 0; i < args['.']; ++i) {
        const T gradient = factor * g[i];
        const T mi = beta1 * m[i] + (1 - beta1) * gradient;
        const T vi = beta2 * v[i] + (1 - beta2) * gradient * gradient;
        m_next[i] = mi;
        v_next[i] = vi;
        w_next[i] = w[i] - lr * (mi / unbias1) / (std::sqrt(vi / unbias2) + eps);
    }
}

template <class T> void sgd(Args<T> &args) {
    const T *w = args.in(0), *g = args.in(1), *h = args.in(2);
    const T step = h[0] * clip_factor(h, *args.in(3));
    T *w_next = args.out(0);
    for (int64_t i = 0; i < args['.']; ++i)
        w_next[i] = w[i] - step * g[i];
}

} // namespace

const Op adam_op = {
    "adam", "w:w[...] g:w[...] m:w[...] v:w[...] h:w[8] gnorm:w[1] -> w:w[...] m:w[...] v:w[...]",
    0, adam<float>, adam<double>};

const Op sgd_op = {"sgd", "w:w[...] g:w[...] h:w[8] gnorm:w[1] -> w:w[...]", 0, sgd<float>,
                   sgd<double>};

} // namespace ponder::reference
