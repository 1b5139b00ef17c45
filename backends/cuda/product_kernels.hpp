// The shapes of products, and what is around the library's: kernels for those that it does not
// take, and conversions of operands.
#pragma once

#include "kernel.hpp"

#include <compare>

namespace ponder::cuda {

// c[m,n] = op(a)[m,k] op(b)[k,n] (+ bias[n]) (+ add[m,n]); row-major. Leading dims are in elements
// and 0 means dense; strides of a batch are 0 where all share one matrix.
struct ProductShape {
    int64_t m, n, k;
    bool ta = false, tb = false; // a is [k,m], b is [n,k]
    int32_t operands = PONDER_DTYPE_F32, result = PONDER_DTYPE_F32;
    bool bias = false, add = false;  // bias: of the result's type
    bool gelu = false, keep = false; // gelu of the sum; keep: the sum too, dense
    int64_t batch = 1, stride_a = 0, stride_b = 0, stride_c = 0;
    int64_t lda = 0, ldb = 0, ldc = 0;
    auto operator<=>(const ProductShape &) const = default;
};

// product_plain.cu: for the few shapes that the library does not take.
void plain_product(const ProductShape &shape, const void *a, const void *b, void *c,
                   const void *bias, const void *add, cudaStream_t stream);
// product_few.cu: for few rows of bf16; 16-byte aligned operands.
bool few_fit(const ProductShape &shape);
void few_product(const Run &run, const ProductShape &shape, const void *a, const void *b, void *c,
                 const void *bias, const void *add, void *kept);
// elementwise.cu: y = x as another type.
void convert(const Run &run, const float *x, bf16 *y, int64_t count);
void gelu(const Run &run, const bf16 *x, bf16 *y, int64_t count);
void gelu_vjp(const Run &run, const bf16 *dy, const bf16 *x, bf16 *dx, int64_t count);
// x [rows,width] as bf16 next to what it leaves: (x, x, rest) for a first operand of a product, (x,
// rest, x) for a second, in each row or, stacked, each for all rows. width % 8 == 0, y aligned.
void split(const float *x, bf16 *y, int64_t rows, int64_t width, bool stacked, bool second,
           cudaStream_t stream);
// narrow.cpp: bf16 copies of constants. Their memory is had at planning, where there may be none:
// then false. What lies at `from` on the device is converted when a run first asks, which is never
// in a recording.
bool keep_narrow(ponder_device *device, const void *constant, int64_t count);
const bf16 *narrow(const Run &run, const void *constant, const float *from);

} // namespace ponder::cuda
