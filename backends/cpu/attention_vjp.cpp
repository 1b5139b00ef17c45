// attention_vjp: with p_ij = exp(q_i k_j / sqrt(D) - lse_i) and delta_i = do_i o_i,
//     dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i v_j - delta_i) / sqrt(D),
//     dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i       Dao et al. 2022, arXiv 2205.14135
// A task is one head of one stream and writes all of its dq, dk, dv: no sums between tasks. As in
// attention.cpp scores lie transposed, [key, query]: as they stand they are the left operand
// (rows layout) of dv and dk, read by columns that of dq.
#include "gemm.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct AttentionVjp : Kernel {
    int64_t tokens, width, heads, head;
    bool half_;
    int32_t qkv, o, grad, dqkv;
};

struct Work {
    // Per tile of 64 tokens: q and do as right operands, transposed [D, 64] and straight [64, D]
    uint32_t *qt, *gt, *q, *g;
    uint32_t *k_left, *v_left, *k; // of one tile of keys: left operands [64, D], right [64, D]
    float *p, *ds;                 // [64, 80]
    uint32_t *p_left, *ds_left, *ds_columns; // bf16 only; in f32 p and ds themselves
    float *delta;                            // [T]
    float *dq, *dk, *dv;                     // [T, D], [64, D], [64, D]
    int64_t straight, across;                // units of a straight and of a transposed tile
};

size_t work(const AttentionVjp &t, void *workspace, Work *w) {
    const int64_t d = units(t.head, t.half_), n = tiles(t.tokens, kTile);
    const size_t left = a_rows_units(units(kTile, t.half_));
    w->across = int64_t(b_units(d, kTile));
    w->straight = int64_t(b_units(units(kTile, t.half_), t.head));
    Carver c{static_cast<char *>(workspace)};
    w->qt = c.take<uint32_t>(size_t(n * w->across));
    w->gt = c.take<uint32_t>(size_t(n * w->across));
    w->q = c.take<uint32_t>(size_t(n * w->straight));
    w->g = c.take<uint32_t>(size_t(n * w->straight));
    w->k_left = c.take<uint32_t>(a_rows_units(d));
    w->v_left = c.take<uint32_t>(a_rows_units(d));
    w->k = c.take<uint32_t>(size_t(w->straight));
    w->p = c.take<float>(size_t(kChunkUnits));
    w->ds = c.take<float>(size_t(kChunkUnits));
    w->p_left = c.take<uint32_t>(t.half_ ? left : 0);
    w->ds_left = c.take<uint32_t>(t.half_ ? left : 0);
    w->ds_columns = c.take<uint32_t>(t.half_ ? a_transposed_units(kTile) : 0);
    w->delta = c.take<float>(size_t(n * kTile));
    w->dq = c.take<float>(size_t(t.tokens * t.head));
    w->dk = c.take<float>(size_t(kTile * t.head));
    w->dv = c.take<float>(size_t(kTile * t.head));
    return size_t(c.at - static_cast<char *>(workspace));
}

// p = exp(st - lse), ds = p (dp - delta) scale in place, st in p and dp in ds at first; keys after
// a query give 0. Then the bf16 forms.
void scores(const Work &w, const float *lse, const float *delta, float scale, int64_t key,
            int64_t keys, int64_t query, int64_t queries, bool half_) {
    for (int64_t q = 0; q < queries; q += W) {
        const int n = int(smaller(W, queries - q));
        const vf top = n == W ? load(lse + q) : load(lse + q, n);
        const vf shift = n == W ? load(delta + q) : load(delta + q, n);
        const vf lane = lane_index() + set(float(query + q));
        for (int64_t j = 0; j < keys; ++j) {
            float *pj = w.p + j * kStride + q, *dj = w.ds + j * kStride + q;
            vf p = exp(load(pj) - top);
            if (n != W)
                p = clear(p, n);
            if (key + j > query + q)
                p = where_below(lane, set(float(key + j)), set(0), p);
            vf ds = p * (load(dj) - shift) * set(scale);
            if (n != W)
                ds = clear(ds, n);
            store(pj, p);
            store(dj, ds);
        }
    }
    if (!half_)
        return;
    for (int64_t j = 0; j < keys; ++j)
        for (int64_t q = 0; q < 2 * units(queries, true); q += W) {
            const int64_t at = j * kStride + q;
            const vf p = q < queries ? load(w.p + at) : set(0);
            const vf ds = q < queries ? load(w.ds + at) : set(0);
            store(reinterpret_cast<half *>(w.p_left + j * kStride) + q, p);
            store(reinterpret_cast<half *>(w.ds_left + j * kStride) + q, ds);
        }
    pack_a_transposed(w.ds_columns, View::of(w.ds, kF32), kStride, keys, queries);
}

// The right operand x[n, D]: where it stands, or packed, which is done when it is `fresh`.
Part straight(const AttentionVjp &t, const uint32_t *left, uint32_t *packed, View x, int64_t step,
              int64_t n, bool fresh) {
    if (!t.half_ && !x.narrow && t.head % kPanel == 0)
        return direct_part(left, reinterpret_cast<const float *>(x.data), n, step);
    if (fresh)
        pack_b(packed, x, step, 1, n, t.head, t.half_);
    return packed_part(left, packed, units(n, t.half_));
}

