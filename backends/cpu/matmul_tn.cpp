// matmul_tn: c = a^T b for each stream. A task makes one 64 x 128 block of c, adding the tokens in
// their order, so the result does not depend on how the tasks are spread. f32 throughout: these
// are gradients of fast weights.
#include "gemm.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kColumns = 128, kDepth = 512; // of a block; tokens at a time

struct MatmulTn : Kernel {
    int64_t tokens, m, n;
    int32_t a, b;
};

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const MatmulTn &k = *static_cast<const MatmulTn *>(kernel);
    const int64_t across = tiles(k.n, kColumns), down = tiles(k.m, kTile);
    const int64_t stream = task / (across * down);
    const int64_t i0 = task / across % down * kTile, j0 = task % across * kColumns;
    const int64_t mi = smaller(k.m - i0, kTile), nj = smaller(k.n - j0, kColumns);
    Carver carver{static_cast<char *>(workspace)};
    uint32_t *at = carver.take<uint32_t>(a_columns_units(kDepth));
    uint32_t *panels = carver.take<uint32_t>(b_units(kDepth, kColumns));
    Product p;
    p.columns = true;
    p.y = View::of(buffers[2], kF32).at((stream * k.m + i0) * k.n + j0), p.y_row = k.n;
    for (int64_t t0 = 0; t0 < k.tokens; t0 += kDepth) {
        const int64_t depth = smaller(k.tokens - t0, kDepth), row = stream * k.tokens + t0;
        const View a = View::of(buffers[0], k.a).at(row * k.m + i0);
        const View b = View::of(buffers[1], k.b).at(row * k.n + j0);
        for (int64_t t = 0; t < depth; ++t) {
            const View to = View::of(at + t * kStride, kF32), from = a.at(t * k.m);
            each_vector(
                mi, PONDER_EACH(i, n) { to.put(i, from.get(i, n), n); });
        }
        if (k.b == kF32 && nj % kPanel == 0) {
            p.part[0] = direct_part(at, reinterpret_cast<const float *>(b.data), depth, k.n);
        } else {
            pack_b(panels, b, k.n, 1, depth, nj, false);
            p.part[0] = packed_part(at, panels, depth);
        }
        product(p, mi, nj);
        p.accumulate = true;
    }
}

} // namespace

int32_t plan_matmul_tn(const Call &c) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || out(c, 0).dtype != kF32 || in(c, 0).rank != 3)
        return PONDER_PLAN_NONE;
    MatmulTn *k = new_kernel<MatmulTn>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->tokens = in(c, 0).dim[1], k->m = last(in(c, 0)), k->n = last(in(c, 1));
    k->a = in(c, 0).dtype, k->b = in(c, 1).dtype;
    return planned(c, k, in(c, 0).dim[0] * tiles(k->m, kTile) * tiles(k->n, kColumns),
                   PONDER_TILE_ANY,
                   padded(4 * a_columns_units(kDepth)) + padded(4 * b_units(kDepth, kColumns)));
}

} // namespace ponder::cpu::PONDER_ISA
