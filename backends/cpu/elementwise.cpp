// sigmoid: y = 1 / (1 + e^-x)   affine: y = factor x + offset   power: y = x^exponent   exp: y =
// e^x relu: y = max(x, 0)           step: y = 1 where x > 0, else 0
#include "ops.hpp"

#include <math.h>

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Elementwise : Kernel {
    int64_t row_count, width;
    float first, second; // attributes
    int32_t x, y;
};

using Run = void (*)(const Kernel *, void *const *, void *, uint32_t);

template <class F>
PONDER_INLINE void each(const Elementwise &k, void *const *buffers, uint32_t task, F f) {
    const Span s = span(task, kTile, k.row_count);
    const View x = View::of(buffers[0], k.x).at(s.begin * k.width);
    const View y = View::of(buffers[1], k.y).at(s.begin * k.width);
    each_vector((s.end - s.begin) * k.width, PONDER_EACH(i, n) { y.put(i, f(x.get(i, n)), n); });
}

#define PONDER_OF(x) [&](vf x) __attribute__((always_inline))

void run_sigmoid(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    each(
        *static_cast<const Elementwise *>(kernel), buffers, task,
        PONDER_OF(x) { return sigmoid(x); });
}

void run_affine(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Elementwise &k = *static_cast<const Elementwise *>(kernel);
    const vf factor = set(k.first), offset = set(k.second);
    each(
        k, buffers, task, PONDER_OF(x) { return fma(x, factor, offset); });
}

// exp of simd.hpp ends at e^88: what lies above is infinite here as in the reference.
void run_exp(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    each(
        *static_cast<const Elementwise *>(kernel), buffers, task,
        PONDER_OF(x) { return where_below(set(88.37f), x, set(__builtin_inff()), exp(x)); });
}

void run_relu(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    each(
        *static_cast<const Elementwise *>(kernel), buffers, task,
        PONDER_OF(x) { return max(x, set(0)); });
}

void run_step(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    each(
        *static_cast<const Elementwise *>(kernel), buffers, task,
        PONDER_OF(x) { return where_below(set(0), x, set(1), set(0)); });
}

// Halves up to 4 by products and one root; 0 to a negative power is 0.
void run_half_power(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Elementwise &k = *static_cast<const Elementwise *>(kernel);
    const float size = k.first < 0 ? -k.first : k.first;
    const int whole = int(size);
    const bool root = size != float(whole), inverse = k.first < 0;
    each(
        k, buffers, task, PONDER_OF(x) {
            vf y = root ? sqrt(x) : set(1);
            for (int i = 0; i < whole; ++i)
                y = y * x;
            return inverse ? where_below(set(0), max(x, -x), set(1) / y, root ? y : set(0)) : y;
        });
}

void run_power(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Elementwise &k = *static_cast<const Elementwise *>(kernel);
    each(
        k, buffers, task, PONDER_OF(x) {
            float lane[W];
            store(lane, x);
            for (float &v : lane)
                v = v == 0 && k.first < 0 ? 0 : ::powf(v, k.first);
            return load(lane);
        });
}

int32_t plan(const Call &c, Run run) {
    if (!floats(in(c, 0)) || !floats(out(c, 0)))
        return PONDER_PLAN_NONE;
    Elementwise *k = new_kernel<Elementwise>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->width = last(in(c, 0));
    k->first = float(attr(c, 0)), k->second = float(attr(c, 1));
    k->x = in(c, 0).dtype, k->y = out(c, 0).dtype;
    return planned_rows(c, k, k->row_count);
}

} // namespace

int32_t plan_sigmoid(const Call &c) { return plan(c, run_sigmoid); }
int32_t plan_affine(const Call &c) { return plan(c, run_affine); }
int32_t plan_exp(const Call &c) { return plan(c, run_exp); }
int32_t plan_relu(const Call &c) { return plan(c, run_relu); }
int32_t plan_step(const Call &c) { return plan(c, run_step); }
int32_t plan_power(const Call &c) {
    const double twice = 2 * attr(c, 0);
    return plan(c, twice == ::floor(twice) && ::fabs(twice) <= 8 ? run_half_power : run_power);
}

} // namespace ponder::cpu::PONDER_ISA
