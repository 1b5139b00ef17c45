// slice_rows: y[s,i] = x[s, first + i]
// vjp:        dx[s, first + i] = dy[s,i], zeros elsewhere
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void slice_rows(Args<T> &args) {
    const int64_t tokens = args['T'], taken = args['N'], width = args['C'];
    const T *x = args.in(0) + args.attr_int(0) * width;
    T *y = args.out(0);
    for (int64_t s = 0; s < args['S']; ++s)
        std::copy_n(x + s * tokens * width, taken * width, y + s * taken * width);
}

template <class T> void slice_rows_vjp(Args<T> &args) {
    const int64_t tokens = args['T'], taken = args['N'], width = args['C'];
    const T *dy = args.in(0);
    T *dx = args.out(0);
    std::fill_n(dx, args['S'] * tokens * width, T(0));
    for (int64_t s = 0; s < args['S']; ++s)
        std::copy_n(dy + s * taken * width, taken * width,
                    dx + (s * tokens + args.attr_int(0)) * width);
}

const char *check(const Sizes &sizes, const double *attr) {
    return attr[0] >= 0 && int64_t(attr[0]) + sizes['N'] <= sizes['T'] ? nullptr
                                                                       : "the slice ends after T";
}

} // namespace

const Op slice_rows_op = {"slice_rows",      "x[S,T,C] -> y[S,N,C]", 1,
                          slice_rows<float>, slice_rows<double>,     check};

const Op slice_rows_vjp_op = {"slice_rows_vjp",      "dy[S,N,C] -> dx[S,T,C]", 1,
                              slice_rows_vjp<float>, slice_rows_vjp<double>,   check};

} // namespace ponder::reference
