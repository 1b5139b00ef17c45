// mean: y = sum(x) / count.  mean_vjp: dx = dy / count everywhere.  fill: y = value everywhere.
// The sum runs in f64 lanes, one task: the tensors are losses of a chunk.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Mean : Kernel {
    int64_t n;
    double divisor;
    float value;
};

constexpr int64_t kBlock = 16384;

void forward(const Kernel *kernel, void *const *buffers, void *, uint32_t) {
    const Mean &k = *static_cast<const Mean *>(kernel);
    const float *x = static_cast<const float *>(buffers[0]);
    double lane[8] = {}, total = 0;
    for (int64_t i = 0; i < k.n; ++i)
        lane[i % 8] += double(x[i]);
    for (double v : lane)
        total += v;
    *static_cast<float *>(buffers[1]) = float(total / k.divisor);
}

void spread(float *y, int64_t n, float value, uint32_t task) {
    const Span s = span(task, kBlock, n);
    each_vector(
        s.end - s.begin, PONDER_EACH(i, w) {
            if (w == W)
                store(y + s.begin + i, set(value));
            else
                store(y + s.begin + i, set(value), w);
        });
}

void backward(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Mean &k = *static_cast<const Mean *>(kernel);
    const double dy = double(*static_cast<const float *>(buffers[0]));
    spread(static_cast<float *>(buffers[1]), k.n, float(dy / k.divisor), task);
}

void run_fill(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Mean &k = *static_cast<const Mean *>(kernel);
    spread(static_cast<float *>(buffers[0]), k.n, k.value, task);
}

int32_t plan(const Call &c, const ponder_tensor &many, int64_t tasks,
             void (*run)(const Kernel *, void *const *, void *, uint32_t)) {
    for (uint32_t i = 0; i < c.op->n_in + c.op->n_out; ++i)
        if (in(c, i).dtype != kF32)
            return PONDER_PLAN_NONE;
    Mean *k = new_kernel<Mean>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->n = count(many), k->divisor = attr(c, 0), k->value = float(attr(c, 0));
    return planned(c, k, tasks, tasks > 1 ? PONDER_TILE_ANY : PONDER_TILE_WHOLE);
}

} // namespace

int32_t plan_mean(const Call &c) { return plan(c, in(c, 0), 1, forward); }
int32_t plan_mean_vjp(const Call &c) {
    return plan(c, out(c, 0), tiles(count(out(c, 0)), kBlock), backward);
}
int32_t plan_fill(const Call &c) {
    return plan(c, out(c, 0), tiles(count(out(c, 0)), kBlock), run_fill);
}

} // namespace ponder::cpu::PONDER_ISA
