// matmul_tn: c = a^T b for each stream.  matmul_tn_sum: the sum over streams.
#include "ops.hpp"
#include "tn.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct MatmulTn : Kernel {
    TransposedProduct product;
    int64_t rows, blocks; // of one product
    int32_t a, b;
};

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const MatmulTn &k = *static_cast<const MatmulTn *>(kernel);
    const TransposedProduct &p = k.product;
    const int64_t i = task / k.blocks;
    make_block(p, task % k.blocks, View::of(buffers[0], k.a).at(i * k.rows * p.m),
               View::of(buffers[1], k.b).at(i * k.rows * p.n), k.rows, nullptr,
               static_cast<float *>(buffers[2]) + i * p.m * p.n, workspace);
}

int32_t plan(const Call &c, bool sum) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || out(c, 0).dtype != kF32 || in(c, 0).rank != 3)
        return PONDER_PLAN_NONE;
    MatmulTn *k = new_kernel<MatmulTn>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    const int64_t count = sum ? 1 : in(c, 0).dim[0];
    k->product = transposed_product(last(in(c, 0)), last(in(c, 1)), count,
                                    in(c, 0).dtype == kBF16 || in(c, 1).dtype == kBF16);
    k->rows = rows(in(c, 0)) / count, k->blocks = block_count(k->product);
    k->a = in(c, 0).dtype, k->b = in(c, 1).dtype;
    return planned(c, k, count * k->blocks, PONDER_TILE_ANY, block_workspace(k->product, false));
}

} // namespace

int32_t plan_matmul_tn(const Call &c) { return plan(c, false); }
int32_t plan_matmul_tn_sum(const Call &c) { return plan(c, true); }

} // namespace ponder::cpu::PONDER_ISA
