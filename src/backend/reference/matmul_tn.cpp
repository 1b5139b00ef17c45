// matmul_tn: c = a^T b for each stream: the gradient of a weight from its input and output sides
// matmul_tn_sum: the sum over streams, for a weight that the streams share
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void matmul_tn(Args<T> &args) {
    const int64_t tokens = args['T'], m = args['M'], n = args['N'];
    const T *a = args.in(0), *b = args.in(1);
    T *c = args.out(0);
    std::fill_n(c, args['S'] * m * n, T(0));
    for (int64_t s = 0; s < args['S']; ++s)
        product_tn(m, n, tokens, a + s * tokens * m, b + s * tokens * n, c + s * m * n);
}

template <class T> void matmul_tn_sum(Args<T> &args) {
    const int64_t m = args['M'], n = args['N'];
    T *c = args.out(0);
    std::fill_n(c, m * n, T(0));
    product_tn(m, n, args['S'] * args['T'], args.in(0), args.in(1), c);
}

} // namespace

const Op matmul_tn_op = {"matmul_tn", "a[S,T,M] b[S,T,N] -> c:w[S,M,N]", 0, matmul_tn<float>,
                         matmul_tn<double>};

const Op matmul_tn_sum_op = {"matmul_tn_sum", "a[S,T,M] b[S,T,N] -> c:w[M,N]", 0,
                             matmul_tn_sum<float>, matmul_tn_sum<double>};

} // namespace ponder::reference
