// norm: y = |a - b|, or |a|
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void norm(Args<T> &args) {
    const T *a = args.in(0), *b = args.in(1);
    double sum = 0;
    for (int64_t i = 0; i < args['.']; ++i) {
        const double x = double(a[i]) - (b ? double(b[i]) : 0.0);
        sum += x * x;
    }
    *args.out(0) = T(std::sqrt(sum));
}

} // namespace

const Op norm_op = {"norm", "a:w[...] b?:w[...] -> y:w[1]", 0, norm<float>, norm<double>};

} // namespace ponder::reference
