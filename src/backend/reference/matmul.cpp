// matmul: c = a b for each of the leading dims; ta, tb: a or b is stored transposed
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void matmul(Args<T> &args) {
    const bool ta = args.attr(0) != 0, tb = args.attr(1) != 0;
    const ponder_tensor &shape = args.shape_in(0), &result = args.shape_out(0);
    const int64_t m = result.dim[result.rank - 2], n = result.dim[result.rank - 1];
    const int64_t k = shape.dim[shape.rank - (ta ? 2 : 1)], count = count_of(result) / (m * n);
    const T *a = args.in(0), *b = args.in(1);
    T *c = args.out(0), *a_plain = args.scratch(ta && tb ? m * k : 0);
    std::fill_n(c, count * m * n, T(0));
    for (int64_t i = 0; i < count; ++i, a += m * k, b += k * n, c += m * n) {
        if (ta && tb) {
            transpose(k, m, a, m, a_plain);
            product_nt(m, n, k, a_plain, b, c);
        } else if (ta) {
            product_tn(m, n, k, a, b, c);
        } else if (tb) {
            product_nt(m, n, k, a, b, c);
        } else {
            product(m, n, k, a, b, c);
        }
    }
}

const char *check(const ponder_tensor *t, const double *attr) {
    const int32_t rank = t[0].rank;
    if (rank < 2 || t[1].rank != rank || t[2].rank != rank)
        return "a, b and c must have equal ranks of 2 or more";
    const int64_t *a = t[0].dim + rank - 2, *b = t[1].dim + rank - 2, *c = t[2].dim + rank - 2;
    const bool ta = attr[0] != 0, tb = attr[1] != 0;
    if (a[ta] != c[0] || b[!tb] != c[1] || a[!ta] != b[tb])
        return "a [M,K], b [K,N] and c [M,N] do not fit";
    for (int32_t i = 0; i < rank - 2; ++i)
        if (t[0].dim[i] != t[2].dim[i] || t[1].dim[i] != t[2].dim[i])
            return "leading dims must be equal";
    return nullptr;
}

} // namespace

const Op matmul_op = {"matmul", "a[*] b[*] -> c[*]", 2, matmul<float>, matmul<double>, nullptr,
                      check};

} // namespace ponder::reference
