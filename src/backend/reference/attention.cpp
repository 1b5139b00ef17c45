// attention: o_i = sum_{j<=i} p_ij v_j, p_ij = exp(q_i k_j / sqrt(D) - lse_i)
//            lse_i = log sum_{j<=i} exp(q_i k_j / sqrt(D))     Vaswani et al. 2017, 1706.03762
// vjp:       dv_j = sum_i p_ij do_i, ds_ij = p_ij (do_i v_j - do_i o_i) / sqrt(D)
//            dq_i = sum_j ds_ij k_j, dk_j = sum_i ds_ij q_i       Dao et al. 2022, 2205.14135
// p is never kept: the vjp finds it again from lse. Keys after i are not visited at all.
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void attention(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'], heads = args['H'];
    const int64_t d = width / heads, row = 3 * width;
    const T scale = T(1 / std::sqrt(double(d)));
    const T *qkv = args.in(0);
    T *o = args.out(0), *lse = args.out(1);
    T *kt = args.scratch(d * tokens), *p = args.scratch(tokens);
    for (int64_t s = 0; s < streams; ++s)
        for (int64_t h = 0; h < heads; ++h) {
            const T *q = qkv + s * tokens * row + h * d, *k = q + width, *v = k + width;
            transpose(tokens, d, k, row, kt); // [D, T]: a row of scores is then a sum of axpys
            for (int64_t i = 0; i < tokens; ++i) {
                const int64_t seen = i + 1;
                std::fill_n(p, seen, T(0));
                for (int64_t c = 0; c < d; ++c)
                    axpy(seen, q[i * row + c] * scale, kt + c * tokens, p);
                const T top = *std::max_element(p, p + seen);
                double sum = 0;
                for (int64_t j = 0; j < seen; ++j)
                    sum += p[j] = std::exp(p[j] - top);
                lse[(s * heads + h) * tokens + i] = T(double(top) + std::log(sum));
                T *oi = o + (s * tokens + i) * width + h * d;
                std::fill_n(oi, d, T(0));
                for (int64_t j = 0; j < seen; ++j)
                    axpy(d, T(p[j] / sum), v + j * row, oi);
            }
        }
}

template <class T> void attention_vjp(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], width = args['C'], heads = args['H'];
    const int64_t d = width / heads, row = 3 * width;
    const T scale = T(1 / std::sqrt(double(d)));
    const T *qkv = args.in(0), *o = args.in(1), *lse = args.in(2), *grad = args.in(3);
    T *dqkv = args.out(0);
    T *kt = args.scratch(d * tokens), *vt = args.scratch(d * tokens);
    T *p = args.scratch(tokens), *ds = args.scratch(tokens);
    std::fill_n(dqkv, streams * tokens * row, T(0));
    for (int64_t s = 0; s < streams; ++s)
        for (int64_t h = 0; h < heads; ++h) {
            const T *q = qkv + s * tokens * row + h * d, *k = q + width, *v = k + width;
            T *dq = dqkv + s * tokens * row + h * d, *dk = dq + width, *dv = dk + width;
            transpose(tokens, d, k, row, kt);
            transpose(tokens, d, v, row, vt);
            for (int64_t i = 0; i < tokens; ++i) {
                const int64_t seen = i + 1, at = (s * tokens + i) * width + h * d;
                const T *go = grad + at;
                const T delta = dot(d, go, o + at);
                std::fill_n(p, seen, T(0));
                std::fill_n(ds, seen, T(0));
                for (int64_t c = 0; c < d; ++c) {
                    axpy(seen, q[i * row + c] * scale, kt + c * tokens, p);
                    axpy(seen, go[c], vt + c * tokens, ds);
                }
                const T log_sum = lse[(s * heads + h) * tokens + i];
                for (int64_t j = 0; j < seen; ++j) {
                    p[j] = std::exp(p[j] - log_sum);
                    ds[j] = p[j] * (ds[j] - delta) * scale;
                    axpy(d, ds[j], k + j * row, dq + i * row);
                    axpy(d, ds[j], q + i * row, dk + j * row);
                    axpy(d, p[j], go, dv + j * row);
                }
            }
        }
}

const char *check(const Sizes &sizes, const double *attr) {
    return attr[0] == double(sizes['H']) && sizes['C'] % sizes['H'] == 0
               ? nullptr
               : "heads must divide C and be the H of tensor lse";
}

} // namespace

const Op attention_op = {
    "attention", "qkv[S,T,3C] -> o[S,T,C] lse:w[S,H,T]", 1, attention<float>, attention<double>,
    check};

const Op attention_vjp_op = {"attention_vjp",
                             "qkv[S,T,3C] o[S,T,C] lse:w[S,H,T] do[S,T,C] -> dqkv[S,T,3C]",
                             1,
                             attention_vjp<float>,
                             attention_vjp<double>,
                             check};

} // namespace ponder::reference
