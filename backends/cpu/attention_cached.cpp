// attention_cached: attention over keys that were kept and those of new tokens, which are added.
// Many new tokens go by tiles (attention.hpp). Few are read-bound: their keys and values are
// streamed once, a vector of W scores at a time, and a task is one head of one stream.
#include "attention.hpp"
#include "ops.hpp"
#include "transpose.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kFew = 4; // new tokens of a stream

struct Cached : Kernel {
    int64_t streams, tokens, width, heads, head, places;
    bool half_;
    int32_t qkv, o;
};

// Where one head of one stream lies.
struct Head {
    View q, k, v;      // of the new tokens, rows 3 C apart
    View keys, values; // [N, D]
    int64_t first;
};

Head head_of(const Cached &t, void *const *buffers, int64_t pair) {
    const int64_t s = pair / t.heads, h = pair % t.heads, all = t.places * t.head;
    Head head;
    head.q = View::of(buffers[0], t.qkv).at(s * t.tokens * 3 * t.width + h * t.head);
    head.k = head.q.at(t.width), head.v = head.q.at(2 * t.width);
    head.keys = View::of(buffers[5], t.qkv).at(pair * all);
    head.values = View::of(buffers[6], t.qkv).at(pair * all);
    head.first = static_cast<const int32_t *>(buffers[1])[s];
    return head;
}

// Rows [from, to) of the new tokens into the caches.
void append(const Cached &t, const Head &head, int64_t from, int64_t to) {
    const size_t bytes = size_t(t.head) * (t.half_ ? 2 : 4);
    for (int64_t i = from; i < to && head.first + i < t.places; ++i) {
        const int64_t at = (head.first + i) * t.head, row = i * 3 * t.width;
        memcpy(head.keys.at(at).data, head.k.at(row).data, bytes);
        memcpy(head.values.at(at).data, head.v.at(row).data, bytes);
    }
}

// The other rows, where the caches afterwards are not those before.
void copy_others(const Cached &t, const Head &head, void *const *buffers, int64_t pair) {
    const int64_t end = smaller(head.first + t.tokens, t.places);
    const size_t row = size_t(t.head) * (t.half_ ? 2 : 4), at = size_t(pair * t.places) * row;
    for (int i = 0; i < 2; ++i) {
        if (buffers[2 + i] == buffers[5 + i])
            continue;
        const char *from = static_cast<const char *>(buffers[2 + i]) + at;
        char *to = static_cast<char *>(buffers[5 + i]) + at;
        memcpy(to, from, size_t(head.first) * row);
        memcpy(to + size_t(end) * row, from + size_t(end) * row, size_t(t.places - end) * row);
    }
}

void many(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Cached &t = *static_cast<const Cached *>(kernel);
    const int64_t pairs = t.streams * t.heads, pair = task % pairs;
    const int64_t query = (tiles(t.tokens, kTile) - 1 - task / pairs) * kTile;
    const int64_t m = smaller(kTile, t.tokens - query), row = 3 * t.width;
    const Head head = head_of(t, buffers, pair);
    AttentionTile a = {};
    a.head = t.head, a.half_ = t.half_;
    a.q = head.q.at(query * row), a.q_row = row, a.m = m, a.first = head.first + query;
    // Other tasks add the keys of other tiles meanwhile: new ones are read where they come from.
    a.part[0] = {View::of(buffers[2], t.qkv).at(pair * t.places * t.head),
                 View::of(buffers[3], t.qkv).at(pair * t.places * t.head), t.head, head.first};
    a.part[1] = {head.k, head.v, row, query + m};
    const int64_t stream = pair / t.heads, h = pair % t.heads;
    a.o = View::of(buffers[4], t.o).at((stream * t.tokens + query) * t.width + h * t.head);
    a.o_row = t.width;
    attention_tile(a, workspace);
    append(t, head, query, query + m);
    if (query == 0)
        copy_others(t, head, buffers, pair);
}

// Sums of q k_i for keys i < n <= W, each in lanes yet.
template <class Sum> PONDER_INLINE vf scores(int n, Sum sum) {
    vf r[W];
    for (int i = 0; i < n; ++i)
        r[i] = sum(i);
    for (int i = n; i < W; ++i)
        r[i] = set(0);
    transpose(r);
    vf all[4] = {r[0], r[1], r[2], r[3]};
#pragma GCC unroll 16
    for (int i = 4; i < W; ++i)
        all[i % 4] += r[i];
    return (all[0] + all[1]) + (all[2] + all[3]);
}

PONDER_INLINE vf load_units(const void *p) { return load(static_cast<const float *>(p)); }

