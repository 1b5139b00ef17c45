// gelu, tanh form (Hendrycks & Gimpel 2016). 1 + tanh(u) = 2 sigmoid(2 u), hence
//     y = x s(x),  s(x) = sigmoid(2 u(x)),  u(x) = sqrt(2 / pi) (x + 0.044715 x^3)
//     dx = dy (s + x s (1 - s) 2 u'(x)),    u'(x) = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr float kRoot = 0.7978845608f, kCube = 0.044715f;

struct Gelu : Kernel {
    int64_t row_count, width;
    int32_t dy, x, y;
};

void forward(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Gelu &k = *static_cast<const Gelu *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    const View x = View::of(buffers[0], k.x).at(s.begin * k.width);
    const View y = View::of(buffers[1], k.y).at(s.begin * k.width);
    each_vector((s.end - s.begin) * k.width, PONDER_EACH(i, n) {
        const vf v = x.get(i, n);
        const vf u2 = v * fma(v * v, set(2 * kRoot * kCube), set(2 * kRoot));
        y.put(i, v / (set(1) + exp(-u2)), n);
    });
}

void backward(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Gelu &k = *static_cast<const Gelu *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    const View dy = View::of(buffers[0], k.dy).at(s.begin * k.width);
    const View x = View::of(buffers[1], k.x).at(s.begin * k.width);
    const View dx = View::of(buffers[2], k.y).at(s.begin * k.width);
    each_vector((s.end - s.begin) * k.width, PONDER_EACH(i, n) {
        const vf v = x.get(i, n);
        const vf u2 = v * fma(v * v, set(2 * kRoot * kCube), set(2 * kRoot));
        const vf slope = fma(v * v, set(6 * kRoot * kCube), set(2 * kRoot));
        const vf g = sigmoid(u2);
        dx.put(i, dy.get(i, n) * fma(v * g * (set(1) - g), slope, g), n);
    });
}

} // namespace

int32_t plan_gelu(const Call &c) {
    if (!floats(in(c, 0)) || !floats(out(c, 0)))
        return PONDER_PLAN_NONE;
    Gelu *k = new_kernel<Gelu>(forward);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->width = last(in(c, 0));
    k->x = in(c, 0).dtype, k->y = out(c, 0).dtype;
    return planned_rows(c, k, k->row_count);
}

int32_t plan_gelu_vjp(const Call &c) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || !floats(out(c, 0)))
        return PONDER_PLAN_NONE;
    Gelu *k = new_kernel<Gelu>(backward);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->width = last(in(c, 0));
    k->dy = in(c, 0).dtype, k->x = in(c, 1).dtype, k->y = out(c, 0).dtype;
    return planned_rows(c, k, k->row_count);
}

} // namespace ponder::cpu::PONDER_ISA
