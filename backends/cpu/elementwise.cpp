// add: y = a + b.  mul: y = a b.  sigmoid: y = 1 / (1 + e^-x).
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Elementwise : Kernel {
    int64_t row_count, width;
    int32_t type[3];
};

template <class F>
PONDER_INLINE void binary(const Kernel *kernel, void *const *buffers, uint32_t task, F f) {
    const Elementwise &k = *static_cast<const Elementwise *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    const View a = View::of(buffers[0], k.type[0]).at(s.begin * k.width);
    const View b = View::of(buffers[1], k.type[1]).at(s.begin * k.width);
    const View y = View::of(buffers[2], k.type[2]).at(s.begin * k.width);
    each_vector((s.end - s.begin) * k.width,
                PONDER_EACH(i, n) { y.put(i, f(a.get(i, n), b.get(i, n)), n); });
}

void run_add(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    binary(
        kernel, buffers, task, [](vf a, vf b) __attribute__((always_inline)) { return a + b; });
}

void run_mul(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    binary(
        kernel, buffers, task, [](vf a, vf b) __attribute__((always_inline)) { return a * b; });
}

void run_sigmoid(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Elementwise &k = *static_cast<const Elementwise *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    const View x = View::of(buffers[0], k.type[0]).at(s.begin * k.width);
    const View y = View::of(buffers[1], k.type[1]).at(s.begin * k.width);
    each_vector((s.end - s.begin) * k.width,
                PONDER_EACH(i, n) { y.put(i, sigmoid(x.get(i, n)), n); });
}

int32_t plan(const Call &c, uint32_t inputs,
             void (*run)(const Kernel *, void *const *, void *, uint32_t)) {
    for (uint32_t i = 0; i <= inputs; ++i)
        if (!floats(in(c, i)) || count(in(c, i)) != count(in(c, 0)))
            return PONDER_PLAN_NONE;
    Elementwise *k = new_kernel<Elementwise>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->width = last(in(c, 0));
    for (uint32_t i = 0; i <= inputs; ++i)
        k->type[i] = in(c, i).dtype; // the output comes last
    return planned_rows(c, k, k->row_count);
}

} // namespace

int32_t plan_add(const Call &c) { return plan(c, 2, run_add); }
int32_t plan_mul(const Call &c) { return plan(c, 2, run_mul); }
int32_t plan_sigmoid(const Call &c) { return plan(c, 1, run_sigmoid); }

} // namespace ponder::cpu::PONDER_ISA
