// c[M,N] = a^T b, summed over the rows of a[rows, M] and b[rows, N]: what the gradients of weights
// are made of. A task makes one block of c, adding the rows in their order, so the result does not
// depend on how the tasks are spread. Where a or b is bf16 the products are bf16 with f32 sums,
// which loses nothing of what is bf16 already.
#pragma once

#include "gemm.hpp"

namespace ponder::cpu::PONDER_ISA {

struct TransposedProduct {
    int64_t m, n;
    int64_t block_m, block_n; // of a task
    bool half_;
};

// Large blocks pack less, small ones make more tasks; `count` such products run side by side.
TransposedProduct transposed_product(int64_t m, int64_t n, int64_t count, bool half_);
PONDER_INLINE int64_t block_count(const TransposedProduct &p) {
    return tiles(p.m, p.block_m) * tiles(p.n, p.block_n);
}
size_t block_workspace(const TransposedProduct &p, bool scaled);

// b's rows times a factor, or nothing where there is no target; see cross_entropy_vjp_table.
struct RowFactor {
    const float *factor;
    const int32_t *target;
    __attribute__((always_inline)) float of(int64_t r) const {
        return target[r] < 0 ? 0 : factor[r];
    }
};

// Where block `block` of c begins.
struct BlockPlace {
    int64_t i0, m, j0, n;
};
PONDER_INLINE BlockPlace place_of(const TransposedProduct &p, int64_t block) {
    const int64_t across = tiles(p.n, p.block_n);
    const int64_t i0 = block / across * p.block_m, j0 = block % across * p.block_n;
    return {i0, smaller(p.m - i0, p.block_m), j0, smaller(p.n - j0, p.block_n)};
}

void make_block(const TransposedProduct &p, int64_t block, View a, View b, int64_t rows,
                const RowFactor *scale, float *c, void *workspace);

} // namespace ponder::cpu::PONDER_ISA
