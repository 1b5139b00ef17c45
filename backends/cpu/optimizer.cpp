// With g' = g min(1, clip / (gnorm + 1e-6)) where clip > 0, else g' = g:
// adam (Kingma & Ba 2015):  m' = beta1 m + (1 - beta1) g',  v' = beta2 v + (1 - beta2) g'^2,
//                           w' = w - lr (m' / (1 - beta1^t)) / (sqrt(v' / (1 - beta2^t)) + eps)
// sgd:                      w' = w - lr g'
// Outputs may be the inputs. Blocks are independent tasks.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kBlock = 16384;

struct Optimizer : Kernel {
    int64_t n;
};

PONDER_INLINE float clipping(const float *h, const float *gnorm) {
    if (!(h[6] > 0))
        return 1;
    const float f = h[6] / (*gnorm + 1e-6f);
    return f < 1 ? f : 1;
}

void run_adam(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Optimizer &k = *static_cast<const Optimizer *>(kernel);
    const Span s = span(task, kBlock, k.n);
    const float *h = static_cast<const float *>(buffers[4]);
    const vf clip = set(clipping(h, static_cast<const float *>(buffers[5])));
    const vf beta1 = set(h[1]), beta2 = set(h[2]), rest1 = set(1 - h[1]), rest2 = set(1 - h[2]);
    const vf rate = set(h[0] / h[4]), eps = set(h[3]), unbias2 = set(1 / h[5]);
    const View w = View::of(buffers[0], kF32).at(s.begin),
               g = View::of(buffers[1], kF32).at(s.begin);
    const View m = View::of(buffers[2], kF32).at(s.begin),
               v = View::of(buffers[3], kF32).at(s.begin);
    const View w1 = View::of(buffers[6], kF32).at(s.begin);
    const View m1 = View::of(buffers[7], kF32).at(s.begin);
    const View v1 = View::of(buffers[8], kF32).at(s.begin);
    each_vector(
        s.end - s.begin, PONDER_EACH(i, n) {
            const vf gi = g.get(i, n) * clip;
            const vf mi = fma(beta1, m.get(i, n), rest1 * gi);
            const vf vi_ = fma(beta2, v.get(i, n), rest2 * gi * gi);
            m1.put(i, mi, n);
            v1.put(i, vi_, n);
            w1.put(i, w.get(i, n) - rate * mi / (sqrt(vi_ * unbias2) + eps), n);
        });
}

void run_sgd(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Optimizer &k = *static_cast<const Optimizer *>(kernel);
    const Span s = span(task, kBlock, k.n);
    const float *h = static_cast<const float *>(buffers[2]);
    const vf rate = set(h[0] * clipping(h, static_cast<const float *>(buffers[3])));
    const View w = View::of(buffers[0], kF32).at(s.begin),
               g = View::of(buffers[1], kF32).at(s.begin);
    const View w1 = View::of(buffers[4], kF32).at(s.begin);
    each_vector(
        s.end - s.begin, PONDER_EACH(i, n) { w1.put(i, w.get(i, n) - rate * g.get(i, n), n); });
}

int32_t plan(const Call &c, void (*run)(const Kernel *, void *const *, void *, uint32_t)) {
    for (uint32_t i = 0; i < c.op->n_in + c.op->n_out; ++i)
        if (in(c, i).dtype != kF32)
            return PONDER_PLAN_NONE;
    Optimizer *k = new_kernel<Optimizer>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->n = count(in(c, 0));
    return planned(c, k, tiles(k->n, kBlock), PONDER_TILE_ANY);
}

} // namespace

int32_t plan_adam(const Call &c) { return plan(c, run_adam); }
int32_t plan_sgd(const Call &c) { return plan(c, run_sgd); }

} // namespace ponder::cpu::PONDER_ISA
