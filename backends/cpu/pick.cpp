// pick: y_t = x_t[target_t], 0 without target.  pick_vjp: dx_t[target_t] = dy_t, zeros elsewhere.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Pick : Kernel {
    int64_t row_count, width;
    int32_t x, y;
};

void forward(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Pick &k = *static_cast<const Pick *>(kernel);
    const View x = View::of(buffers[0], k.x), y = View::of(buffers[2], k.y);
    const int32_t *target = static_cast<const int32_t *>(buffers[1]);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const bool inside = target[r] >= 0 && target[r] < k.width;
        y.put_one(r, inside ? x.one(r * k.width + target[r]) : 0);
    }
}

void backward(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Pick &k = *static_cast<const Pick *>(kernel);
    const View dy = View::of(buffers[0], k.y), dx = View::of(buffers[2], k.x);
    const int32_t *target = static_cast<const int32_t *>(buffers[1]);
    const Span s = span(task, kTile, k.row_count);
    memset(dx.at(s.begin * k.width).data, 0,
           size_t((s.end - s.begin) * k.width) * (dx.narrow ? 2 : 4));
    for (int64_t r = s.begin; r < s.end; ++r)
        if (target[r] >= 0 && target[r] < k.width)
            dx.put_one(r * k.width + target[r], dy.one(r));
}

int32_t plan(const Call &c, const ponder_tensor &x, const ponder_tensor &y,
             void (*run)(const Kernel *, void *const *, void *, uint32_t)) {
    if (!floats(x) || !floats(y) || in(c, 1).dtype != kI32)
        return PONDER_PLAN_NONE;
    Pick *k = new_kernel<Pick>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(x), k->width = last(x), k->x = x.dtype, k->y = y.dtype;
    return planned_rows(c, k, k->row_count);
}

} // namespace

int32_t plan_pick(const Call &c) { return plan(c, in(c, 0), out(c, 0), forward); }
int32_t plan_pick_vjp(const Call &c) { return plan(c, out(c, 0), in(c, 0), backward); }

} // namespace ponder::cpu::PONDER_ISA
