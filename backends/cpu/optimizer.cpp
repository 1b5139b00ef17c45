// With g' = g min(1, clip / (gnorm + 1e-6)) where clip > 0, else g' = g:
// adam (Kingma & Ba 2015):  m' = beta1 m + (1 - beta1) g',  v' = beta2 v + (1 - beta2) g'^2,
//                           update = (m' / (1 - beta1^t)) / (sqrt(v' / (1 - beta2^t)) + eps)
// sgd:                      update = g'
//     w' = start + keep (w - start) - rate update;  without them lr for the rate, keep 1, start 0
// adamw (Loshchilov & Hutter 2019):  w' = w - lr (update + decay w)
// Outputs may be the inputs. Blocks are independent tasks.
#include "optimizer.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

enum class Rule { adam, adamw, sgd };

template <Rule rule> void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Optimizer &k = *static_cast<const Optimizer *>(kernel);
    const Span s = span(task, kOptimizerBlock, k.n);
    const auto at = [&](uint32_t i) {
        return View{buffers[i] ? static_cast<char *>(buffers[i]) + 4 * s.begin : nullptr, false};
    };
    constexpr uint32_t states = rule == Rule::sgd ? 2 : 4;
    const float *raw = static_cast<const float *>(buffers[states]);
    const Hyper h(raw, *static_cast<const float *>(buffers[states + 1]));
    const bool three = rule != Rule::adamw && k.three;
    const View none = {nullptr, false}, rate = three ? at(states + 2) : none;
    const View keep = three ? at(states + 3) : none, start = three ? at(states + 4) : none;
    const View w = at(0), g = at(1), m = at(2), v = at(3);
    constexpr bool moments = rule != Rule::sgd;
    const View w1 = at(k.n_in), m1 = moments ? at(k.n_in + 1) : none,
               v1 = moments ? at(k.n_in + 2) : none;
    const vf lr = set(raw[0]), left = set(1 - raw[0] * raw[7]);
    each_vector(
        s.end - s.begin, PONDER_EACH(i, n) {
            vf wi = w.get(i, n), step;
            if constexpr (rule == Rule::sgd) {
                step = g.get(i, n) * h.clip;
            } else {
                const Moments next = h.moments(g.get(i, n), m.get(i, n), v.get(i, n));
                m1.put(i, next.m, n);
                v1.put(i, next.v, n);
                step = h.update(next);
            }
            if (rule == Rule::adamw)
                wi = wi * left;
            else if (keep.data && start.data)
                wi = fma(keep.get(i, n), wi - start.get(i, n), start.get(i, n));
            else if (keep.data)
                wi = keep.get(i, n) * wi;
            w1.put(i, wi - (rate.data ? rate.get(i, n) : lr) * step, n);
        });
}

int32_t plan(const Call &c, void (*run)(const Kernel *, void *const *, void *, uint32_t),
             uint32_t required) {
    if (c.op->n_in != required && c.op->n_in != required + 3)
        return PONDER_PLAN_NONE;
    for (uint32_t i = 0; i < c.op->n_in + c.op->n_out; ++i)
        if (in(c, i).dtype != kF32 && (given(in(c, i)) || i < required || i >= c.op->n_in))
            return PONDER_PLAN_NONE;
    Optimizer *k = new_kernel<Optimizer>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->n = count(in(c, 0)), k->n_in = c.op->n_in, k->three = c.op->n_in > required;
    return planned(c, k, tiles(k->n, kOptimizerBlock), PONDER_TILE_ANY);
}

} // namespace

int32_t plan_adam(const Call &c) { return plan(c, run<Rule::adam>, 6); }
int32_t plan_adamw(const Call &c) { return plan(c, run<Rule::adamw>, 6); }
int32_t plan_sgd(const Call &c) { return plan(c, run<Rule::sgd>, 4); }

} // namespace ponder::cpu::PONDER_ISA
