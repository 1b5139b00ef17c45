// gelu: y = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2   Hendrycks & Gimpel 2016, 1606.08415
// vjp:  dx = dy gelu'(x)
// gelu_derivative: with t = tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3) and p = 1 - t^2
//       t' = p u', t'' = p' u' + p u'', t''' = p'' u' + 2 p' u'' + p u'''
//       gelu' = (1 + t + x t') / 2, gelu'' = t' + x t'' / 2, gelu''' = (3 t'' + x t''') / 2
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void gelu(Args<T> &args) {
    const T *x = args.in(0);
    T *y = args.out(0);
    for (int64_t i = 0; i < args['.']; ++i)
        y[i] = gelu_of(x[i]);
}

template <class T> void gelu_vjp(Args<T> &args) {
    const T *dy = args.in(0), *x = args.in(1);
    T *dx = args.out(0);
    for (int64_t i = 0; i < args['.']; ++i)
        dx[i] = dy[i] * gelu_slope(x[i]);
}

template <class T> void gelu_derivative(Args<T> &args) {
    const int64_t order = args.attr_int(0);
    const T *x_all = args.in(0);
    T *y = args.out(0);
    const T s = T(gelu_scale), c = T(gelu_cube);
    for (int64_t i = 0; i < args['.']; ++i) {
        const T x = x_all[i], t = std::tanh(s * (x + c * x * x * x)), p = 1 - t * t;
        const T u1 = s * (1 + 3 * c * x * x), u2 = 6 * s * c * x, u3 = 6 * s * c;
        const T t1 = p * u1, p1 = -2 * t * t1, t2 = p1 * u1 + p * u2;
        const T p2 = -2 * (t1 * t1 + t * t2), t3 = p2 * u1 + 2 * p1 * u2 + p * u3;
        y[i] = order == 1   ? (1 + t + x * t1) / 2
               : order == 2 ? t1 + x * t2 / 2
                            : (3 * t2 + x * t3) / 2;
    }
}

const char *check(const Sizes &, const double *attr) {
    return attr[0] == 1 || attr[0] == 2 || attr[0] == 3 ? nullptr : "order must be 1, 2 or 3";
}

} // namespace

const Op gelu_op = {"gelu", "x[...] -> y[...]", 0, gelu<float>, gelu<double>};

const Op gelu_vjp_op = {"gelu_vjp", "dy[...] x[...] -> dx[...]", 0, gelu_vjp<float>,
                        gelu_vjp<double>};

const Op gelu_derivative_op = {"gelu_derivative",      "x[...] -> y[...]",      1,
                               gelu_derivative<float>, gelu_derivative<double>, check};

} // namespace ponder::reference