void put_rows(View to, int64_t step, const float *from, int64_t n, int64_t d) {
    for (int64_t i = 0; i < n; ++i) {
        const View x = View::of(const_cast<float *>(from + i * d), kF32), y = to.at(i * step);
        each_vector(
            d, PONDER_EACH(c, w) { y.put(c, x.get(c, w), w); });
    }
}

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const AttentionVjp &t = *static_cast<const AttentionVjp *>(kernel);
    Work w;
    work(t, workspace, &w);
    const int64_t tokens = t.tokens, d = t.head, row = 3 * t.width, n = tiles(tokens, kTile);
    const int64_t stream = task / t.heads, h = task % t.heads;
    const int64_t at = stream * tokens * t.width + h * d;
    const View q = View::of(buffers[0], t.qkv).at(stream * tokens * row + h * d);
    const View k = q.at(t.width), v = q.at(2 * t.width);
    const View o = View::of(buffers[1], t.o).at(at), g = View::of(buffers[3], t.grad).at(at);
    const View dq = View::of(buffers[4], t.dqkv).at(stream * tokens * row + h * d);
    const View dk = dq.at(t.width), dv = dq.at(2 * t.width);
    const float *lse = static_cast<const float *>(buffers[2]) + (stream * t.heads + h) * tokens;
    const float scale = 1 / __builtin_sqrtf(float(d));
    const int64_t depth = units(d, t.half_);

    for (int64_t i = 0; i < tokens; ++i) {
        vf sum_ = set(0);
        const View oi = o.at(i * t.width), gi = g.at(i * t.width);
        each_vector(
            d, PONDER_EACH(c, m) { sum_ = fma(oi.get(c, m), gi.get(c, m), sum_); });
        w.delta[i] = sum(sum_);
    }
    for (int64_t i = 0; i < n; ++i) {
        const int64_t m = smaller(kTile, tokens - i * kTile);
        pack_b(w.qt + i * w.across, q.at(i * kTile * row), 1, row, d, m, t.half_);
        pack_b(w.gt + i * w.across, g.at(i * kTile * t.width), 1, t.width, d, m, t.half_);
    }
    const uint32_t *p_left = t.half_ ? w.p_left : reinterpret_cast<const uint32_t *>(w.p);
    const uint32_t *ds_left = t.half_ ? w.ds_left : reinterpret_cast<const uint32_t *>(w.ds);
    const uint32_t *ds_columns = t.half_ ? w.ds_columns : reinterpret_cast<const uint32_t *>(w.ds);
    Product st, dp, add_dv, add_dk, add_dq;
    st.half = dp.half = add_dv.half = add_dk.half = add_dq.half = t.half_;
    st.alpha = scale;
    st.y = View::of(w.p, kF32), dp.y = View::of(w.ds, kF32);
    st.y_row = dp.y_row = kStride;
    add_dv.y = View::of(w.dv, kF32), add_dk.y = View::of(w.dk, kF32);
    add_dv.y_row = add_dk.y_row = add_dq.y_row = d;
    add_dq.columns = !t.half_ || kTransposedIsColumns;

    for (int64_t j = 0; j < n; ++j) {
        const int64_t key = j * kTile, keys = smaller(kTile, tokens - key);
        st.part[0] = packed_part(w.k_left, w.qt, depth);
        dp.part[0] = packed_part(w.v_left, w.gt, depth);
        left_operand(st.part[0], w.k_left, k.at(key * row), row, keys, d, t.half_);
        left_operand(dp.part[0], w.v_left, v.at(key * row), row, keys, d, t.half_);
        add_dq.part[0] = straight(t, ds_columns, w.k, k.at(key * row), row, keys, true);
        add_dv.accumulate = add_dk.accumulate = false;
        add_dq.accumulate = j > 0;
        for (int64_t i = j; i < n; ++i) {
            const int64_t query = i * kTile, m = smaller(kTile, tokens - query);
            st.part[0].b = w.qt + i * w.across;
            dp.part[0].b = w.gt + i * w.across;
            product(st, keys, m);
            product(dp, keys, m);
            scores(w, lse + query, w.delta + query, scale, key, keys, query, m, t.half_);
            uint32_t *gs = w.g + i * w.straight, *qs = w.q + i * w.straight;
            add_dv.part[0] = straight(t, p_left, gs, g.at(query * t.width), t.width, m, j == 0);
            add_dk.part[0] = straight(t, ds_left, qs, q.at(query * row), row, m, j == 0);
            product(add_dv, keys, d);
            product(add_dk, keys, d);
            add_dv.accumulate = add_dk.accumulate = true;
            add_dq.y = View::of(w.dq + query * d, kF32);
            product(add_dq, m, d);
        }
        put_rows(dk.at(key * row), row, w.dk, keys, d);
        put_rows(dv.at(key * row), row, w.dv, keys, d);
    }
    put_rows(dq, row, w.dq, tokens, d);
}

} // namespace

int32_t plan_attention_vjp(const Call &c) {
    const int64_t heads = int64_t(attr(c, 0)), width = last(in(c, 1));
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || in(c, 2).dtype != kF32 || !floats(in(c, 3)) ||
        !floats(out(c, 0)) || in(c, 0).rank != 3 || heads < 1 || width % heads ||
        last(in(c, 0)) != 3 * width)
        return PONDER_PLAN_NONE;
    AttentionVjp *t = new_kernel<AttentionVjp>(run);
    if (!t)
        return PONDER_PLAN_FAILED;
    t->tokens = in(c, 0).dim[1], t->width = width, t->heads = heads, t->head = width / heads;
    t->qkv = in(c, 0).dtype, t->o = in(c, 1).dtype, t->grad = in(c, 3).dtype;
    t->dqkv = out(c, 0).dtype;
    t->half_ = t->qkv == kBF16;
    Work w;
    return planned(c, t, in(c, 0).dim[0] * heads, PONDER_TILE_ANY, work(*t, nullptr, &w));
}

} // namespace ponder::cpu::PONDER_ISA
