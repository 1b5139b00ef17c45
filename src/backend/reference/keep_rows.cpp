// keep_rows: row first_s + t of the rows that are kept becomes row t of x, none from N on
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void keep_rows(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'], places = args['N'];
    const T *x = args.in(0), *before = args.in(2);
    const int32_t *first = args.ids(1);
    T *kept = args.out(0);
    if (kept != before)
        std::copy_n(before, streams * places * width, kept);
    for (int64_t s = 0; s < streams; ++s) {
        const int64_t rows = std::clamp(places - first[s], int64_t(0), tokens);
        std::copy_n(x + s * tokens * width, rows * width, kept + (s * places + first[s]) * width);
    }
}

} // namespace

const Op keep_rows_op = {"keep_rows", "x:w[S,T,C] first:i[S] rows:w[S,N,C] -> rows:w[S,N,C]", 0,
                         keep_rows<float>, keep_rows<double>};

} // namespace ponder::reference
