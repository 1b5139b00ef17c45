// layer_norm: h = (x - mean) / sqrt(var + eps), y = g h + b      Ba et al. 2016, arXiv 1607.06450
// vjp:        u = g dy, dx = carry + (u - mean(u) - h mean(u h)) / std
// weight:     dg = sum over rows of dy h, db = sum of dy
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void layer_norm(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['C'];
    const double eps = args.attr(0);
    const T *x = args.in(0), *g = args.in(1), *b = args.in(2);
    T *y = args.out(0), *stats = args.out(1);
    for (int64_t r = 0; r < rows; ++r, x += width, y += width, stats += 2) {
        double mean = 0, variance = 0;
        for (int64_t j = 0; j < width; ++j)
            mean += x[j];
        mean /= double(width);
        for (int64_t j = 0; j < width; ++j)
            variance += (x[j] - mean) * (x[j] - mean);
        stats[0] = T(mean);
        stats[1] = T(1 / std::sqrt(variance / double(width) + eps));
        for (int64_t j = 0; j < width; ++j)
            y[j] = g[j] * ((x[j] - stats[0]) * stats[1]) + b[j];
    }
}

template <class T> void layer_norm_vjp(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['C'];
    const T *dy = args.in(0), *x = args.in(1), *g = args.in(2), *stats = args.in(3);
    const T *carry = args.in(4);
    T *dx = args.out(0);
    for (int64_t r = 0; r < rows; ++r, dy += width, x += width, dx += width, stats += 2) {
        double mean_u = 0, mean_uh = 0;
        for (int64_t j = 0; j < width; ++j) {
            const T u = g[j] * dy[j], h = (x[j] - stats[0]) * stats[1];
            mean_u += u;
            mean_uh += double(u) * h;
        }
        mean_u /= double(width);
        mean_uh /= double(width);
        for (int64_t j = 0; j < width; ++j) {
            const T u = g[j] * dy[j], h = (x[j] - stats[0]) * stats[1];
            dx[j] =
                (carry ? carry[r * width + j] : T(0)) + (u - T(mean_u) - h * T(mean_uh)) * stats[1];
        }
    }
}

template <class T> void layer_norm_vjp_weight(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['C'];
    const T *dy = args.in(0), *x = args.in(1), *stats = args.in(2);
    T *dg = args.out(0), *db = args.out(1);
    std::vector<double> sum_g(static_cast<size_t>(width)), sum_b(static_cast<size_t>(width));
    for (int64_t r = 0; r < rows; ++r, dy += width, x += width, stats += 2)
        for (int64_t j = 0; j < width; ++j) {
            sum_g[size_t(j)] += double(dy[j] * ((x[j] - stats[0]) * stats[1]));
            sum_b[size_t(j)] += double(dy[j]);
        }
    std::transform(sum_g.begin(), sum_g.end(), dg, [](double s) { return T(s); });
    std::transform(sum_b.begin(), sum_b.end(), db, [](double s) { return T(s); });
}

} // namespace

const Op layer_norm_op = {"layer_norm", "x[S,T,C] g[C] b[C] -> y[S,T,C] stats:w[S,T,2]", 1,
                          layer_norm<float>, layer_norm<double>};

const Op layer_norm_vjp_op = {
    "layer_norm_vjp", "dy[S,T,C] x[S,T,C] g[C] stats:w[S,T,2] carry?:w[S,T,C] -> dx:w[S,T,C]", 0,
    layer_norm_vjp<float>, layer_norm_vjp<double>};

const Op layer_norm_vjp_weight_op = {"layer_norm_vjp_weight",
                                     "dy[S,T,C] x[S,T,C] stats:w[S,T,2] -> dg:w[C] db:w[C]", 0,
                                     layer_norm_vjp_weight<float>, layer_norm_vjp_weight<double>};

} // namespace ponder::reference
