// attention: o_i = sum_{j<=i} p_ij v_j, p_ij = exp(q_i k_j / sqrt(D) - lse_i), Vaswani et al. 2017,
// by tiles with running maxima (Dao et al. 2022, arXiv 2205.14135). A task is one tile of 64
// queries of one head. Scores are made transposed, st[key, query] = K Q^T: a vector then holds one
// key for many queries, so maxima and sums need no shuffles, and exp(st) already lies as the left
// operand of P V does (columns layout).
#include "attention.hpp"

#include "ops.hpp"

#include <math.h>

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kKeys = 128; // at a time
constexpr float kNever = -3e38f;

struct Work {
    uint32_t *q, *k, *pairs, *v;
    float *st, *o;           // [128, 80], [64, D]
    float *top, *sum, *down; // [64]
};

size_t work(int64_t head, bool half_, void *workspace, Work *w) {
    const int64_t d = units(head, half_);
    Carver c{static_cast<char *>(workspace)};
    w->q = c.take<uint32_t>(b_units(d, kTile));
    w->k = c.take<uint32_t>(a_rows_units(d));
    w->st = c.take<float>(a_columns_units(kKeys));
    w->pairs = c.take<uint32_t>(half_ ? a_transposed_units(kKeys) : 0);
    w->v = c.take<uint32_t>(b_units(units(kKeys, half_), head));
    w->o = c.take<float>(size_t(kTile * head));
    w->top = c.take<float>(kTile);
    w->sum = c.take<float>(kTile);
    w->down = c.take<float>(kTile);
    return size_t(c.at - static_cast<char *>(workspace));
}

// exp(st - top) in place for `keys` keys from `key` on and queries from `query` on; keys after a
// query give 0. Updates top and sum, leaves the factor of the earlier sums in down.
void softmax_step(const Work &w, int64_t key, int64_t keys, int64_t query) {
    for (int64_t q = 0; q < kTile; q += W) {
        float *st = w.st + q;
        const vf lane = lane_index() + set(float(query + q));
        vf top = load(w.top + q);
        for (int64_t j = 0; j < keys; ++j) {
            vf x = load(st + j * kStride);
            if (key + j > query + q) {
                x = where_below(lane, set(float(key + j)), set(kNever), x);
                store(st + j * kStride, x);
            }
            top = max(top, x);
        }
        const vf down = exp(load(w.top + q) - top);
        vf sum = load(w.sum + q) * down;
        for (int64_t j = 0; j < keys; ++j) {
            const vf e = exp(load(st + j * kStride) - top);
            store(st + j * kStride, e);
            sum += e;
        }
        store(w.top + q, top);
        store(w.sum + q, sum);
        store(w.down + q, down);
    }
}

} // namespace

size_t attention_workspace(int64_t head, bool half_) {
    Work w;
    return work(head, half_, nullptr, &w);
}

