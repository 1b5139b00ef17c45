// sigmoid: y = 1 / (1 + exp(-x))      affine: y = factor x + offset     power: y = x^exponent
// exp, relu: y = max(x, 0)            step: y = 1 where x > 0, else 0   reshape: y = x
// One element at a time.
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T, class F> void each(Args<T> &args, F f) {
    const T *x = args.in(0);
    std::transform(x, x + args['.'], args.out(0), f);
}

template <class T> void sigmoid(Args<T> &args) {
    each(args, [](T x) { return 1 / (1 + std::exp(-x)); });
}

template <class T> void affine(Args<T> &args) {
    const T factor = T(args.attr(0)), offset = T(args.attr(1));
    each(args, [=](T x) { return factor * x + offset; });
}

// 0 to a negative power is 0: the derivative of a root at 0, which no gradient passes.
template <class T> void power(Args<T> &args) {
    const T exponent = T(args.attr(0));
    each(args, [=](T x) { return x == 0 && exponent < 0 ? T(0) : std::pow(x, exponent); });
}

template <class T> void exponential(Args<T> &args) {
    each(args, [](T x) { return std::exp(x); });
}

template <class T> void relu(Args<T> &args) {
    each(args, [](T x) { return std::max(x, T(0)); });
}

template <class T> void step(Args<T> &args) {
    each(args, [](T x) { return T(x > 0); });
}

template <class T> void reshape(Args<T> &args) {
    each(args, [](T x) { return x; });
}

} // namespace

const Op sigmoid_op = {"sigmoid", "x[...] -> y[...]", 0, sigmoid<float>, sigmoid<double>};
const Op affine_op = {"affine", "x[...] -> y[...]", 2, affine<float>, affine<double>};
const Op power_op = {"power", "x[...] -> y[...]", 1, power<float>, power<double>};
const Op exp_op = {"exp", "x[...] -> y[...]", 0, exponential<float>, exponential<double>};
const Op relu_op = {"relu", "x[...] -> y[...]", 0, relu<float>, relu<double>};
const Op step_op = {"step", "x[...] -> y[...]", 0, step<float>, step<double>};
const Op reshape_op = {"reshape", "x[...] -> y[...]", 0, reshape<float>, reshape<double>};

} // namespace ponder::reference
