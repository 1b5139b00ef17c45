// lora_linear: u = x a, y = add + x w + b + scale u bb     Hu et al. 2021, arXiv 2106.09685
// vjp:         du = scale dy bb^T, dx = dy w^T + du a^T
// a and bb belong to a stream; their own gradients are matmul_tn of (x, du) and (u, scale dy).
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

template <class T> void lora_linear(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], depth = args['K'], width = args['N'];
    const int64_t rank = args['R'], rows = streams * tokens;
    const T scale = T(args.attr(0));
    const T *x = args.in(0), *w = args.weight(1, 6), *b = args.in(2), *a = args.in(3),
            *bb = args.in(4);
    const T *add = args.in(5);
    T *y = args.out(0), *u = args.out(1);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < width; ++j)
            y[r * width + j] = (add ? add[r * width + j] : T(0)) + (b ? b[j] : T(0));
    product(rows, width, depth, x, w, y);

    std::fill_n(u, rows * rank, T(0));
    T *scaled = args.scratch(tokens * rank);
    for (int64_t s = 0; s < streams; ++s) {
        T *us = u + s * tokens * rank;
        product(tokens, rank, depth, x + s * tokens * depth, a + s * depth * rank, us);
        for (int64_t i = 0; i < tokens * rank; ++i)
            scaled[i] = scale * us[i];
        product(tokens, width, rank, scaled, bb + s * rank * width, y + s * tokens * width);
    }
}

template <class T> void lora_linear_vjp(Args<T> &args) {
    const int64_t streams = args['S'], tokens = args['T'], depth = args['K'], width = args['N'];
    const int64_t rank = args['R'], rows = streams * tokens;
    const T scale = T(args.attr(0));
    const T *dy = args.in(0), *w = args.weight(1, 4), *a = args.in(2), *bb = args.in(3);
    T *dx = args.out(0), *du = args.out(1);
    std::fill_n(dx, rows * depth, T(0));
    std::fill_n(du, rows * rank, T(0));
    product_nt(rows, depth, width, dy, w, dx);
    for (int64_t s = 0; s < streams; ++s) {
        T *dus = du + s * tokens * rank;
        product_nt(tokens, rank, width, dy + s * tokens * width, bb + s * rank * width, dus);
        for (int64_t i = 0; i < tokens * rank; ++i)
            dus[i] *= scale;
        product_nt(tokens, depth, rank, dus, a + s * depth * rank, dx + s * tokens * depth);
    }
}

} // namespace

const Op lora_linear_op = {
    "lora_linear",
    "x[S,T,K] w:q[K,N] b?[N] a:w[S,K,R] bb:w[S,R,N] add?:w[S,T,N] scales??:s[*] -> y[S,T,N] "
    "u[S,T,R]",
    1, lora_linear<float>, lora_linear<double>};

const Op lora_linear_vjp_op = {"lora_linear_vjp",
                               "dy[S,T,N] w:q[K,N] a:w[S,K,R] bb:w[S,R,N] scales??:s[*] -> "
                               "dx[S,T,K] du[S,T,R]",
                               1, lora_linear_vjp<float>, lora_linear_vjp<double>};

} // namespace ponder::reference
