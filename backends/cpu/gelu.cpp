// gelu, tanh form (Hendrycks & Gimpel 2016). 1 + tanh(u) = 2 sigmoid(2 u), hence
//     y = x s(x),  s(x) = sigmoid(2 u(x)),  u(x) = sqrt(2 / pi) (x + 0.044715 x^3)
//     dx = dy (s + x s (1 - s) 2 u'(x)),    u'(x) = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
// gelu_derivative, with t = tanh(u) and p = 1 - t^2:
//     t' = p u', t'' = p' u' + p u'', t''' = p'' u' + 2 p' u'' + p u'''
//     gelu' = (1 + t + x t') / 2, gelu'' = t' + x t'' / 2, gelu''' = (3 t'' + x t''') / 2
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

template <int order> PONDER_INLINE vf derivative(vf x) {
    const vf t =
        set(1) - set(2) * sigmoid(x * fma(x * x, set(-2 * kRoot * kCube), set(-2 * kRoot)));
    const vf p = set(1) - t * t, u1 = fma(x * x, set(3 * kRoot * kCube), set(kRoot));
    const vf t1 = p * u1;
    if (order == 1)
        return set(0.5f) * fma(x, t1, set(1) + t);
    const vf u2 = set(6 * kRoot * kCube) * x, p1 = set(-2) * t * t1, t2 = fma(p1, u1, p * u2);
    if (order == 2)
        return fma(set(0.5f) * x, t2, t1);
    const vf p2 = set(-2) * fma(t1, t1, t * t2);
    const vf t3 = fma(p2, u1, fma(set(2) * p1, u2, p * set(6 * kRoot * kCube)));
    return set(0.5f) * fma(x, t3, set(3) * t2);
}

template <int order>
void run_derivative(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Gelu &k = *static_cast<const Gelu *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    const View x = View::of(buffers[0], k.x).at(s.begin * k.width);
    const View y = View::of(buffers[1], k.y).at(s.begin * k.width);
    each_vector((s.end - s.begin) * k.width,
                PONDER_EACH(i, n) { y.put(i, derivative<order>(x.get(i, n)), n); });
}

int32_t plan(const Call &c, void (*run)(const Kernel *, void *const *, void *, uint32_t)) {
    if (!floats(in(c, 0)) || !floats(out(c, 0)))
        return PONDER_PLAN_NONE;
    Gelu *k = new_kernel<Gelu>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->width = last(in(c, 0));
    k->x = in(c, 0).dtype, k->y = out(c, 0).dtype;
    return planned_rows(c, k, k->row_count);
}

} // namespace

int32_t plan_gelu(const Call &c) { return plan(c, forward); }
int32_t plan_gelu_derivative(const Call &c) {
    return plan(c, attr(c, 0) == 1   ? run_derivative<1>
                   : attr(c, 0) == 2 ? run_derivative<2>
                                     : run_derivative<3>);
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
