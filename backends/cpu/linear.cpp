// linear: y = add + x w + b, or x w^T. A task is one tile of rows times all of w, packed once per
// device; bias, add and the conversion of y happen while the sums are in registers.
#include "gemm.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Linear : Kernel {
    int64_t row_count, k, n;
    const uint32_t *w;
    bool half_;
    int32_t x, b, y;
};

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Linear &l = *static_cast<const Linear *>(kernel);
    const Span s = span(task, kTile, l.row_count);
    uint32_t *a = static_cast<uint32_t *>(workspace);
    Product p;
    p.half = l.half_;
    p.part[0] = packed_part(a, l.w, units(l.k, l.half_));
    left_operand(p.part[0], a, View::of(buffers[0], l.x).at(s.begin * l.k), l.k, s.end - s.begin,
                 l.k, l.half_);
    p.bias = View::of(buffers[2], l.b);
    if (buffers[3])
        p.add = static_cast<const float *>(buffers[3]) + s.begin * l.n, p.add_row = l.n;
    p.y = View::of(buffers[4], l.y).at(s.begin * l.n), p.y_row = l.n;
    product(p, s.end - s.begin, l.n);
}

} // namespace

int32_t plan_linear(const Call &c) {
    const void *w = c.op->constant[1];
    if (!w || !floats(in(c, 0)) || !floats(in(c, 1)) || !floats_or_none(in(c, 2)) ||
        !f32_or_none(in(c, 3)) || !floats(out(c, 0)))
        return PONDER_PLAN_NONE;
    Linear *l = new_kernel<Linear>(run);
    if (!l)
        return PONDER_PLAN_FAILED;
    l->row_count = rows(in(c, 0)), l->k = last(in(c, 0)), l->n = last(out(c, 0));
    l->half_ = in(c, 1).dtype == kBF16;
    l->x = in(c, 0).dtype, l->b = in(c, 2).dtype, l->y = out(c, 0).dtype;
    l->w = pack_weight(c, w, in(c, 1).dtype, l->k, l->n, attr(c, 0) != 0);
    if (!l->w)
        return forget(l);
    return planned_rows(c, l, l->row_count, 4 * a_rows_units(units(l->k, l->half_)));
}

} // namespace ponder::cpu::PONDER_ISA
