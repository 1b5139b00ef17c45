// add: y = a + b     mul: y = a b     sigmoid: y = 1 / (1 + exp(-x))
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void add(Args<T> &args) {
    const T *a = args.in(0), *b = args.in(1);
    T *y = args.out(0);
    for (int64_t i = 0; i < args['.']; ++i)
        y[i] = a[i] + b[i];
}

template <class T> void mul(Args<T> &args) {
    const T *a = args.in(0), *b = args.in(1);
    T *y = args.out(0);
    for (int64_t i = 0; i < args['.']; ++i)
        y[i] = a[i] * b[i];
}

template <class T> void sigmoid(Args<T> &args) {
    const T *x = args.in(0);
    T *y = args.out(0);
    for (int64_t i = 0; i < args['.']; ++i)
        y[i] = 1 / (1 + std::exp(-x[i]));
}

} // namespace

const Op add_op = {"add", "a[...] b[...] -> y[...]", 0, add<float>, add<double>};
const Op mul_op = {"mul", "a[...] b[...] -> y[...]", 0, mul<float>, mul<double>};
const Op sigmoid_op = {"sigmoid", "x[...] -> y[...]", 0, sigmoid<float>, sigmoid<double>};

} // namespace ponder::reference
