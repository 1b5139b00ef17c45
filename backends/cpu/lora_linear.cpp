// lora_linear:      u = x a,  y = add + x w + b + u (scale bb)
// lora_linear_vjp:  du = scale dy bb^T,  dx = dy w^T + du a^T
// The product with the low-rank factor goes on in the same registers as the one with w. The
// factors change with every step, so each task packs its own copy; they are small. A tile of rows
// may lie across streams, each with its own factors: it is done in pieces. With an int8 w the sums
// are times its scales when they are finished, so forward takes bb / scales; backward takes
// dy * scales in the product with w. A few rows (decoding) would pay more for packing than for the
// products: they take the factors as they are, and tasks are columns (few_rows.hpp).
#include "few_rows.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Lora : Kernel {
    int64_t row_count, tokens; // tokens of a stream
    int64_t k, n, rank;        // of the product with w, in its own direction
    Weight w;
    float scale;
    bool half_;
    int32_t x, b, y, u;
    uint32_t out; // place of y
};

struct Work {
    uint32_t *x, *u, *first, *second; // x[64, k] and u[64, rank], then the factors as B
    float *sums;                      // [64, rank]
    uint32_t *wide;                   // int8 w: a panel of it,
    float *scaled;                    // and bb / scales
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
    w.wide = c.take<uint32_t>(l.w.bytes ? size_t(kPanel * k) : 0);
    w.scaled = c.take<float>(0);
    return w;
}

size_t work_bytes(const Lora &l) {
    const int64_t k = units(l.k, l.half_), r = units(l.rank, l.half_);
    const size_t scaled =
        l.w.bytes ? padded(size_t(4 * kPanel * k)) + padded(size_t(4 * l.rank * l.n)) : 0;
    return scaled + padded(4 * a_rows_units(k)) + padded(4 * a_rows_units(r)) +
           padded(4 * b_units(k, l.rank)) + padded(4 * b_units(r, l.n)) +
           padded(size_t(4 * kTile * l.rank));
}

// Rows [r, r + m) of one stream: u = alpha x F, y = add + x w + b + (beta u) S for the packed
// factors F and S. columns and depth: scales of w, or none.
void rows_of_stream(const Lora &l, const Work &work, int64_t r, int64_t m, View x, View b,
                    const float *add, View y, View u, float alpha, float beta, View columns,
                    View depth) {
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
    p.part[0] = low.part[0];
    l.w.use(p, 0, 0);
    p.wide = work.wide, p.scales = columns;
    if (depth.data)
        left_operand(p.part[0], work.x, x.at(r * l.k), l.k, m, l.k, l.half_, depth);
    p.part[1] = packed_part(work.u, work.second, units(l.rank, l.half_));
    p.bias = b;
    if (add)
        p.add = add + r * l.n, p.add_row = l.n;
    p.y = y.at(r * l.n), p.y_row = l.n;
    product(p, m, l.n);
}

constexpr View no_scales = {nullptr, false};

View scales_of(const Lora &l, void *const *buffers) {
    return l.w.bytes ? View::of(buffers[l.out - 1], kF32) : no_scales;
}

// Where a column of w is all zeros its scale is 1, and none is so small that this overflows.
void divide_columns(float *to, View x, View by, int64_t m, int64_t n) {
    const View y = View::of(to, kF32);
    for (int64_t i = 0; i < m; ++i)
        each_vector(
            n, PONDER_EACH(j, w) { y.put(i * n + j, x.get(i * n + j, w) / by.get(j, w), w); });
}

void forward(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Lora &l = *static_cast<const Lora *>(kernel);
    const View scales = scales_of(l, buffers);
    const Work work = carve(l, workspace);
    const Span s = span(task, kTile, l.row_count);
    for (int64_t r = s.begin; r < s.end;) {
        const int64_t stream = r / l.tokens, end = smaller(s.end, (stream + 1) * l.tokens);
        const View a = View::of(buffers[3], kF32).at(stream * l.k * l.rank);
        const View bb = View::of(buffers[4], kF32).at(stream * l.rank * l.n);
        pack_b(work.first, a, l.rank, 1, l.k, l.rank, l.half_);
        if (l.w.bytes)
            divide_columns(work.scaled, bb, scales, l.rank, l.n);
        pack_b(work.second, l.w.bytes ? View::of(work.scaled, kF32) : bb, l.n, 1, l.rank, l.n,
               l.half_);
        rows_of_stream(l, work, r, end - r, View::of(buffers[0], l.x), View::of(buffers[2], l.b),
                       static_cast<const float *>(buffers[5]), View::of(buffers[l.out], l.y),
                       View::of(buffers[l.out + 1], l.u), 1, l.scale, scales, no_scales);
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
                       View::of(buffers[l.out], l.y), View::of(buffers[l.out + 1], l.u), l.scale, 1,
                       no_scales, scales_of(l, buffers));
        r = end;
    }
}

constexpr int64_t kUnpackedRows = 16;

size_t few_bytes(const Lora &l) {
    const int64_t columns = smaller(few_columns(l.n, l.w), l.n);
    return padded(4 * a_rows_units(l.w.depth)) + padded(size_t(4 * l.k)) +
           padded(size_t(4 * l.row_count * l.rank)) + padded(size_t(4 * l.row_count * columns));
}

