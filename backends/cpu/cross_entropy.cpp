// cross_entropy: l = h table^T; with e = exp(l - top) and z = sum e,
//     nll = top + log z - l[target],  entropy = log z - sum e (l - top) / z,  p = e / z.
// A task is one tile of rows. The logits of 512 columns at a time are made in the workspace and
// reduced at once, the sums being rescaled when a row's top rises. Where p is wanted, e goes to p
// relative to the top of its time, and a second sweep over the tile makes up for the difference.
// cross_entropy_vjp: dh = dnll (p table - table[target]), 0 for rows without target.
// An int8 table has a scale for each row: of a column of the logits, of a column of p in the vjp.
#include "gemm.hpp"
#include "ops.hpp"

#include <math.h>

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kColumns = 512, kRow = kColumns + 16;
constexpr int64_t kDepth = 512; // units of V at a time in the vjp

struct CrossEntropy : Kernel {
    int64_t row_count, width, vocabulary;
    Weight table;
    bool half_;
    int32_t h, p, dh, stored_table;
    uint32_t out; // place of the first output
};

// The running sums of a tile's rows.
struct Sums {
    float top[kTile], z[kTile], weighted[kTile], target[kTile];
};

void reduce(const float *l, int64_t n, int64_t row, Sums &s, View e_out) {
    vf tops = set(-3e38f);
    each_vector(
        n, PONDER_EACH(i, w) {
            if (w == W)
                tops = max(tops, load(l + i));
            else
                tops = max(tops, where_below(lane_index(), set(float(w)), load(l + i, w), tops));
        });
    const float before = s.top[row], here = largest(tops), top = here > before ? here : before;
    const vf vtop = set(top);
    vf z = set(0), weighted = set(0);
    each_vector(
        n, PONDER_EACH(i, w) {
            const vf d = (w == W ? load(l + i) : load(l + i, w)) - vtop;
            vf e = exp(d);
            if (w != W)
                e = clear(e, w);
            z += e;
            weighted = fma(e, d, weighted);
            if (e_out.data)
                e_out.put(i, e, w);
        });
    const float down = row_exp(before - top);
    // sum e^(l - top) (l - top) of the earlier columns, moved to the new top
    const float moved = down > 0 ? down * (s.weighted[row] + s.z[row] * (before - top)) : 0;
    s.weighted[row] = moved + sum(weighted);
    s.z[row] = down * s.z[row] + sum(z);
    s.top[row] = top;
}

void forward(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const CrossEntropy &k = *static_cast<const CrossEntropy *>(kernel);
    const int64_t v = k.vocabulary, depth = units(k.width, k.half_);
    const Span s = span(task, kTile, k.row_count);
    const int64_t m = s.end - s.begin;
    const int32_t *target = static_cast<const int32_t *>(buffers[2]) + s.begin;
    const View p = View::of(buffers[k.out + 2], k.p);
    Carver carver{static_cast<char *>(workspace)};
    uint32_t *a = carver.take<uint32_t>(a_rows_units(depth));
    float *logits = carver.take<float>(size_t(kTile * kRow));
    float *tops = carver.take<float>(size_t(tiles(v, kColumns) * kTile)); // of e in p, per block
    uint32_t *wide = carver.take<uint32_t>(0);
    Sums sums;
    for (int64_t i = 0; i < m; ++i)
        sums.top[i] = -3e38f, sums.z[i] = sums.weighted[i] = sums.target[i] = 0;

    Product product_;
    product_.half = k.half_;
    product_.y = View::of(logits, kF32), product_.y_row = kRow;
    product_.wide = wide;
    left_operand(product_.part[0], a, View::of(buffers[0], k.h).at(s.begin * k.width), k.width, m,
                 k.width, k.half_);
    for (int64_t c = 0; c < v; c += kColumns) {
        const int64_t n = smaller(v - c, kColumns);
        k.table.use(product_, c, 0);
        if (k.table.bytes)
            product_.scales = View::of(buffers[k.out - 1], kF32).at(c);
        product(product_, m, n);
        for (int64_t i = 0; i < m; ++i) {
            if (target[i] >= c && target[i] < c + n)
                sums.target[i] = logits[i * kRow + target[i] - c];
            const View e = p.data ? p.at((s.begin + i) * v + c) : p;
            reduce(logits + i * kRow, n, i, sums, e);
            tops[c / kColumns * kTile + i] = sums.top[i];
        }
    }
    float *nll = static_cast<float *>(buffers[k.out]) + s.begin;
    float *entropy = static_cast<float *>(buffers[k.out + 1]) + s.begin;
    for (int64_t i = 0; i < m; ++i) {
        const float log_z = ::logf(sums.z[i]);
        nll[i] = target[i] < 0 ? 0 : log_z - (sums.target[i] - sums.top[i]);
        entropy[i] = log_z - sums.weighted[i] / sums.z[i];
    }
    if (!p.data)
        return;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < v; c += kColumns) {
            const View e = p.at((s.begin + i) * v + c);
            const float down = row_exp(tops[c / kColumns * kTile + i] - sums.top[i]);
            const vf f = set(down / sums.z[i]);
            each_vector(
                smaller(v - c, kColumns), PONDER_EACH(j, n) { e.put(j, e.get(j, n) * f, n); });
        }
}

