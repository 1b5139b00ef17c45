// attention_cached: keys and values of the new tokens go to rows first_s + t of the caches, then
//     o_t = sum_j p_tj v_j over rows j <= first_s + t,  p_tj = softmax_j(q_t k_j / sqrt(D))
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void attention_cached(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'], heads = args['H'];
    const int64_t places = args['N'], d = args['D'], row = 3 * width;
    const T scale = T(1 / std::sqrt(double(d)));
    const T *qkv = args.in(0), *k_before = args.in(2), *v_before = args.in(3);
    const int32_t *first = args.ids(1);
    T *o = args.out(0), *k_all = args.out(1), *v_all = args.out(2), *p = args.scratch(places);
    if (k_all != k_before)
        std::copy_n(k_before, streams * heads * places * d, k_all);
    if (v_all != v_before)
        std::copy_n(v_before, streams * heads * places * d, v_all);
    for (int64_t s = 0; s < streams; ++s)
        for (int64_t h = 0; h < heads; ++h) {
            const T *q = qkv + s * tokens * row + h * d;
            T *k = k_all + (s * heads + h) * places * d, *v = v_all + (s * heads + h) * places * d;
            for (int64_t t = 0; t < tokens; ++t, q += row) {
                const int64_t at = first[s] + t, seen = std::min(at + 1, places);
                if (at < places) {
                    std::copy_n(q + width, d, k + at * d);
                    std::copy_n(q + 2 * width, d, v + at * d);
                }
                for (int64_t j = 0; j < seen; ++j)
                    p[j] = dot(d, q, k + j * d) * scale;
                const T top = *std::max_element(p, p + seen);
                double sum = 0;
                for (int64_t j = 0; j < seen; ++j)
                    sum += p[j] = std::exp(p[j] - top);
                T *to = o + (s * tokens + t) * width + h * d;
                std::fill_n(to, d, T(0));
                for (int64_t j = 0; j < seen; ++j)
                    axpy(d, T(p[j] / sum), v + j * d, to);
            }
        }
}

const char *check(const Sizes &sizes, const double *) {
    return sizes['C'] == sizes['H'] * sizes['D'] ? nullptr : "C must be H x D";
}

} // namespace

const Op attention_cached_op = {
    "attention_cached",
    "qkv[S,T,3C] first:i[S] k[S,H,N,D] v[S,H,N,D] -> o[S,T,C] k[S,H,N,D] v[S,H,N,D]",
    0,
    attention_cached<float>,
    attention_cached<double>,
    check};

} // namespace ponder::reference
