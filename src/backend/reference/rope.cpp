// rope: pairs (x_2i, x_2i+1) of each head turn by (t mod period) theta^(-2i/D), back by it if
// inverse Su et al. 2021, arXiv 2104.09864; interleaved, positions modulo the mini-batch as in
// official TTT
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void rope(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'];
    const int64_t d = width / args.attr_int(0), period = args.attr_int(1);
    const double theta = args.attr(2), turn = args.attr(3) != 0 ? -1 : 1;
    const T *x = args.in(0);
    T *y = args.out(0);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < d; i += 2) {
            const double angle = double(t % period) * std::pow(theta, -double(i) / double(d));
            const T cosine = T(std::cos(angle)), sine = T(turn * std::sin(angle));
            for (int64_t s = 0; s < streams; ++s)
                for (int64_t c = i; c < width; c += d) {
                    const int64_t at = (s * tokens + t) * width + c;
                    const T a = x[at], b = x[at + 1];
                    y[at] = a * cosine - b * sine;
                    y[at + 1] = a * sine + b * cosine;
                }
        }
}

const char *check(const Sizes &sizes, const double *attr) {
    const int64_t heads = int64_t(attr[0]);
    return heads >= 1 && sizes['C'] % heads == 0 && sizes['C'] / heads % 2 == 0 && attr[1] >= 1
               ? nullptr
               : "heads must cut C into even widths, and the period be positive";
}

} // namespace

const Op rope_op = {"rope", "x[S,T,C] -> y[S,T,C]", 4, rope<float>, rope<double>, check, nullptr,
                    1};

} // namespace ponder::reference
