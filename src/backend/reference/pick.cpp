// pick: y_t = x_t[target_t], 0 without target     vjp: dx_t[target_t] = dy_t, zeros elsewhere
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void pick(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['V'];
    const T *x = args.in(0);
    const int32_t *target = args.ids(1);
    T *y = args.out(0);
    for (int64_t r = 0; r < rows; ++r)
        y[r] = target[r] < 0 ? T(0) : x[r * width + target[r]];
}

template <class T> void pick_vjp(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['V'];
    const T *dy = args.in(0);
    const int32_t *target = args.ids(1);
    T *dx = args.out(0);
    std::fill_n(dx, rows * width, T(0));
    for (int64_t r = 0; r < rows; ++r)
        if (target[r] >= 0)
            dx[r * width + target[r]] = dy[r];
}

} // namespace

const Op pick_op = {"pick", "x[S,T,V] target:i[S,T] -> y[S,T,1]", 0, pick<float>, pick<double>};
const Op pick_vjp_op = {"pick_vjp", "dy[S,T,1] target:i[S,T] -> dx[S,T,V]", 0, pick_vjp<float>,
                        pick_vjp<double>};

} // namespace ponder::reference
