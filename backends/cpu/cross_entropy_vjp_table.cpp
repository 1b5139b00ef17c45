// cross_entropy_vjp_table: dtable = ((p - onehot(target)) dnll)^T h = p^T (dnll h) - rows of dnll h
// added where their targets say. The rows are rounded once, so that p = 1 cancels exactly.
#include "ops.hpp"
#include "tn.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct TableGradient : Kernel {
    TransposedProduct product;
    int64_t rows;
    int32_t p, h;
};

PONDER_INLINE vf rounded(vf x) {
    half h[W];
    store(h, x);
    return load(h);
}

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const TableGradient &k = *static_cast<const TableGradient *>(kernel);
    const View h = View::of(buffers[1], k.h);
    const int32_t *target = static_cast<const int32_t *>(buffers[2]);
    const RowFactor factor = {static_cast<const float *>(buffers[3]), target};
    float *dtable = static_cast<float *>(buffers[4]);
    make_block(k.product, task, View::of(buffers[0], k.p), h, k.rows, &factor, dtable, workspace);
    const BlockPlace at = place_of(k.product, task);
    const int64_t width = k.product.n;
    for (int64_t r = 0; r < k.rows; ++r) {
        if (target[r] < at.i0 || target[r] >= at.i0 + at.m)
            continue;
        const View from = h.at(r * width + at.j0);
        const View to = View::of(dtable + target[r] * width + at.j0, kF32);
        const vf f = set(factor.of(r));
        each_vector(
            at.n, PONDER_EACH(j, n) {
                const vf row = from.get(j, n) * f;
                to.put(j, to.get(j, n) - (k.product.half_ ? rounded(row) : row), n);
            });
    }
}

} // namespace

int32_t plan_cross_entropy_vjp_table(const Call &c) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || in(c, 2).dtype != kI32 ||
        in(c, 3).dtype != kF32 || out(c, 0).dtype != kF32)
        return PONDER_PLAN_NONE;
    TableGradient *k = new_kernel<TableGradient>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->product = transposed_product(last(in(c, 0)), last(in(c, 1)), 1,
                                    in(c, 0).dtype == kBF16 || in(c, 1).dtype == kBF16);
    k->rows = rows(in(c, 0));
    k->p = in(c, 0).dtype, k->h = in(c, 1).dtype;
    return planned(c, k, block_count(k->product), PONDER_TILE_ANY,
                   block_workspace(k->product, true));
}

} // namespace ponder::cpu::PONDER_ISA
