// conv1d: y_t = b + sum_{j<4} w_j x_{t-3-shift+j}, zeros before the start; depthwise and causal.
// shift 0 is the convolution of ttt-lm-pytorch, shift 1 (never sees x_t) that of PonderTTT.
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void conv1d(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'];
    const int64_t shift = args.attr_int(0);
    const T *x = args.in(0), *w = args.in(1), *b = args.in(2);
    T *y = args.out(0);
    for (int64_t s = 0; s < streams; ++s, x += tokens * width)
        for (int64_t t = 0; t < tokens; ++t, y += width) {
            std::copy_n(b, width, y);
            for (int64_t j = 0; j < 4; ++j) {
                const int64_t from = t - 3 - shift + j;
                if (from < 0)
                    continue;
                for (int64_t c = 0; c < width; ++c)
                    y[c] += w[j * width + c] * x[from * width + c];
            }
        }
}

const char *check(const Sizes &, const double *attr) {
    return attr[0] >= 0 ? nullptr : "a negative shift would read later tokens";
}

} // namespace

const Op conv1d_op = {
    "conv1d", "x[S,T,C] w[4,C] b[C] -> y[S,T,C]", 1, conv1d<float>, conv1d<double>, check};

} // namespace ponder::reference
