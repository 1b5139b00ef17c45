// embedding: y[s,t] = table[ids[s,t]] + position[first + t]
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
            args.load(1, ids[s * tokens + t] * width, width, row);
            axpy(width, T(1), position, row);
        }
    }
}

const char *check(const Sizes &sizes, const double *attr) {
    return attr[0] >= 0 && int64_t(attr[0]) + sizes['T'] <= sizes['P'] ? nullptr
                                                                       : "positions end before T";
}

} // namespace

const Op embedding_op = {"embedding",
                         "ids:i[S,T] table[V,C] position[P,C] -> y:w[S,T,C]",
                         1,
                         embedding<float>,
                         embedding<double>,
                         check};

} // namespace ponder::reference
