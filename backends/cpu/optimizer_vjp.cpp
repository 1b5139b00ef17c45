// The vjps of adam and sgd. With c the clip factor, g' = c g, root = sqrt(v' / (1 - beta2^t)):
//   adam: Dm = dm' - rate dw' / ((1 - beta1^t) (root + eps)),  m^ = m' / (1 - beta1^t),
//         Dv = dv' + rate dw' m^ / (root + eps)^2 / (2 root (1 - beta2^t)), nothing at v' = 0
//         dm = beta1 Dm, dv = beta2 Dv, dg' = (1-beta1) Dm + 2 (1-beta2) g' Dv
//   sgd:  dg' = -rate dw'
//   both: dw = keep dw', dstart = (1-keep) dw', dkeep = (w - start) dw', drate = -update dw'
//         dg = c dg' - (dg' . g) c / (gnorm + 1e-6) g / gnorm where it clips, gnorm being |g|
// One task: the product over all elements comes before the first result.
#include "ops.hpp"
#include "optimizer.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kBlock = 4096; // between roundings of the sum to double

PONDER_INLINE View view(void *p) { return View::of(p, kF32); }

// dg' in dg becomes dg.
void through_clip(int64_t n, const Hyper &h, float gnorm, View g, View dg) {
    if (!h.clipped)
        return;
    double along = 0;
    for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
        vf part = set(0);
        each_vector(
            smaller(n - i0, kBlock),
            PONDER_EACH(i, w) { part = fma(dg.get(i0 + i, w), g.get(i0 + i, w), part); });
        along += double(sum(part));
    }
    const vf back =
        set(gnorm > 0 ? float(along * double(h.factor) / (double(h.length) * double(gnorm))) : 0);
    each_vector(
        n, PONDER_EACH(i, w) { dg.put(i, dg.get(i, w) * h.clip - back * g.get(i, w), w); });
}

// The inputs and outputs of the step itself; the last three may be absent.
struct Step {
    vf lr;
    View rate, keep, start, dw, drate, dkeep, dstart;
    __attribute__((always_inline))
    Step(float lr_, void *const *three, void *dw_, void *const *results)
        : lr(set(lr_)), rate(view(three[0])), keep(view(three[1])), start(view(three[2])),
          dw(view(dw_)), drate(view(results[0])), dkeep(view(results[1])),
          dstart(view(results[2])) {}
    __attribute__((always_inline)) vf rate_of(int64_t i, int n) const {
        return rate.data ? rate.get(i, n) : lr;
    }
    __attribute__((always_inline)) void put(int64_t i, vf w, vf update, vf d, int n) const {
        const vf k = keep.data ? keep.get(i, n) : set(1);
        if (drate.data)
            drate.put(i, -update * d, n);
        if (dkeep.data)
            dkeep.put(i, (start.data ? w - start.get(i, n) : w) * d, n);
        if (dstart.data)
            dstart.put(i, (set(1) - k) * d, n);
        dw.put(i, k * d, n);
    }
};

void run_adam(const Kernel *kernel, void *const *buffers, void *, uint32_t) {
    const int64_t n = static_cast<const Optimizer *>(kernel)->n;
    const View w = view(buffers[0]), g = view(buffers[1]), m = view(buffers[2]);
    const View v = view(buffers[3]), dw = view(buffers[9]), dm = view(buffers[10]);
    const View dv = view(buffers[11]), dg = view(buffers[13]);
    const float *raw = static_cast<const float *>(buffers[4]);
    const float gnorm = *static_cast<const float *>(buffers[5]);
    const Hyper h(raw, gnorm);
    const Step step(raw[0], buffers + 6, buffers[12], buffers + 16);
    each_vector(
        n, PONDER_EACH(i, lanes) {
            const vf gi = g.get(i, lanes);
            const Moments next = h.moments(gi, m.get(i, lanes), v.get(i, lanes));
            const vf root = sqrt(next.v * h.bias2), below = set(1) / (root + h.eps);
            const vf d = dw.data ? dw.get(i, lanes) : set(0);
            const vf update = next.m * h.bias1 * below, du = -step.rate_of(i, lanes) * d;
            vf to_m = du * h.bias1 * below;
            vf to_v = where_below(set(0), next.v, -du * update * below * h.bias2 * set(0.5f) / root,
                                  set(0));
            if (dm.data)
                to_m += dm.get(i, lanes);
            if (dv.data)
                to_v += dv.get(i, lanes);
            dg.put(i, fma(h.rest1, to_m, set(2) * h.rest2 * h.clip * gi * to_v), lanes);
            view(buffers[14]).put(i, h.beta1 * to_m, lanes);
            view(buffers[15]).put(i, h.beta2 * to_v, lanes);
            step.put(i, w.get(i, lanes), update, d, lanes);
        });
    through_clip(n, h, gnorm, g, dg);
}

void run_sgd(const Kernel *kernel, void *const *buffers, void *, uint32_t) {
    const int64_t n = static_cast<const Optimizer *>(kernel)->n;
    const View w = view(buffers[0]), g = view(buffers[1]), dw = view(buffers[7]);
    const View dg = view(buffers[9]);
    const float *raw = static_cast<const float *>(buffers[2]);
    const float gnorm = *static_cast<const float *>(buffers[3]);
    const Hyper h(raw, gnorm);
    const Step step(raw[0], buffers + 4, buffers[8], buffers + 10);
    each_vector(
        n, PONDER_EACH(i, lanes) {
            const vf d = dw.get(i, lanes);
            dg.put(i, -step.rate_of(i, lanes) * d, lanes);
            step.put(i, w.get(i, lanes), h.clip * g.get(i, lanes), d, lanes);
        });
    through_clip(n, h, gnorm, g, dg);
}

int32_t plan(const Call &c, void (*run)(const Kernel *, void *const *, void *, uint32_t),
             uint32_t n_in, uint32_t n_out) {
    if (c.op->n_in != n_in || c.op->n_out != n_out)
        return PONDER_PLAN_NONE;
    for (uint32_t i = 0; i < n_in + n_out; ++i)
        if (!f32_or_none(in(c, i)))
            return PONDER_PLAN_NONE;
    Optimizer *k = new_kernel<Optimizer>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->n = count(in(c, 0));
    return planned(c, k, 1, PONDER_TILE_WHOLE);
}

} // namespace

int32_t plan_adam_vjp(const Call &c) { return plan(c, run_adam, 12, 7); }
int32_t plan_sgd_vjp(const Call &c) { return plan(c, run_sgd, 8, 5); }

} // namespace ponder::cpu::PONDER_ISA
