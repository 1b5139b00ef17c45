// cross_entropy: l = h table^T, p = softmax(l), nll = -log p[target], entropy = -sum p log p, nats
// vjp:           dh = ((p - onehot(target)) dnll) table; rows without target give 0
// vjp_table:     dtable = ((p - onehot(target)) dnll)^T h
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

constexpr int64_t row_tile = 32; // bounds the logits in memory

template <class T> void cross_entropy(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['C'], vocabulary = args['V'];
    const T *h = args.in(0), *table = args.weight(1, 3);
    const int32_t *target = args.ids(2);
    T *nll = args.out(0), *entropy = args.out(1), *p = args.out(2);
    T *logits = args.scratch(row_tile * vocabulary);
    for (int64_t first = 0; first < rows; first += row_tile) {
        const int64_t n = std::min(row_tile, rows - first);
        std::fill_n(logits, n * vocabulary, T(0));
        product_nt(n, vocabulary, width, h + first * width, table, logits);
        for (int64_t r = first; r < first + n; ++r) {
            const T *l = logits + (r - first) * vocabulary;
            const T top = *std::max_element(l, l + vocabulary);
            // sum e^(l - top) and sum (l - top) e^(l - top)
            double sum = 0, weighted = 0;
            for (int64_t j = 0; j < vocabulary; ++j) {
                const T e = std::exp(l[j] - top);
                sum += e;
                weighted += double(l[j] - top) * e;
                if (p)
                    p[r * vocabulary + j] = e;
            }
            const double log_sum = std::log(sum);
            entropy[r] = T(log_sum - weighted / sum);
            nll[r] = target[r] < 0 ? T(0) : T(log_sum - double(l[target[r]] - top));
            if (!p)
                continue;
            for (int64_t j = 0; j < vocabulary; ++j)
                p[r * vocabulary + j] *= T(1 / sum);
        }
    }
}

// dl = (p - onehot(target)) dnll for rows [first, first + n)
template <class T>
void logit_gradient(int64_t first, int64_t n, int64_t vocabulary, const T *p, const int32_t *target,
                    const T *dnll, T *dl) {
    std::fill_n(dl, n * vocabulary, T(0));
    for (int64_t r = first; r < first + n; ++r) {
        if (target[r] < 0)
            continue;
        T *row = dl + (r - first) * vocabulary;
        axpy(vocabulary, dnll[r], p + r * vocabulary, row);
        row[target[r]] -= dnll[r];
    }
}

template <class T> void cross_entropy_vjp(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['C'], vocabulary = args['V'];
    const T *p = args.in(0), *table = args.weight(1, 4), *dnll = args.in(3);
    const int32_t *target = args.ids(2);
    T *dh = args.out(0), *dl = args.scratch(row_tile * vocabulary);
    std::fill_n(dh, rows * width, T(0));
    for (int64_t first = 0; first < rows; first += row_tile) {
        const int64_t n = std::min(row_tile, rows - first);
        logit_gradient(first, n, vocabulary, p, target, dnll, dl);
        product(n, width, vocabulary, dl, table, dh + first * width);
    }
}

template <class T> void cross_entropy_vjp_table(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['C'], vocabulary = args['V'];
    const T *p = args.in(0), *h = args.in(1), *dnll = args.in(3);
    const int32_t *target = args.ids(2);
    T *dtable = args.out(0), *dl = args.scratch(row_tile * vocabulary);
    std::fill_n(dtable, vocabulary * width, T(0));
    for (int64_t first = 0; first < rows; first += row_tile) {
        const int64_t n = std::min(row_tile, rows - first);
        logit_gradient(first, n, vocabulary, p, target, dnll, dl);
        product_tn(vocabulary, width, n, dl, h + first * width, dtable);
    }
}

} // namespace

const Op cross_entropy_op = {
    "cross_entropy",
    "h[S,T,C] table:q[V,C] target:i[S,T] scales??:s[*] -> nll:w[S,T] entropy:w[S,T] p?[S,T,V]", 0,
    cross_entropy<float>, cross_entropy<double>};

const Op cross_entropy_vjp_op = {"cross_entropy_vjp",
                                 "p[S,T,V] table:q[V,C] target:i[S,T] dnll:w[S,T] scales??:s[*] -> "
                                 "dh[S,T,C]",
                                 0, cross_entropy_vjp<float>, cross_entropy_vjp<double>};

const Op cross_entropy_vjp_table_op = {
    "cross_entropy_vjp_table", "p[S,T,V] h[S,T,C] target:i[S,T] dnll:w[S,T] -> dtable:w[V,C]", 0,
    cross_entropy_vjp_table<float>, cross_entropy_vjp_table<double>};

} // namespace ponder::reference
