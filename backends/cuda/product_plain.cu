// Products of shapes that cuBLASLt has no algorithm for: a thread for each element.
#include "product_kernels.hpp"

namespace ponder::cuda {

namespace {

template <class A, class C>
__global__ void product_kernel(ProductShape s, const A *a, const A *b, C *c, const C *bias,
                               const C *add) {
    const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i >= s.batch * s.m * s.n)
        return;
    const int64_t column = i % s.n, row = i / s.n % s.m, item = i / (s.n * s.m);
    const int64_t lda = s.lda ? s.lda : s.ta ? s.m : s.k, ldb = s.ldb ? s.ldb : s.tb ? s.k : s.n,
                  at = item * s.stride_c + row * (s.ldc ? s.ldc : s.n) + column;
    a += item * s.stride_a;
    b += item * s.stride_b;
    float sum = 0;
    for (int64_t j = 0; j < s.k; ++j)
        sum += to_float(s.ta ? a[j * lda + row] : a[row * lda + j]) *
               to_float(s.tb ? b[column * ldb + j] : b[j * ldb + column]);
    if (bias)
        sum += to_float(bias[column]);
    if (add)
        sum += to_float(add[at]);
    c[at] = from_float<C>(sum);
}

} // namespace

void plain_product(const ProductShape &shape, const void *a, const void *b, void *c,
                   const void *bias, const void *add, cudaStream_t stream) {
    by_types(shape.operands, shape.result, [&]<class A, class C>(A, C) {
        product_kernel<<<blocks_for(shape.batch * shape.m * shape.n, 256), 256, 0, stream>>>(
            shape, static_cast<const A *>(a), static_cast<const A *>(b), static_cast<C *>(c),
            shape.bias ? static_cast<const C *>(bias) : nullptr,
            shape.add ? static_cast<const C *>(add) : nullptr);
    });
}

} // namespace ponder::cuda
