// split_heads: y[s,h,t,:] = x[s,t, part C / parts + h D ...]: one of the parts that stand side by
//              side in x, a head's rows together
// merge_heads: the way back, its vjp; zeros in the other parts
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void split_heads(Args<T> &args) {
    const int64_t tokens = args['T'], width = args['C'], heads = args['H'], d = args['D'];
    const T *x = args.in(0) + args.attr_int(1) * heads * d;
    T *y = args.out(0);
    for (int64_t s = 0; s < args['S']; ++s)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < tokens; ++t, y += d)
                std::copy_n(x + (s * tokens + t) * width + h * d, d, y);
}

template <class T> void merge_heads(Args<T> &args) {
    const int64_t tokens = args['T'], width = args['C'], heads = args['H'], d = args['D'];
    const T *x = args.in(0);
    T *y = args.out(0);
    std::fill_n(y, args['S'] * tokens * width, T(0));
    y += args.attr_int(1) * heads * d;
    for (int64_t s = 0; s < args['S']; ++s)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < tokens; ++t, x += d)
                std::copy_n(x, d, y + (s * tokens + t) * width + h * d);
}

const char *check(const Sizes &sizes, const double *attr) {
    return attr[0] == double(sizes['H']) && attr[1] >= 0 && attr[1] < attr[2] &&
                   double(sizes['C']) == attr[2] * double(sizes['H'] * sizes['D'])
               ? nullptr
               : "C must be parts x heads x D, and part one of the parts";
}

} // namespace

const Op split_heads_op = {"split_heads",      "x[S,T,C] -> y[S,H,T,D]", 3,
                           split_heads<float>, split_heads<double>,      check};
const Op merge_heads_op = {"merge_heads",      "x[S,H,T,D] -> y[S,T,C]", 3,
                           merge_heads<float>, merge_heads<double>,      check};

} // namespace ponder::reference
