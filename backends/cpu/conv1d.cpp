// conv1d: y_t = b + sum_{j<4} w_j x_{t-3-shift+j}, zeros before the start of the stream.
// A tile reads rows before its own, so the tiles are independent tasks and no link of a row chain.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Conv1d : Kernel {
    int64_t row_count, tokens, width, shift;
    int32_t x, w, b, y;
};

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Conv1d &k = *static_cast<const Conv1d *>(kernel);
    const View w = View::of(buffers[1], k.w), b = View::of(buffers[2], k.b);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const int64_t t = r % k.tokens, oldest = t - 3 - k.shift;
        const View x = View::of(buffers[0], k.x), y = View::of(buffers[3], k.y).at(r * k.width);
        each_vector(
            k.width, PONDER_EACH(i, n) {
                vf v = b.get(i, n);
                for (int64_t j = 0; j < 4; ++j) {
                    if (oldest + j < 0)
                        continue;
                    const int64_t from = (r - 3 - k.shift + j) * k.width;
                    v = fma(w.get(j * k.width + i, n), x.get(from + i, n), v);
                }
                y.put(i, v, n);
            });
    }
}

} // namespace

int32_t plan_conv1d(const Call &c) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || !floats(in(c, 2)) || !floats(out(c, 0)) ||
        in(c, 0).rank != 3 || attr(c, 0) < 0)
        return PONDER_PLAN_NONE;
    Conv1d *k = new_kernel<Conv1d>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->tokens = in(c, 0).dim[1], k->width = last(in(c, 0));
    k->shift = int64_t(attr(c, 0));
    k->x = in(c, 0).dtype, k->w = in(c, 1).dtype, k->b = in(c, 2).dtype, k->y = out(c, 0).dtype;
    return planned(c, k, tiles(k->row_count, kTile), PONDER_TILE_ANY);
}

} // namespace ponder::cpu::PONDER_ISA
