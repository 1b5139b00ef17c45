// softmax: y_j = exp(x_j - lse), lse = log sum_j exp(x_j), over the last dim; causal: row i of the
//          last two dims has columns j <= i, the others are 0
// log_sum_exp: y = lse     sum_last: y = sum_j x_j
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

int64_t last(const ponder_tensor &t) { return t.dim[t.rank - 1]; }

template <class T> void softmax(Args<T> &args) {
    const ponder_tensor &shape = args.shape_in(0);
    const int64_t n = last(shape), rows = count_of(shape) / n;
    const bool causal = args.attr(0) != 0;
    const T *x = args.in(0);
    T *y = args.out(0);
    for (int64_t r = 0; r < rows; ++r, x += n, y += n) {
        const int64_t seen = causal ? std::min(n, r % shape.dim[shape.rank - 2] + 1) : n;
        const T top = *std::max_element(x, x + seen);
        double sum = 0;
        for (int64_t j = 0; j < seen; ++j)
            sum += y[j] = std::exp(x[j] - top);
        for (int64_t j = 0; j < seen; ++j)
            y[j] = T(y[j] / sum);
        std::fill(y + seen, y + n, T(0));
    }
}

template <class T> void log_sum_exp(Args<T> &args) {
    const int64_t n = last(args.shape_in(0)), rows = count_of(args.shape_out(0));
    const T *x = args.in(0);
    T *y = args.out(0);
    for (int64_t r = 0; r < rows; ++r, x += n) {
        const T top = *std::max_element(x, x + n);
        double sum = 0;
        for (int64_t j = 0; j < n; ++j)
            sum += std::exp(x[j] - top);
        y[r] = T(double(top) + std::log(sum));
    }
}

template <class T> void sum_last(Args<T> &args) {
    const int64_t n = last(args.shape_in(0)), rows = count_of(args.shape_out(0));
    const T *x = args.in(0);
    T *y = args.out(0);
    for (int64_t r = 0; r < rows; ++r, x += n) {
        double sum = 0;
        for (int64_t j = 0; j < n; ++j)
            sum += double(x[j]);
        y[r] = T(sum);
    }
}

const char *check_same(const ponder_tensor *t, const double *attr) {
    if (t[0].rank < (attr[0] != 0 ? 2 : 1) || t[0].rank != t[1].rank ||
        !std::equal(t[0].dim, t[0].dim + t[0].rank, t[1].dim))
        return "x and y must have one shape, with rows and columns when causal";
    return nullptr;
}

const char *check_reduced(const ponder_tensor *t, const double *) {
    if (t[0].rank < 1 || t[0].rank != t[1].rank || last(t[1]) != 1 ||
        !std::equal(t[0].dim, t[0].dim + t[0].rank - 1, t[1].dim))
        return "y must be x with 1 as its last dim";
    return nullptr;
}

} // namespace

const Op softmax_op = {"softmax",       "x[*] -> y[*]", 1,         softmax<float>,
                       softmax<double>, nullptr,        check_same};
const Op log_sum_exp_op = {"log_sum_exp",      "x[*] -> y[*]",      0,
                           log_sum_exp<float>, log_sum_exp<double>, nullptr,
                           check_reduced};
const Op sum_last_op = {"sum_last", "x[*] -> y[*]", 0, sum_last<float>, sum_last<double>,
                        nullptr,    check_reduced};

} // namespace ponder::reference
