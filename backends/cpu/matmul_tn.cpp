// matmul_tn: c = a^T b for each stream. A task makes one 64 x 128 block of c, adding the tokens in
// their order, so the result does not depend on how the tasks are spread. Where a or b is bf16 the
// products are bf16 with f32 sums, which loses nothing of what is bf16 already.
#include "gemm.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kColumns = 128, kDepth = 512; // of a block; tokens at a time

struct MatmulTn : Kernel {
    int64_t tokens, m, n;
    bool half_;
    int32_t a, b;
};

size_t left_units(bool half_) {
    return half_ ? a_transposed_units(kDepth) : a_columns_units(kDepth);
}

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const MatmulTn &k = *static_cast<const MatmulTn *>(kernel);
    const int64_t across = tiles(k.n, kColumns), down = tiles(k.m, kTile);
    const int64_t stream = task / (across * down);
    const int64_t i0 = task / across % down * kTile, j0 = task % across * kColumns;
    const int64_t mi = smaller(k.m - i0, kTile), nj = smaller(k.n - j0, kColumns);
    Carver carver{static_cast<char *>(workspace)};
    uint32_t *left = carver.take<uint32_t>(left_units(k.half_));
    uint32_t *panels = carver.take<uint32_t>(b_units(units(kDepth, k.half_), kColumns));
    Product p;
    p.half = k.half_;
    p.columns = !k.half_ || kTransposedIsColumns;
    p.y = View::of(buffers[2], kF32).at((stream * k.m + i0) * k.n + j0), p.y_row = k.n;
    for (int64_t t0 = 0; t0 < k.tokens; t0 += kDepth) {
        const int64_t depth = smaller(k.tokens - t0, kDepth), row = stream * k.tokens + t0;
        const View a = View::of(buffers[0], k.a).at(row * k.m + i0);
        const View b = View::of(buffers[1], k.b).at(row * k.n + j0);
        if (k.half_)
            pack_a_transposed(left, a, k.m, depth, mi);
        else
            for (int64_t t = 0; t < depth; ++t) {
                const View to = View::of(left + t * kStride, kF32), from = a.at(t * k.m);
                each_vector(
                    mi, PONDER_EACH(i, n) { to.put(i, from.get(i, n), n); });
            }
        if (!k.half_ && nj % kPanel == 0) {
            p.part[0] = direct_part(left, reinterpret_cast<const float *>(b.data), depth, k.n);
        } else {
            pack_b(panels, b, k.n, 1, depth, nj, k.half_);
            p.part[0] = packed_part(left, panels, units(depth, k.half_));
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
    k->half_ = in(c, 0).dtype == kBF16 || in(c, 1).dtype == kBF16;
    k->a = in(c, 0).dtype, k->b = in(c, 1).dtype;
    return planned(
        c, k, in(c, 0).dim[0] * tiles(k->m, kTile) * tiles(k->n, kColumns), PONDER_TILE_ANY,
        padded(4 * left_units(k->half_)) + padded(4 * b_units(units(kDepth, k->half_), kColumns)));
}

} // namespace ponder::cpu::PONDER_ISA
