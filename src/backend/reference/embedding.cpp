// embedding: y[s,t] = table[ids[s,t]] + position[first + t]
// at:        y[s,t] = table[ids[s,t]] + position[at[s,t]]
// vjp:       dtable[v] = sum of dy[s,t] where ids[s,t] = v, dposition[first + t] = sum_s dy[s,t]
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void embedding(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'];
    const int64_t first = args.attr_int(0);
    const int32_t *ids = args.ids(0);
    T *y = args.out(0), *position = args.scratch(width);
    for (int64_t t = 0; t < tokens; ++t) {
        args.load(2, (first + t) * width, width, position);
        for (int64_t s = 0; s < streams; ++s) {
            T *row = y + (s * tokens + t) * width;
            args.load_weight(1, 3, ids[s * tokens + t], 1, row);
            axpy(width, T(1), position, row);
        }
    }
}

template <class T> void embedding_at(Args<T> &args) {
    const int64_t rows = args['S'] * args['T'], width = args['C'];
    const int32_t *ids = args.ids(0), *at = args.ids(1);
    T *y = args.out(0), *position = args.scratch(width);
    for (int64_t r = 0; r < rows; ++r, y += width) {
        args.load_weight(2, 4, ids[r], 1, y);
        args.load(3, at[r] * width, width, position);
        axpy(width, T(1), position, y);
    }
}

template <class T> void embedding_vjp(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'];
    const int64_t first = args.attr_int(0);
    const T *dy = args.in(0);
    const int32_t *ids = args.ids(1);
    T *table = args.out(0), *position = args.out(1);
    std::fill_n(table, args['V'] * width, T(0));
    std::fill_n(position, args['P'] * width, T(0));
    for (int64_t s = 0; s < streams; ++s)
        for (int64_t t = 0; t < tokens; ++t, dy += width) {
            axpy(width, T(1), dy, table + ids[s * tokens + t] * width);
            axpy(width, T(1), dy, position + (first + t) * width);
        }
}

const char *check(const Sizes &sizes, const double *attr) {
    return attr[0] >= 0 && int64_t(attr[0]) + sizes['T'] <= sizes['P'] ? nullptr
                                                                       : "positions end before T";
}

} // namespace

const Op embedding_op = {"embedding",
                         "ids:i[S,T] table:q[V,C] position[P,C] scales??:s[*] -> y:w[S,T,C]",
                         1,
                         embedding<float>,
                         embedding<double>,
                         check};

const Op embedding_at_op = {"embedding_at",
                            "ids:i[S,T] at:i[S,T] table:q[V,C] position[P,C] scales??:s[*] -> y:w[S,T,C]", 0,
                            embedding_at<float>, embedding_at<double>};

const Op embedding_vjp_op = {"embedding_vjp",
                             "dy:w[S,T,C] ids:i[S,T] -> dtable:w[V,C] dposition:w[P,C]",
                             1,
                             embedding_vjp<float>,
                             embedding_vjp<double>,
                             check};

} // namespace ponder::reference