void backward(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const CrossEntropy &k = *static_cast<const CrossEntropy *>(kernel);
    const int64_t v = k.vocabulary, c = k.width, step = k.half_ ? 2 * kDepth : kDepth;
    const Span s = span(task, kTile, k.row_count);
    const int64_t m = s.end - s.begin;
    const bool bytes = k.table.bytes != nullptr;
    const View scales = {bytes ? static_cast<char *>(buffers[k.out - 1]) : nullptr, false};
    Carver carver{static_cast<char *>(workspace)};
    uint32_t *a = carver.take<uint32_t>(a_rows_units(kDepth));
    float *sums = carver.take<float>(size_t(kTile * c));
    uint32_t *wide = carver.take<uint32_t>(0);
    Product p;
    p.half = k.half_;
    p.y = View::of(sums, kF32), p.y_row = c;
    for (int64_t j = 0; j < v; j += step) {
        const int64_t n = smaller(v - j, step);
        const View from = View::of(buffers[0], k.p).at(s.begin * v + j);
        k.table.use(p, 0, units(j, k.half_));
        p.part[0].k = units(n, k.half_);
        p.wide = wide;
        left_operand(p.part[0], a, from, v, m, n, k.half_, bytes ? scales.at(j) : scales);
        product(p, m, c);
        p.accumulate = true;
    }
    const View table = View::of(buffers[1], k.stored_table);
    const int8_t *stored = static_cast<const int8_t *>(buffers[1]);
    const int32_t *target = static_cast<const int32_t *>(buffers[2]) + s.begin;
    const float *dnll = static_cast<const float *>(buffers[3]) + s.begin;
    for (int64_t i = 0; i < m; ++i) {
        const bool learn = target[i] >= 0 && target[i] < v;
        const int64_t row = learn ? target[i] * c : 0;
        const View dh = View::of(buffers[k.out], k.dh).at((s.begin + i) * c);
        const vf d = set(dnll[i]), scale = set(bytes && learn ? scales.one(target[i]) : 1);
        each_vector(
            c, PONDER_EACH(j, n) {
                const vf t = bytes ? load(stored + row + j, n) * scale : table.get(row + j, n);
                const vf g = (p.y.get(i * c + j, n) - t) * d;
                dh.put(j, learn ? g : set(0), n);
            });
    }
}

} // namespace

int32_t plan_cross_entropy(const Call &c) {
    if (!c.op->constant[1] || !floats(in(c, 0)) || !is_weight(in(c, 1)) || in(c, 2).dtype != kI32 ||
        out(c, 0).dtype != kF32 || out(c, 1).dtype != kF32 || !floats_or_none(out(c, 2)) ||
        (scaled(c, 1) && !scales_columns(c, in(c, 1).dim[0], true)))
        return PONDER_PLAN_NONE;
    CrossEntropy *k = new_kernel<CrossEntropy>(forward);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->width = last(in(c, 0)), k->vocabulary = in(c, 1).dim[0];
    k->half_ = is_half(c, 1, in(c, 0), out(c, 2)), k->out = c.op->n_in;
    k->h = in(c, 0).dtype, k->p = out(c, 2).dtype;
    k->table = pack_weight(c, 1, k->width, k->vocabulary, true, k->half_);
    if (!k->table)
        return forget(k);
    return planned_rows(c, k, k->row_count,
                        padded(4 * a_rows_units(units(k->width, k->half_))) +
                            padded(4 * kTile * kRow) +
                            padded(size_t(4 * tiles(k->vocabulary, kColumns) * kTile)) +
                            4 * wide_units(c, 1, k->row_count, k->table.depth));
}

int32_t plan_cross_entropy_vjp(const Call &c) {
    if (!c.op->constant[1] || !floats(in(c, 0)) || !is_weight(in(c, 1)) || in(c, 2).dtype != kI32 ||
        in(c, 3).dtype != kF32 || !floats(out(c, 0)) ||
        (scaled(c, 1) && !scales_columns(c, in(c, 1).dim[0], true)))
        return PONDER_PLAN_NONE;
    CrossEntropy *k = new_kernel<CrossEntropy>(backward);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->width = last(out(c, 0)), k->vocabulary = in(c, 1).dim[0];
    k->half_ = is_half(c, 1, in(c, 0), out(c, 0)), k->out = c.op->n_in;
    k->p = in(c, 0).dtype, k->dh = out(c, 0).dtype, k->stored_table = in(c, 1).dtype;
    k->table = pack_weight(c, 1, k->vocabulary, k->width, false, k->half_);
    if (!k->table)
        return forget(k);
    return planned_rows(c, k, k->row_count,
                        padded(4 * a_rows_units(kDepth)) + padded(size_t(4 * kTile * k->width)) +
                            4 * wide_units(c, 1, k->row_count, kDepth));
}

} // namespace ponder::cpu::PONDER_ISA
