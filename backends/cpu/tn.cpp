#include "tn.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kDepth = 512; // rows at a time
constexpr int64_t kEnough = 8;  // tasks

size_t left_units(bool half_) {
    return half_ ? a_transposed_units(kDepth) : a_columns_units(kDepth);
}

} // namespace

TransposedProduct transposed_product(int64_t m, int64_t n, int64_t count, bool half_) {
    TransposedProduct p = {m, n, 4 * kTile, 256, half_};
    while (count * block_count(p) < kEnough && (p.block_m > kTile || p.block_n > 128))
        if (p.block_m > kTile && p.block_m >= p.block_n)
            p.block_m /= 2;
        else
            p.block_n /= 2;
    return p;
}

size_t block_workspace(const TransposedProduct &p, bool scaled) {
    return padded(4 * left_units(p.half_)) +
           padded(4 * b_units(units(kDepth, p.half_), p.block_n)) +
           (scaled ? padded(size_t(4 * kDepth * p.block_n)) : 0);
}

void make_block(const TransposedProduct &t, int64_t block, View a, View b, int64_t rows,
                const RowFactor *scale, float *c, void *workspace) {
    const BlockPlace at = place_of(t, block);
    Carver carver{static_cast<char *>(workspace)};
    uint32_t *left = carver.take<uint32_t>(left_units(t.half_));
    uint32_t *panels = carver.take<uint32_t>(b_units(units(kDepth, t.half_), t.block_n));
    float *scaled = scale ? carver.take<float>(size_t(kDepth * t.block_n)) : nullptr;
    Product p;
    p.half = t.half_;
    p.columns = !t.half_ || kTransposedIsColumns;
    p.y_row = t.n;
    for (int64_t r0 = 0; r0 < rows; r0 += kDepth) {
        const int64_t depth = smaller(rows - r0, kDepth);
        View right = b.at(r0 * t.n + at.j0);
        int64_t right_step = t.n;
        if (scale) {
            const View to = View::of(scaled, kF32);
            for (int64_t r = 0; r < depth; ++r) {
                const vf f = set(scale->of(r0 + r));
                each_vector(
                    at.n,
                    PONDER_EACH(j, n) { to.put(r * at.n + j, right.get(r * t.n + j, n) * f, n); });
            }
            right = to, right_step = at.n;
        }
        // What one tile of rows reads once is not worth packing.
        if (!t.half_ && at.n % kPanel == 0 && at.m <= kTile) {
            p.part[0] =
                direct_part(left, reinterpret_cast<const float *>(right.data), depth, right_step);
        } else {
            pack_b(panels, right, right_step, 1, depth, at.n, t.half_);
            p.part[0] = packed_part(left, panels, units(depth, t.half_));
        }
        for (int64_t i = 0; i < at.m; i += kTile) {
            const int64_t m = smaller(at.m - i, kTile);
            const View from = a.at(r0 * t.m + at.i0 + i);
            if (t.half_)
                pack_a_transposed(left, from, t.m, depth, m);
            else
                for (int64_t r = 0; r < depth; ++r) {
                    const View to = View::of(left + r * kStride, kF32), row = from.at(r * t.m);
                    each_vector(
                        m, PONDER_EACH(e, n) { to.put(e, row.get(e, n), n); });
                }
            p.y = View::of(c + (at.i0 + i) * t.n + at.j0, kF32);
            product(p, m, at.n);
        }
        p.accumulate = true;
    }
}

} // namespace ponder::cpu::PONDER_ISA
