// conv1d: y_t = b + sum_{j<4} w_j x_{t-3-shift+j}, depthwise and causal;
// before the start stand the 3 + shift rows of `before`, or zeros.
// shift 0 is the convolution of ttt-lm-pytorch, shift 1 (never sees x_t) that of PonderTTT.
// vjp:    dx_{t-3-shift+j} += w_j dy_t, dw_j = sum x_{t-3-shift+j} dy_t, db = sum dy_t
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void conv1d(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'];
    const int64_t shift = args.attr_int(0);
    const T *x = args.in(0), *w = args.in(1), *b = args.in(2), *before = args.in(3);
    const int64_t earlier = before ? 3 + shift : 0;
    T *y = args.out(0);
    for (int64_t s = 0; s < streams; ++s, x += tokens * width, before += earlier * width)
        for (int64_t t = 0; t < tokens; ++t, y += width) {
            std::copy_n(b, width, y);
            for (int64_t j = 0; j < 4; ++j) {
                const int64_t from = t - 3 - shift + j;
                if (from + earlier < 0)
                    continue;
                const T *row = from < 0 ? before + (from + earlier) * width : x + from * width;
                for (int64_t c = 0; c < width; ++c)
                    y[c] += w[j * width + c] * row[c];
            }
        }
}

template <class T> void conv1d_vjp(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'];
    const int64_t shift = args.attr_int(0);
    const T *dy = args.in(0), *x = args.in(1), *w = args.in(2);
    T *dx = args.out(0), *dw = args.out(1), *db = args.out(2);
    std::fill_n(dx, streams * tokens * width, T(0));
    std::fill_n(dw, 4 * width, T(0));
    std::fill_n(db, width, T(0));
    for (int64_t s = 0; s < streams; ++s, x += tokens * width, dx += tokens * width)
        for (int64_t t = 0; t < tokens; ++t, dy += width) {
            axpy(width, T(1), dy, db);
            for (int64_t j = 0; j < 4; ++j) {
                const int64_t from = t - 3 - shift + j;
                if (from < 0)
                    continue;
                for (int64_t c = 0; c < width; ++c) {
                    dx[from * width + c] += w[j * width + c] * dy[c];
                    dw[j * width + c] += x[from * width + c] * dy[c];
                }
            }
        }
}

const char *check(const Sizes &sizes, const double *attr) {
    if (sizes['B'] != 0 && double(sizes['B']) != 3 + attr[0])
        return "before must hold 3 + shift rows";
    return attr[0] >= 0 ? nullptr : "a negative shift would read later tokens";
}

} // namespace

const Op conv1d_op = {
    "conv1d", "x[S,T,C] w[4,C] b[C] before??[S,B,C] -> y[S,T,C]", 1, conv1d<float>, conv1d<double>,
    check};

const Op conv1d_vjp_op = {"conv1d_vjp",
                          "dy[S,T,C] x[S,T,C] w[4,C] -> dx[S,T,C] dw:w[4,C] db:w[C]",
                          1,
                          conv1d_vjp<float>,
                          conv1d_vjp<double>,
                          check};

} // namespace ponder::reference
