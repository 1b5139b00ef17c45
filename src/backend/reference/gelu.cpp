// gelu: y = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2   Hendrycks & Gimpel 2016, 1606.08415
// vjp:  dx = dy gelu'(x)
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

} // namespace

const Op gelu_op = {"gelu", "x[...] -> y[...]", 0, gelu<float>, gelu<double>};

const Op gelu_vjp_op = {"gelu_vjp", "dy[...] x[...] -> dx[...]", 0, gelu_vjp<float>,
                        gelu_vjp<double>};

} // namespace ponder::reference
