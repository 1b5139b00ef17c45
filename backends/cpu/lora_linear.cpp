// lora_linear:      u = x a,  y = add + x w + b + u (scale bb)
// lora_linear_vjp:  du = scale dy bb^T,  dx = dy w^T + du a^T
// The product with the low-rank factor goes on in the same registers as the one with w. The
// factors change with every step, so each task packs its own copy; they are small. A tile of rows
// may lie across streams, each with its own factors: it is done in pieces.
#include "gemm.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Lora : Kernel {
    int64_t row_count, tokens; // tokens of a stream
    int64_t k, n, rank;        // of the product with w, in its own direction
    const uint32_t *w;
    float scale;
    bool half_;
    int32_t x, b, y, u;
};

struct Work {
    uint32_t *x, *u, *first, *second; // x[64, k] and u[64, rank], then the factors as B
    float *sums;                      // [64, rank]
};

Work carve(const Lora &l, void *workspace) {
    const int64_t k = units(l.k, l.half_), r = units(l.rank, l.half_);
    Carver c{static_cast<char *>(workspace)};
    Work w;
    w.x = c.take<uint32_t>(a_rows_units(k));
    w.u = c.take<uint32_t>(a_rows_units(r));
    w.first = c.take<uint32_t>(b_units(k, l.rank));
    w.second = c.take<uint32_t>(b_units(r, l.n));
    w.sums = c.take<float>(size_t(kTile * l.rank));
    return w;
}

size_t work_bytes(const Lora &l) {
    const int64_t k = units(l.k, l.half_), r = units(l.rank, l.half_);
    return padded(4 * a_rows_units(k)) + padded(4 * a_rows_units(r)) +
           padded(4 * b_units(k, l.rank)) + padded(4 * b_units(r, l.n)) +
           padded(size_t(4 * kTile * l.rank));
}

// Rows [r, r + m) of one stream: u = alpha x F, y = add + x w + b + (beta u) S for the packed
// factors F and S.
void rows_of_stream(const Lora &l, const Work &work, int64_t r, int64_t m, View x, View b,
                    const float *add, View y, View u, float alpha, float beta) {
    Product low;
    low.half = l.half_;
    low.part[0] = packed_part(work.x, work.first, units(l.k, l.half_));
    left_operand(low.part[0], work.x, x.at(r * l.k), l.k, m, l.k, l.half_);
    low.alpha = alpha;
    low.y = View::of(work.sums, kF32), low.y_row = l.rank;
    product(low, m, l.rank);
    const View to = u.at(r * l.rank);
    each_vector(
        m * l.rank, PONDER_EACH(i, n) {
            const vf v = low.y.get(i, n);
            to.put(i, v, n);
            low.y.put(i, v * set(beta), n);
        });
    pack_a(work.u, low.y, l.rank, m, l.rank, l.half_);
    Product p;
    p.half = l.half_;
    p.parts = 2;
    p.part[0] = low.part[0], p.part[0].b = l.w, p.part[0].b_panel = kPanel * p.part[0].k;
    p.part[1] = packed_part(work.u, work.second, units(l.rank, l.half_));
    p.bias = b;
    if (add)
        p.add = add + r * l.n, p.add_row = l.n;
    p.y = y.at(r * l.n), p.y_row = l.n;
    product(p, m, l.n);
}

void forward(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Lora &l = *static_cast<const Lora *>(kernel);
    const Work work = carve(l, workspace);
    const Span s = span(task, kTile, l.row_count);
    for (int64_t r = s.begin; r < s.end;) {
        const int64_t stream = r / l.tokens, end = smaller(s.end, (stream + 1) * l.tokens);
        const View a = View::of(buffers[3], kF32).at(stream * l.k * l.rank);
        const View bb = View::of(buffers[4], kF32).at(stream * l.rank * l.n);
        pack_b(work.first, a, l.rank, 1, l.k, l.rank, l.half_);
        pack_b(work.second, bb, l.n, 1, l.rank, l.n, l.half_);
        rows_of_stream(l, work, r, end - r, View::of(buffers[0], l.x), View::of(buffers[2], l.b),
                       static_cast<const float *>(buffers[5]), View::of(buffers[6], l.y),
                       View::of(buffers[7], l.u), 1, l.scale);
        r = end;
    }
}

void backward(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Lora &l = *static_cast<const Lora *>(kernel);
    const Work work = carve(l, workspace);
    const Span s = span(task, kTile, l.row_count);
    for (int64_t r = s.begin; r < s.end;) {
        const int64_t stream = r / l.tokens, end = smaller(s.end, (stream + 1) * l.tokens);
        const View a = View::of(buffers[2], kF32).at(stream * l.n * l.rank);
        const View bb = View::of(buffers[3], kF32).at(stream * l.rank * l.k);
        pack_b(work.first, bb, 1, l.k, l.k, l.rank, l.half_);
        pack_b(work.second, a, 1, l.rank, l.rank, l.n, l.half_);
        rows_of_stream(l, work, r, end - r, View::of(buffers[0], l.x), {nullptr, false}, nullptr,
                       View::of(buffers[4], l.y), View::of(buffers[5], l.u), l.scale, 1);
        r = end;
    }
}

} // namespace

int32_t plan_lora_linear(const Call &c) {
    const void *w = c.op->constant[1];
    if (!w || !floats(in(c, 0)) || !floats(in(c, 1)) || !floats_or_none(in(c, 2)) ||
        in(c, 3).dtype != kF32 || in(c, 4).dtype != kF32 || !f32_or_none(in(c, 5)) ||
        !floats(out(c, 0)) || !floats(out(c, 1)))
        return PONDER_PLAN_NONE;
    Lora *l = new_kernel<Lora>(forward);
    if (!l)
        return PONDER_PLAN_FAILED;
    l->row_count = rows(in(c, 0)), l->tokens = in(c, 0).dim[in(c, 0).rank - 2];
    l->k = last(in(c, 0)), l->n = last(out(c, 0)), l->rank = last(in(c, 3));
    l->scale = float(attr(c, 0));
    l->half_ = in(c, 1).dtype == kBF16;
    l->x = in(c, 0).dtype, l->b = in(c, 2).dtype, l->y = out(c, 0).dtype, l->u = out(c, 1).dtype;
    l->w = pack_weight(c, w, in(c, 1).dtype, l->k, l->n, false);
    if (!l->w)
        return forget(l);
    return planned_rows(c, l, l->row_count, work_bytes(*l));
}

int32_t plan_lora_linear_vjp(const Call &c) {
    const void *w = c.op->constant[1];
    if (!w || !floats(in(c, 0)) || !floats(in(c, 1)) || in(c, 2).dtype != kF32 ||
        in(c, 3).dtype != kF32 || !floats(out(c, 0)) || !floats(out(c, 1)))
        return PONDER_PLAN_NONE;
    Lora *l = new_kernel<Lora>(backward);
    if (!l)
        return PONDER_PLAN_FAILED;
    l->row_count = rows(in(c, 0)), l->tokens = in(c, 0).dim[in(c, 0).rank - 2];
    l->k = last(in(c, 0)), l->n = last(out(c, 0)), l->rank = last(in(c, 2));
    l->scale = float(attr(c, 0));
    l->half_ = in(c, 1).dtype == kBF16;
    l->x = in(c, 0).dtype, l->y = out(c, 0).dtype, l->u = out(c, 1).dtype;
    l->w = pack_weight(c, w, in(c, 1).dtype, l->k, l->n, true);
    if (!l->w)
        return forget(l);
    return planned_rows(c, l, l->row_count, work_bytes(*l));
}

} // namespace ponder::cpu::PONDER_ISA