// p[j] = scale q k_j for n keys of D elements; returns the largest.
float all_scores(const View &q, const View &keys, int64_t d, int64_t n, float scale, float *p) {
    vf top = set(-3e38f);
    for (int64_t j = 0; j < n; j += W) {
        const int count = int(smaller(n - j, W));
        const View k = keys.at(j * d);
        vf s;
        if (q.narrow && d % (2 * W) == 0)
            s = scores(
                count, [&](int i) __attribute__((always_inline)) {
                    vf sum = set(0);
                    for (int64_t c = 0; c < d; c += 2 * W) {
                        const vf a = load_units(q.at(c).data), b = load_units(k.at(i * d + c).data);
#if defined(__AVX512BF16__)
                        sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
                    sum = fma(low_half(a), low_half(b), sum);
                    sum = fma(high_half(a), high_half(b), sum);
#endif
                    }
                    return sum;
                });
        else
            s = scores(
                count, [&](int i) __attribute__((always_inline)) {
                    vf sum = set(0);
                    each_vector(
                        d, PONDER_EACH(c, w) { sum = fma(q.get(c, w), k.get(i * d + c, w), sum); });
                    return sum;
                });
        s *= set(scale);
        if (count == W) {
            store(p + j, s);
            top = max(top, s);
        } else {
            store(p + j, s, count);
            top = max(top, where_below(lane_index(), set(float(count)), s, top));
        }
    }
    return largest(top);
}

// o = sum_j p_j v_j / total, N vectors of columns from c on; the last may have w lanes.
template <int N>
PONDER_INLINE void weighted_sum(const float *p, const View &values, int64_t d, int64_t n,
                                float total, const View &o, int64_t c, int w) {
    vf sums[2][N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
        sums[0][i] = sums[1][i] = set(0);
    const auto add = [&](int64_t j, vf(&sum)[N]) __attribute__((always_inline)) {
        const vf f = set(p[j]);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i)
            sum[i] =
                fma(f, N > 1 ? values.get(j * d + c + i * W) : values.get(j * d + c, w), sum[i]);
    };
    int64_t j = 0;
    for (; j + 1 < n; j += 2) {
        add(j, sums[0]);
        add(j + 1, sums[1]);
    }
    if (j < n)
        add(j, sums[0]);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        const vf x = (sums[0][i] + sums[1][i]) * set(1 / total);
        N > 1 ? o.put(c + i * W, x) : o.put(c, x, w);
    }
}

void few(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Cached &t = *static_cast<const Cached *>(kernel);
    const int64_t d = t.head, stream = task / t.heads, h = task % t.heads;
    const Head head = head_of(t, buffers, task);
    float *p = static_cast<float *>(workspace);
    copy_others(t, head, buffers, task);
    append(t, head, 0, t.tokens);
    for (int64_t i = 0; i < t.tokens; ++i) {
        const int64_t n = smaller(head.first + i + 1, t.places);
        const float top = all_scores(head.q.at(i * 3 * t.width), head.keys, d, n,
                                     1 / __builtin_sqrtf(float(d)), p);
        vf sums = set(0);
        each_vector(
            n, PONDER_EACH(j, w) {
                vf e = exp((w == W ? load(p + j) : load(p + j, w)) - set(top));
                if (w != W)
                    e = clear(e, w);
                w == W ? store(p + j, e) : store(p + j, e, w);
                sums += e;
            });
        const float total = sum(sums);
        const View o = View::of(buffers[4], t.o).at((stream * t.tokens + i) * t.width + h * d);
        int64_t c = 0;
        for (; c + 4 * W <= d; c += 4 * W)
            weighted_sum<4>(p, head.values, d, n, total, o, c, W);
        for (; c < d; c += W)
            weighted_sum<1>(p, head.values, d, n, total, o, c, int(smaller(d - c, W)));
    }
}

} // namespace

int32_t plan_attention_cached(const Call &c) {
    const ponder_tensor &qkv = in(c, 0), &keys = in(c, 2);
    if (!floats(qkv) || in(c, 1).dtype != kI32 || keys.dtype != qkv.dtype ||
        in(c, 3).dtype != qkv.dtype || out(c, 1).dtype != qkv.dtype ||
        out(c, 2).dtype != qkv.dtype || !floats(out(c, 0)) || qkv.rank != 3 || keys.rank != 4 ||
        last(qkv) != 3 * keys.dim[1] * keys.dim[3])
        return PONDER_PLAN_NONE;
    const bool is_few = qkv.dim[1] <= kFew;
    Cached *t = new_kernel<Cached>(is_few ? few : many);
    if (!t)
        return PONDER_PLAN_FAILED;
    t->streams = qkv.dim[0], t->tokens = qkv.dim[1], t->width = last(qkv) / 3;
    t->heads = keys.dim[1], t->places = keys.dim[2], t->head = keys.dim[3];
    t->qkv = qkv.dtype, t->o = out(c, 0).dtype, t->half_ = qkv.dtype == kBF16;
    const int64_t pairs = t->streams * t->heads;
    if (is_few)
        return planned(c, t, pairs, PONDER_TILE_ANY, size_t(4 * (t->places + W)));
    return planned(c, t, pairs * tiles(t->tokens, kTile), PONDER_TILE_ANY,
                   attention_workspace(t->head, t->half_));
}

} // namespace ponder::cpu::PONDER_ISA