void attention_tile(const AttentionTile &t, void *workspace) {
    Work w;
    work(t.head, t.half_, workspace, &w);
    const int64_t d = t.head, m = t.m;
    pack_b(w.q, t.q, 1, t.q_row, d, m, t.half_);
    for (int64_t i = 0; i < kTile; ++i)
        w.top[i] = kNever, w.sum[i] = 0;
    Product scores, output;
    scores.half = output.half = t.half_;
    scores.alpha = 1 / __builtin_sqrtf(float(d));
    scores.y_row = kStride;
    scores.part[0] = packed_part(w.k, w.q, units(d, t.half_));
    output.columns = !t.half_ || kTransposedIsColumns;
    output.y = View::of(w.o, kF32), output.y_row = d;
    const auto add_keys = [&](const Keys &from, int64_t at, int64_t keys, int64_t key) {
        for (int64_t j = 0; j < keys; j += kTile) {
            const int64_t n = smaller(kTile, keys - j);
            left_operand(scores.part[0], w.k, from.k.at((at + j) * from.row), from.row, n, d,
                         t.half_);
            scores.y = View::of(w.st + j * kStride, kF32);
            product(scores, n, m);
        }
        softmax_step(w, key, keys, t.first);
        const int64_t depth = units(keys, t.half_);
        if (t.half_)
            pack_a_transposed(w.pairs, View::of(w.st, kF32), kStride, keys, m);
        const uint32_t *p = t.half_ ? w.pairs : reinterpret_cast<const uint32_t *>(w.st);
        const View v = from.v.at(at * from.row);
        if (!t.half_ && d % kPanel == 0) {
            output.part[0] =
                direct_part(p, reinterpret_cast<const float *>(v.data), depth, from.row);
        } else {
            pack_b(w.v, v, from.row, 1, keys, d, t.half_);
            output.part[0] = packed_part(p, w.v, depth);
        }
        if (output.accumulate)
            for (int64_t i = 0; i < m; ++i) {
                const vf f = set(w.down[i]);
                const View o = output.y.at(i * d);
                each_vector(
                    d, PONDER_EACH(c, n) { o.put(c, o.get(c, n) * f, n); });
            }
        product(output, m, d);
        output.accumulate = true;
    };
    int64_t key = 0;
    for (const Keys &from : t.part)
        for (int64_t at = 0; at < from.count; at += kKeys) {
            const int64_t keys = smaller(kKeys, from.count - at);
            add_keys(from, at, keys, key);
            key += keys;
        }
    for (int64_t i = 0; i < m; ++i) {
        if (t.lse)
            t.lse[i] = w.top[i] + ::logf(w.sum[i]);
        const vf f = set(1 / w.sum[i]);
        const View o = t.o.at(i * t.o_row);
        each_vector(
            d, PONDER_EACH(c, n) { o.put(c, output.y.get(i * d + c, n) * f, n); });
    }
}

namespace {

struct Attention : Kernel {
    int64_t streams, tokens, width, heads, head;
    bool half_;
    int32_t qkv, o;
};

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Attention &t = *static_cast<const Attention *>(kernel);
    // The longest rows first: the last tasks to be taken are then short.
    const int64_t pairs = t.streams * t.heads, row = 3 * t.width;
    const int64_t query = (tiles(t.tokens, kTile) - 1 - task / pairs) * kTile;
    const int64_t stream = task % pairs / t.heads, h = task % t.heads;
    const int64_t m = smaller(kTile, t.tokens - query), first = stream * t.tokens;
    const View q = View::of(buffers[0], t.qkv).at(first * row + h * t.head);
    AttentionTile a = {};
    a.head = t.head, a.half_ = t.half_;
    a.q = q.at(query * row), a.q_row = row, a.m = m, a.first = query;
    a.part[0] = {q.at(t.width), q.at(2 * t.width), row, query + m};
    a.o = View::of(buffers[1], t.o).at((first + query) * t.width + h * t.head), a.o_row = t.width;
    a.lse = static_cast<float *>(buffers[2]) + (stream * t.heads + h) * t.tokens + query;
    attention_tile(a, workspace);
}

} // namespace

int32_t plan_attention(const Call &c) {
    const int64_t heads = int64_t(attr(c, 0)), width = last(out(c, 0));
    if (!floats(in(c, 0)) || !floats(out(c, 0)) || out(c, 1).dtype != kF32 || in(c, 0).rank != 3 ||
        heads < 1 || width % heads || last(in(c, 0)) != 3 * width)
        return PONDER_PLAN_NONE;
    Attention *t = new_kernel<Attention>(run);
    if (!t)
        return PONDER_PLAN_FAILED;
    t->streams = in(c, 0).dim[0], t->tokens = in(c, 0).dim[1], t->width = width;
    t->heads = heads, t->head = width / heads;
    t->qkv = in(c, 0).dtype, t->o = out(c, 0).dtype;
    t->half_ = t->qkv == kBF16;
    return planned(c, t, t->streams * heads * tiles(t->tokens, kTile), PONDER_TILE_ANY,
                   attention_workspace(t->head, t->half_));
}

} // namespace ponder::cpu::PONDER_ISA
