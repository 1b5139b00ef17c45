// mean: y = sum(x) / count     vjp: dx = dy / count     fill: y = value
#include "backend/reference/kernel.hpp"

#include <numeric>

namespace ponder::reference {
namespace {

template <class T> void mean(Args<T> &args) {
    const T *x = args.in(0);
    *args.out(0) = T(std::accumulate(x, x + args['.'], 0.0) / args.attr(0));
}

template <class T> void mean_vjp(Args<T> &args) {
    std::fill_n(args.out(0), args['.'], T(*args.in(0) / args.attr(0)));
}

template <class T> void fill(Args<T> &args) {
    std::fill_n(args.out(0), args['.'], T(args.attr(0)));
}

const char *check(const Sizes &, const double *attr) {
    return attr[0] > 0 ? nullptr : "count must be positive";
}

} // namespace

const Op mean_op = {"mean", "x:w[...] -> y:w[1]", 1, mean<float>, mean<double>, check};
const Op mean_vjp_op = {"mean_vjp",      "dy:w[1] -> dx:w[...]", 1,
                        mean_vjp<float>, mean_vjp<double>,       check};
const Op fill_op = {"fill", "-> y:w[...]", 1, fill<float>, fill<double>};

} // namespace ponder::reference
