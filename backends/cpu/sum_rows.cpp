// Sums over rows, of columns: the gradients of biases and norms.
//     layer_norm_vjp_weight: dg = sum of dy (x - mean) / std, db = sum of dy
//     sum_to:                y = sum of x over dims that stand together
// A task takes 64 columns through all rows, in their order, 64 rows at a time: the error of a sum
// grows with the number of such blocks only.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kColumns = 64, kVectors = kColumns / W;

struct SumRows : Kernel {
    int64_t row_count, width;
    int32_t dy, x, y;
};

// f(row, column, lanes, sums) adds row `row` of one vector of columns to sums[Sums].
template <int Sums, class F, class Put>
PONDER_INLINE void sum_columns(int64_t row_count, int64_t first, int64_t n, F f, Put put) {
    vf total[kVectors][Sums];
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v)
        for (int s = 0; s < Sums; ++s)
            total[v][s] = set(0);
    for (int64_t r0 = 0; r0 < row_count; r0 += kTile) {
        const int64_t end = smaller(row_count, r0 + kTile);
        vf part[kVectors][Sums];
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v)
            for (int s = 0; s < Sums; ++s)
                part[v][s] = set(0);
        if (n == kColumns)
            for (int64_t r = r0; r < end; ++r)
#pragma GCC unroll 8
                for (int64_t v = 0; v < kVectors; ++v)
                    f(r, first + v * W, W, part[v]);
        else
            for (int64_t r = r0; r < end; ++r)
                for (int64_t v = 0; v * W < n; ++v)
                    f(r, first + v * W, int(smaller(W, n - v * W)), part[v]);
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v)
            for (int s = 0; s < Sums; ++s)
                total[v][s] += part[v][s];
    }
    for (int64_t v = 0; v * W < n; ++v)
        put(first + v * W, int(smaller(W, n - v * W)), total[v]);
}

void norm_weights(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const SumRows &k = *static_cast<const SumRows *>(kernel);
    const Span s = span(task, kColumns, k.width);
    const View dy = View::of(buffers[0], k.dy), x = View::of(buffers[1], k.x);
    const float *stats = static_cast<const float *>(buffers[2]);
    const View dg = View::of(buffers[3], kF32), db = View::of(buffers[4], kF32);
    sum_columns<2>(
        k.row_count, s.begin, s.end - s.begin,
        [&](int64_t r, int64_t c, int n, vf *sums) __attribute__((always_inline)) {
            const vf d = dy.get(r * k.width + c, n);
            const vf h = (x.get(r * k.width + c, n) - set(stats[2 * r])) * set(stats[2 * r + 1]);
            sums[0] = fma(d, h, sums[0]);
            sums[1] += d;
        },
        [&](int64_t c, int n, const vf *sums) {
            dg.put(c, sums[0], n);
            db.put(c, sums[1], n);
        });
}

void column_sums(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const SumRows &k = *static_cast<const SumRows *>(kernel);
    const int64_t across = tiles(k.width, kColumns), block = task / across;
    const Span s = span(uint32_t(task % across), kColumns, k.width);
    const View x = View::of(buffers[0], k.x).at(block * k.row_count * k.width);
    const View y = View::of(buffers[1], k.y).at(block * k.width);
    sum_columns<1>(
        k.row_count, s.begin, s.end - s.begin,
        [&](int64_t r, int64_t c, int n, vf *sums)
            __attribute__((always_inline)) { sums[0] += x.get(r * k.width + c, n); },
        [&](int64_t c, int n, const vf *sums) { y.put(c, sums[0], n); });
}

// The sum of a row, by blocks as above.
PONDER_INLINE float row_sum(View x, int64_t n) {
    vf total = set(0);
    for (int64_t i0 = 0; i0 < n; i0 += kTile * W) {
        vf part = set(0);
        each_vector(
            smaller(n - i0, kTile * W), PONDER_EACH(i, w) {
                const vf v = x.get(i0 + i, w);
                part += w == W ? v : clear(v, w);
            });
        total += part;
    }
    return sum(total);
}

void row_sums(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const SumRows &k = *static_cast<const SumRows *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r)
        View::of(buffers[1], k.y)
            .put_one(r, row_sum(View::of(buffers[0], k.x).at(r * k.width), k.width));
}

SumRows *kernel_of(void (*run)(const Kernel *, void *const *, void *, uint32_t),
                   const ponder_tensor &x, const ponder_tensor &y, int64_t width) {
    SumRows *k = new_kernel<SumRows>(run);
    if (k)
        k->width = width, k->row_count = count(x) / width, k->x = x.dtype, k->y = y.dtype;
    return k;
}

} // namespace

int32_t plan_layer_norm_vjp_weight(const Call &c) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || in(c, 2).dtype != kF32 ||
        out(c, 0).dtype != kF32 || out(c, 1).dtype != kF32)
        return PONDER_PLAN_NONE;
    SumRows *k = kernel_of(norm_weights, in(c, 1), out(c, 0), last(in(c, 0)));
    if (!k)
        return PONDER_PLAN_FAILED;
    k->dy = in(c, 0).dtype;
    return planned(c, k, tiles(k->width, kColumns), PONDER_TILE_ANY);
}

// Neighbouring dims are taken together: [outer, summed, kept] is the widest pattern with a kernel.
int32_t plan_sum_to(const Call &c) {
    const ponder_tensor &x = in(c, 0), &y = out(c, 0);
    if (!floats(x) || !floats(y) || y.rank > x.rank)
        return PONDER_PLAN_NONE;
    int64_t kept = 1, summed = 1, outer = 1; // from the right
    for (int32_t i = 1; i <= x.rank; ++i) {
        const int64_t n = x.dim[x.rank - i], left = i <= y.rank ? y.dim[y.rank - i] : 1;
        if (n == 1)
            continue;
        if (left == n && summed == 1)
            kept *= n;
        else if (left == n)
            outer *= n;
        else if (outer == 1)
            summed *= n;
        else
            return PONDER_PLAN_NONE;
    }
    if (kept == 1) {
        SumRows *k = kernel_of(row_sums, x, y, summed);
        return planned(c, k, tiles(outer, kTile), PONDER_TILE_ANY);
    }
    SumRows *k = kernel_of(column_sums, x, y, kept);
    if (k)
        k->row_count = summed;
    return planned(c, k, outer * tiles(kept, kColumns), PONDER_TILE_ANY);
}

int32_t plan_sum_last(const Call &c) {
    if (!floats(in(c, 0)) || !floats(out(c, 0)))
        return PONDER_PLAN_NONE;
    SumRows *k = kernel_of(row_sums, in(c, 0), out(c, 0), last(in(c, 0)));
    return planned(c, k, tiles(count(out(c, 0)), kTile), PONDER_TILE_ROWS);
}

} // namespace ponder::cpu::PONDER_ISA
