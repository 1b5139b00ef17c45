// softmax: y_j = e^(x_j - top) / sum of those, over the last dim; causal: row i of the last two
//     dims sees columns j <= i, the others are 0.
// log_sum_exp: y = top + log sum e^(x_j - top).
#include "ops.hpp"

#include <math.h>

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Softmax : Kernel {
    int64_t row_count, width, block; // rows of the last two dims
    bool causal;
    int32_t x, y;
};

PONDER_INLINE float top_of(View x, int64_t n) {
    vf tops = set(-3.4e38f);
    each_vector(
        n, PONDER_EACH(i, w) {
            const vf v = x.get(i, w);
            tops = max(tops, w == W ? v : where_below(lane_index(), set(float(w)), v, tops));
        });
    return largest(tops);
}

void softmax(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Softmax &k = *static_cast<const Softmax *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    float kept[kTile * W]; // of e where y cannot hold it exactly
    for (int64_t r = s.begin; r < s.end; ++r) {
        const View x = View::of(buffers[0], k.x).at(r * k.width);
        const View y = View::of(buffers[1], k.y).at(r * k.width);
        const int64_t seen = k.causal ? smaller(k.width, r % k.block + 1) : k.width;
        const View e = y.narrow && seen <= kTile * W ? View::of(kept, kF32) : y;
        const vf top = set(top_of(x, seen));
        vf z = set(0);
        each_vector(
            seen, PONDER_EACH(i, n) {
                vf v = exp(x.get(i, n) - top);
                if (n != W)
                    v = clear(v, n);
                e.put(i, v, n);
                z += v;
            });
        const vf f = set(1 / sum(z));
        each_vector(
            seen, PONDER_EACH(i, n) { y.put(i, e.get(i, n) * f, n); });
        const View rest = y.at(seen);
        each_vector(
            k.width - seen, PONDER_EACH(i, n) { rest.put(i, set(0), n); });
    }
}

void log_sum_exp(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Softmax &k = *static_cast<const Softmax *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const View x = View::of(buffers[0], k.x).at(r * k.width);
        const float top = top_of(x, k.width);
        vf z = set(0);
        each_vector(
            k.width, PONDER_EACH(i, n) {
                const vf v = exp(x.get(i, n) - set(top));
                z += n == W ? v : clear(v, n);
            });
        View::of(buffers[1], k.y).put_one(r, top + ::logf(sum(z)));
    }
}

int32_t plan(const Call &c, void (*run)(const Kernel *, void *const *, void *, uint32_t)) {
    const ponder_tensor &x = in(c, 0);
    if (!floats(x) || !floats(out(c, 0)) || x.rank < 1)
        return PONDER_PLAN_NONE;
    Softmax *k = new_kernel<Softmax>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(x), k->width = last(x), k->block = x.rank > 1 ? x.dim[x.rank - 2] : 1;
    k->causal = run == softmax && attr(c, 0) != 0;
    k->x = x.dtype, k->y = out(c, 0).dtype;
    return planned_rows(c, k, k->row_count);
}

} // namespace

int32_t plan_softmax(const Call &c) { return plan(c, softmax); }
int32_t plan_log_sum_exp(const Call &c) { return plan(c, log_sum_exp); }

} // namespace ponder::cpu::PONDER_ISA
