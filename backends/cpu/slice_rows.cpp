// slice_rows:      y[.., i, :] = x[.., first + i, :], i < n.
// slice_rows_vjp:  dx[.., first + i, :] = dy[.., i, :], zeros elsewhere.
// Input and output rows differ, so the tiles are independent tasks and no link of a row chain.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Slice : Kernel {
    int64_t row_count, width;            // of the output
    int64_t in_tokens, out_tokens, move; // output row t is input row t + move
    int32_t x, y;
};

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Slice &k = *static_cast<const Slice *>(kernel);
    const View x = View::of(buffers[0], k.x), y = View::of(buffers[1], k.y);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const int64_t t = r % k.out_tokens + k.move;
        const bool inside = t >= 0 && t < k.in_tokens;
        const View from = x.at(inside ? (r / k.out_tokens * k.in_tokens + t) * k.width : 0);
        const View to = y.at(r * k.width);
        each_vector(
            k.width, PONDER_EACH(i, n) { to.put(i, inside ? from.get(i, n) : set(0), n); });
    }
}

int32_t plan(const Call &c, int64_t move) {
    if (!floats(in(c, 0)) || !floats(out(c, 0)) || in(c, 0).rank < 2 ||
        out(c, 0).rank != in(c, 0).rank)
        return PONDER_PLAN_NONE;
    Slice *k = new_kernel<Slice>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(out(c, 0)), k->width = last(out(c, 0)), k->move = move;
    k->in_tokens = in(c, 0).dim[in(c, 0).rank - 2];
    k->out_tokens = out(c, 0).dim[out(c, 0).rank - 2];
    k->x = in(c, 0).dtype, k->y = out(c, 0).dtype;
    return planned(c, k, tiles(k->row_count, kTile), PONDER_TILE_ANY);
}

} // namespace

int32_t plan_slice_rows(const Call &c) { return plan(c, int64_t(attr(c, 0))); }
int32_t plan_slice_rows_vjp(const Call &c) { return plan(c, -int64_t(attr(c, 0))); }

} // namespace ponder::cpu::PONDER_ISA