void forward_few(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Lora &l = *static_cast<const Lora *>(kernel);
    const int64_t columns = few_columns(l.n, l.w);
    const Span s = span(task, columns, l.n);
    const int64_t n = s.end - s.begin, r = l.rank;
    Carver carver{static_cast<char *>(workspace)};
    uint32_t *work = carver.take<uint32_t>(a_rows_units(l.w.depth));
    float *x = carver.take<float>(size_t(l.k));
    float *low = carver.take<float>(size_t(l.row_count * r));
    float *sums = carver.take<float>(size_t(l.row_count * smaller(columns, l.n)));
    const View all = View::of(buffers[0], l.x), u = View::of(buffers[l.out + 1], l.u);
    for (int64_t i = 0; i < l.row_count; ++i) {
        const float *a = static_cast<const float *>(buffers[3]) + i / l.tokens * l.k * r;
        const View row = all.at(i * l.k);
        each_vector(
            l.k, PONDER_EACH(j, w) {
                const vf v = row.get(j, w);
                w == W ? store(x + j, v) : store(x + j, v, w);
            });
        each_vector(
            r, PONDER_EACH(j, w) {
                vf sum[4] = {set(0), set(0), set(0), set(0)};
                const auto add = [&](int64_t k, vf & to) __attribute__((always_inline)) {
                    const float *at = a + k * r + j;
                    to = fma(set(x[k]), w == W ? load(at) : load(at, w), to);
                };
                int64_t k = 0;
                for (; k + 4 <= l.k; k += 4)
#pragma GCC unroll 4
                    for (int i4 = 0; i4 < 4; ++i4)
                        add(k + i4, sum[i4]);
                for (; k < l.k; ++k)
                    add(k, sum[0]);
                const vf v = (sum[0] + sum[1]) + (sum[2] + sum[3]);
                if (task == 0)
                    u.put(i * r + j, v, w);
                w == W ? store(low + i * r + j, v) : store(low + i * r + j, v, w);
            });
    }
    FewRows few = {l.row_count, l.k, l.n, l.half_, l.w};
    few.x = all;
    few.scales = scales_of(l, buffers);
    few.bias = View::of(buffers[2], l.b);
    few.add = static_cast<const float *>(buffers[5]);
    few.y = View::of(sums, kF32), few.y_row = n;
    few_rows(few, s.begin, n, work);
    for (int64_t i = 0; i < l.row_count; ++i) {
        const float *bb = static_cast<const float *>(buffers[4]) + i / l.tokens * r * l.n + s.begin;
        const View base = View::of(sums + i * n, kF32);
        const View y = View::of(buffers[l.out], l.y).at(i * l.n + s.begin);
        each_vector(
            n, PONDER_EACH(j, w) {
                vf sum = set(0);
                for (int64_t k = 0; k < r; ++k) {
                    const float *at = bb + k * l.n + j;
                    sum = fma(set(low[i * r + k]), w == W ? load(at) : load(at, w), sum);
                }
                y.put(j, fma(set(l.scale), sum, base.get(j, w)), w);
            });
    }
}

} // namespace

int32_t plan_lora_linear(const Call &c) {
    if (!c.op->constant[1] || !floats(in(c, 0)) || !is_weight(in(c, 1)) ||
        !floats_or_none(in(c, 2)) || in(c, 3).dtype != kF32 || in(c, 4).dtype != kF32 ||
        !f32_or_none(in(c, 5)) || !floats(out(c, 0)) || !floats(out(c, 1)) ||
        (scaled(c, 1) && !scales_columns(c, last(out(c, 0)), false)))
        return PONDER_PLAN_NONE;
    Lora *l = new_kernel<Lora>(forward);
    if (!l)
        return PONDER_PLAN_FAILED;
    l->row_count = rows(in(c, 0)), l->tokens = in(c, 0).dim[in(c, 0).rank - 2];
    l->k = last(in(c, 0)), l->n = last(out(c, 0)), l->rank = last(in(c, 3));
    l->scale = float(attr(c, 0));
    l->half_ = is_half(c, 1, in(c, 0), out(c, 0));
    l->out = c.op->n_in;
    l->x = in(c, 0).dtype, l->b = in(c, 2).dtype, l->y = out(c, 0).dtype, l->u = out(c, 1).dtype;
    l->w = pack_weight(c, 1, l->k, l->n, false, l->half_);
    if (!l->w)
        return forget(l);
    if (l->row_count <= kUnpackedRows) {
        l->run = forward_few;
        return planned(c, l, tiles(l->n, few_columns(l->n, l->w)), PONDER_TILE_ANY, few_bytes(*l));
    }
    return planned_rows(c, l, l->row_count, work_bytes(*l));
}

int32_t plan_lora_linear_vjp(const Call &c) {
    if (!c.op->constant[1] || !floats(in(c, 0)) || !is_weight(in(c, 1)) || in(c, 2).dtype != kF32 ||
        in(c, 3).dtype != kF32 || !floats(out(c, 0)) || !floats(out(c, 1)))
        return PONDER_PLAN_NONE;
    Lora *l = new_kernel<Lora>(backward);
    if (!l)
        return PONDER_PLAN_FAILED;
    l->row_count = rows(in(c, 0)), l->tokens = in(c, 0).dim[in(c, 0).rank - 2];
    l->k = last(in(c, 0)), l->n = last(out(c, 0)), l->rank = last(in(c, 2));
    l->scale = float(attr(c, 0));
    l->half_ = is_half(c, 1, in(c, 0), out(c, 0));
    l->out = c.op->n_in;
    l->x = in(c, 0).dtype, l->y = out(c, 0).dtype, l->u = out(c, 1).dtype;
    l->w = pack_weight(c, 1, l->k, l->n, true, l->half_);
    if (!l->w)
        return forget(l);
    return planned_rows(c, l, l->row_count, work_bytes(*l));
}

} // namespace ponder::cpu::PONDER_ISA
