// linear: y = add + x w + b, or x w^T when transposed. Its vjp in x is itself with the other flag.
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void linear(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], depth = args['K'], width = args['N'];
    const T *x = args.in(0), *w = args.weight(1, 4), *b = args.in(2), *add = args.in(3);
    T *y = args.out(0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < width; ++j)
            y[r * width + j] = (add ? add[r * width + j] : T(0)) + (b ? b[j] : T(0));
    if (args.attr_int(0))
        product_nt(rows, width, depth, x, w, y);
    else
        product(rows, width, depth, x, w, y);
}

const char *check(const Sizes &sizes, const double *attr) {
    const bool transposed = attr[0] != 0;
    return sizes[transposed ? 'B' : 'A'] == sizes['K'] &&
                   sizes[transposed ? 'A' : 'B'] == sizes['N']
               ? nullptr
               : "tensor 1 (w) is neither [K,N] nor, transposed, [N,K]";
}

} // namespace

const Op linear_op = {"linear",
                      "x[S,T,K] w:q[A,B] b?[N] add?:w[S,T,N] scales??:s[*] -> y[S,T,N]",
                      1,
                      linear<float>,
                      linear<double>,
                      check};

} // namespace ponder::reference
