// add: y = a + b    sub: y = a - b    mul: y = a b    broadcast: y = x, all broadcast to y
// sum_to: y = the sums of x over what broadcast would repeat, the vjp of broadcast
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T, class F> void combine(Args<T> &args, F f) {
    const T *a = args.in(0), *b = args.in(1);
    T *y = args.out(0);
    const Broadcast at_a(args.shape_in(0), args.shape_out(0));
    const Broadcast at_b(args.shape_in(1), args.shape_out(0));
    const int64_t n = count_of(args.shape_out(0));
    for (int64_t i = 0; i < n; ++i)
        y[i] = f(a[at_a(i)], b[at_b(i)]);
}

template <class T> void add(Args<T> &args) {
    combine(args, [](T a, T b) { return a + b; });
}

template <class T> void sub(Args<T> &args) {
    combine(args, [](T a, T b) { return a - b; });
}

template <class T> void mul(Args<T> &args) {
    combine(args, [](T a, T b) { return a * b; });
}

template <class T> void broadcast(Args<T> &args) {
    const T *x = args.in(0);
    T *y = args.out(0);
    const Broadcast at(args.shape_in(0), args.shape_out(0));
    const int64_t n = count_of(args.shape_out(0));
    for (int64_t i = 0; i < n; ++i)
        y[i] = x[at(i)];
}

template <class T> void sum_to(Args<T> &args) {
    const T *x = args.in(0);
    T *y = args.out(0);
    const Broadcast at(args.shape_out(0), args.shape_in(0));
    const int64_t n = count_of(args.shape_in(0));
    std::vector<double> sum(size_t(count_of(args.shape_out(0))));
    for (int64_t i = 0; i < n; ++i)
        sum[size_t(at(i))] += double(x[i]);
    std::transform(sum.begin(), sum.end(), y, [](double s) { return T(s); });
}

const char *check_two(const ponder_tensor *t, const double *) {
    return Broadcast::fits(t[0], t[2]) && Broadcast::fits(t[1], t[2])
               ? nullptr
               : "a and b must broadcast to y";
}

const char *check_broadcast(const ponder_tensor *t, const double *) {
    return Broadcast::fits(t[0], t[1]) ? nullptr : "x must broadcast to y";
}

const char *check_sum(const ponder_tensor *t, const double *) {
    return Broadcast::fits(t[1], t[0]) ? nullptr : "y must broadcast to x";
}

} // namespace

const Op add_op = {"add", "a[*] b[*] -> y[*]", 0, add<float>, add<double>, nullptr, check_two};
const Op sub_op = {"sub", "a[*] b[*] -> y[*]", 0, sub<float>, sub<double>, nullptr, check_two};
const Op mul_op = {"mul", "a[*] b[*] -> y[*]", 0, mul<float>, mul<double>, nullptr, check_two};
const Op broadcast_op = {"broadcast", "x[*] -> y[*]", 0, broadcast<float>, broadcast<double>,
                         nullptr,     check_broadcast};
const Op sum_to_op = {"sum_to",       "x[*] -> y[*]", 0,        sum_to<float>,
                      sum_to<double>, nullptr,        check_sum};

} // namespace ponder::reference
