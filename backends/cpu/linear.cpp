// linear: y = add + x w + b, or x w^T. A task is one tile of rows times all of w, packed once per
// device; bias, add and the conversion of y happen while the sums are in registers. Up to one tile
// of rows a task is some columns, so that every thread reads its share of w.
#include "few_rows.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Linear : Kernel {
    int64_t row_count, k, n;
    Weight w;
    bool half_, scales_columns;
    int32_t x, b, y;
    uint32_t out; // place of y
};

// y[rows, columns]; only the columns or only the rows are a part of all.
void block(const Linear &l, void *const *buffers, void *workspace, Span r, Span c) {
    const int64_t m = r.end - r.begin, at = r.begin * l.n + c.begin;
    const View scales = {l.w.bytes ? static_cast<char *>(buffers[l.out - 1]) : nullptr, false};
    Carver work{static_cast<char *>(workspace)};
    uint32_t *a = work.take<uint32_t>(a_rows_units(l.w.depth));
    Product p;
    p.half = l.half_;
    p.wide = work.take<uint32_t>(0);
    l.w.use(p, c.begin, 0);
    left_operand(p.part[0], a, View::of(buffers[0], l.x).at(r.begin * l.k), l.k, m, l.k, l.half_,
                 l.scales_columns ? View{nullptr, false} : scales);
    if (l.scales_columns)
        p.scales = scales.at(c.begin);
    if (buffers[2])
        p.bias = View::of(buffers[2], l.b).at(c.begin);
    if (buffers[3])
        p.add = static_cast<const float *>(buffers[3]) + at, p.add_row = l.n;
    p.y = View::of(buffers[l.out], l.y).at(at), p.y_row = l.n;
    product(p, m, c.end - c.begin);
}

void rows_task(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Linear &l = *static_cast<const Linear *>(kernel);
    block(l, buffers, workspace, span(task, kTile, l.row_count), {0, l.n});
}

void columns_task(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Linear &l = *static_cast<const Linear *>(kernel);
    const Span c = span(task, few_columns(l.n, l.w), l.n);
    if (l.row_count > 1 || l.w.bytes)
        return block(l, buffers, workspace, {0, l.row_count}, c);
    FewRows row = {1, l.k, l.n, l.half_, l.w};
    row.x = View::of(buffers[0], l.x);
    row.bias = View::of(buffers[2], l.b);
    row.add = static_cast<const float *>(buffers[3]);
    row.y = View::of(buffers[l.out], l.y).at(c.begin);
    few_rows(row, c.begin, c.end - c.begin, static_cast<uint32_t *>(workspace));
}

} // namespace

int32_t plan_linear(const Call &c) {
    if (!c.op->constant[1] || !floats(in(c, 0)) || !is_weight(in(c, 1)) ||
        !floats_or_none(in(c, 2)) || !f32_or_none(in(c, 3)) || !floats(out(c, 0)))
        return PONDER_PLAN_NONE;
    Linear *l = new_kernel<Linear>(rows_task);
    if (!l)
        return PONDER_PLAN_FAILED;
    const bool transposed = attr(c, 0) != 0;
    l->row_count = rows(in(c, 0)), l->k = last(in(c, 0)), l->n = last(out(c, 0));
    l->half_ = is_half(c, 1, in(c, 0), out(c, 0));
    l->x = in(c, 0).dtype, l->b = in(c, 2).dtype, l->y = out(c, 0).dtype;
    l->scales_columns = scaled(c, 1) && scales_columns(c, l->n, transposed);
    l->out = c.op->n_in;
    l->w = pack_weight(c, 1, l->k, l->n, transposed, l->half_);
    if (!l->w)
        return forget(l);
    const size_t work =
        padded(4 * a_rows_units(l->w.depth)) + 4 * wide_units(c, 1, l->row_count, l->w.depth);
    if (l->row_count > kTile)
        return planned_rows(c, l, l->row_count, work);
    l->run = columns_task;
    return planned(c, l, tiles(l->n, few_columns(l->n, l->w)), PONDER_TILE_ANY, work);
}

} // namespace ponder::cpu::PONDER_ISA
