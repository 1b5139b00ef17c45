// conv1d: y_t = b + sum_{j<4} w_j x_{t-3-shift+j}, and before the start of the
// stream the rows of `before`, or zeros.
// A tile reads rows before its own, so the tiles are independent tasks and no link of a row chain.
// conv1d_vjp: dx_t = sum_j w_j dy_{t+3+shift-j}, dw_j = sum_t x_{t-3-shift+j} dy_t, db = sum_t
// dy_t. Its first tasks make tiles of dx, the others 64 columns each of dw and db.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Conv1d : Kernel {
    int64_t row_count, tokens, width, shift;
    int32_t x, w, b, y; // of the vjp: y is dy, b is dx
    int64_t earlier;    // rows of `before`
    int32_t before;
};

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Conv1d &k = *static_cast<const Conv1d *>(kernel);
    const View w = View::of(buffers[1], k.w), b = View::of(buffers[2], k.b);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const int64_t t = r % k.tokens, oldest = t - 3 - k.shift;
        const View x = View::of(buffers[0], k.x);
        const View y = View::of(buffers[k.earlier > 0 ? 4 : 3], k.y).at(r * k.width);
        const View before = View::of(buffers[3], k.before); // if there are earlier rows
        each_vector(
            k.width, PONDER_EACH(i, n) {
                vf v = b.get(i, n);
                for (int64_t j = 0; j < 4; ++j) {
                    const int64_t from = oldest + j;
                    if (from + k.earlier < 0)
                        continue;
                    const vf row =
                        from < 0
                            ? before.get(
                                  (r / k.tokens * k.earlier + from + k.earlier) * k.width + i, n)
                            : x.get((r - 3 - k.shift + j) * k.width + i, n);
                    v = fma(w.get(j * k.width + i, n), row, v);
                }
                y.put(i, v, n);
            });
    }
}

constexpr int64_t kColumns = 64;

void input_gradient(const Conv1d &k, void *const *buffers, Span s) {
    const View dy = View::of(buffers[0], k.y), w = View::of(buffers[2], k.w);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const int64_t left = k.tokens - 1 - r % k.tokens; // tokens after this one
        const View dx = View::of(buffers[3], k.b).at(r * k.width);
        each_vector(
            k.width, PONDER_EACH(i, n) {
                vf v = set(0);
                for (int64_t j = 0; j < 4; ++j) {
                    const int64_t on = 3 + k.shift - j;
                    if (on <= left)
                        v = fma(w.get(j * k.width + i, n), dy.get((r + on) * k.width + i, n), v);
                }
                dx.put(i, v, n);
            });
    }
}

void weight_gradient(const Conv1d &k, void *const *buffers, Span s) {
    const View dy = View::of(buffers[0], k.y), x = View::of(buffers[1], k.x);
    const View dw = View::of(buffers[4], kF32), db = View::of(buffers[5], kF32);
    each_vector(
        s.end - s.begin, PONDER_EACH(i, n) {
            const int64_t c = s.begin + i;
            vf sums[5] = {set(0), set(0), set(0), set(0), set(0)};
            for (int64_t r = 0; r < k.row_count; ++r) {
                const int64_t oldest = r % k.tokens - 3 - k.shift;
                const vf d = dy.get(r * k.width + c, n);
                sums[4] += d;
                for (int64_t j = 0; j < 4; ++j)
                    if (oldest + j >= 0)
                        sums[j] = fma(x.get((r - 3 - k.shift + j) * k.width + c, n), d, sums[j]);
            }
            for (int64_t j = 0; j < 4; ++j)
                dw.put(j * k.width + c, sums[j], n);
            db.put(c, sums[4], n);
        });
}

void run_vjp(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Conv1d &k = *static_cast<const Conv1d *>(kernel);
    const int64_t of_rows = tiles(k.row_count, kTile);
    if (task < of_rows)
        input_gradient(k, buffers, span(task, kTile, k.row_count));
    else
        weight_gradient(k, buffers, span(uint32_t(task - of_rows), kColumns, k.width));
}

} // namespace

int32_t plan_conv1d_vjp(const Call &c) {
    for (uint32_t i = 0; i < 4; ++i)
        if (!floats(in(c, i)))
            return PONDER_PLAN_NONE;
    if (out(c, 1).dtype != kF32 || out(c, 2).dtype != kF32 || in(c, 0).rank != 3 || attr(c, 0) < 0)
        return PONDER_PLAN_NONE;
    Conv1d *k = new_kernel<Conv1d>(run_vjp);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->tokens = in(c, 0).dim[1], k->width = last(in(c, 0));
    k->shift = int64_t(attr(c, 0));
    k->y = in(c, 0).dtype, k->x = in(c, 1).dtype, k->w = in(c, 2).dtype, k->b = out(c, 0).dtype;
    return planned(c, k, tiles(k->row_count, kTile) + tiles(k->width, kColumns), PONDER_TILE_ANY);
}

int32_t plan_conv1d(const Call &c) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || !floats(in(c, 2)) || !floats(out(c, 0)) ||
        in(c, 0).rank != 3 || attr(c, 0) < 0)
        return PONDER_PLAN_NONE;
    const bool before = c.op->n_in > 3 && given(in(c, 3));
    if (c.op->n_in > 3 && (!floats(in(c, 3)) || in(c, 3).dim[1] != 3 + int64_t(attr(c, 0))))
        return PONDER_PLAN_NONE;
    Conv1d *k = new_kernel<Conv1d>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->tokens = in(c, 0).dim[1], k->width = last(in(c, 0));
    k->shift = int64_t(attr(c, 0));
    k->x = in(c, 0).dtype, k->w = in(c, 1).dtype, k->b = in(c, 2).dtype, k->y = out(c, 0).dtype;
    if (before)
        k->earlier = in(c, 3).dim[1], k->before = in(c, 3).dtype;
    return planned(c, k, tiles(k->row_count, kTile), PONDER_TILE_ANY);
}

} // namespace ponder::cpu::PONDER_ISA
