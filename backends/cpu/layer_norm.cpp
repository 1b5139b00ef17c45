// layer_norm:      y = (x - mean) / std * g + b over a row; stats = (mean, 1 / std).
// layer_norm_vjp:  with n = (x - mean) / std and u = dy g,
//                  dx = carry + (u - mean(u) - n mean(u n)) / std
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct LayerNorm : Kernel {
    int64_t row_count, width;
    float eps;
    int32_t x, g, b, dy, y;
    bool carry;
};

void forward(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const LayerNorm &k = *static_cast<const LayerNorm *>(kernel);
    const int64_t c = k.width;
    const View g = View::of(buffers[1], k.g), b = View::of(buffers[2], k.b);
    float *stats = static_cast<float *>(buffers[4]);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const View x = View::of(buffers[0], k.x).at(r * c), y = View::of(buffers[3], k.y).at(r * c);
        vf total = set(0);
        each_vector(
            c, PONDER_EACH(i, n) { total += x.get(i, n); });
        const float mean = sum(total) / float(c);
        const vf m = set(mean);
        vf squares = set(0);
        each_vector(
            c, PONDER_EACH(i, n) {
                const vf d = n == W ? x.get(i, n) - m : clear(x.get(i, n) - m, n);
                squares = fma(d, d, squares);
            });
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(c) + k.eps);
        const vf rs = set(scale);
        each_vector(
            c, PONDER_EACH(i, n) {
                y.put(i, fma((x.get(i, n) - m) * rs, g.get(i, n), b.get(i, n)), n);
            });
        stats[2 * r] = mean;
        stats[2 * r + 1] = scale;
    }
}

void backward(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const LayerNorm &k = *static_cast<const LayerNorm *>(kernel);
    const int64_t c = k.width;
    const View g = View::of(buffers[2], k.g);
    const float *stats = static_cast<const float *>(buffers[3]);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const View dy = View::of(buffers[0], k.dy).at(r * c);
        const View x = View::of(buffers[1], k.x).at(r * c);
        const float *carry = k.carry ? static_cast<const float *>(buffers[4]) + r * c : nullptr;
        float *dx = static_cast<float *>(buffers[5]) + r * c;
        const vf m = set(stats[2 * r]), rs = set(stats[2 * r + 1]);
        vf su = set(0), sun = set(0);
        each_vector(
            c, PONDER_EACH(i, n) {
                const vf u = dy.get(i, n) * g.get(i, n);
                su += u;
                sun = fma(u, (x.get(i, n) - m) * rs, sun);
            });
        const vf mu = set(sum(su) / float(c)), mun = set(sum(sun) / float(c));
        each_vector(
            c, PONDER_EACH(i, n) {
                const vf u = dy.get(i, n) * g.get(i, n), z = (x.get(i, n) - m) * rs;
                vf d = (u - mu - z * mun) * rs;
                if (carry)
                    d += n == W ? load(carry + i) : load(carry + i, n);
                if (n == W)
                    store(dx + i, d);
                else
                    store(dx + i, d, n);
            });
    }
}

} // namespace

int32_t plan_layer_norm(const Call &c) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || !floats(in(c, 2)) || !floats(out(c, 0)) ||
        out(c, 1).dtype != kF32)
        return PONDER_PLAN_NONE;
    LayerNorm *k = new_kernel<LayerNorm>(forward);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0));
    k->width = last(in(c, 0));
    k->eps = float(attr(c, 0));
    k->x = in(c, 0).dtype, k->g = in(c, 1).dtype, k->b = in(c, 2).dtype, k->y = out(c, 0).dtype;
    return planned_rows(c, k, k->row_count);
}

int32_t plan_layer_norm_vjp(const Call &c) {
    if (!floats(in(c, 0)) || !floats(in(c, 1)) || !floats(in(c, 2)) || in(c, 3).dtype != kF32 ||
        !f32_or_none(in(c, 4)) || out(c, 0).dtype != kF32)
        return PONDER_PLAN_NONE;
    LayerNorm *k = new_kernel<LayerNorm>(backward);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0));
    k->width = last(in(c, 0));
    k->dy = in(c, 0).dtype, k->x = in(c, 1).dtype, k->g = in(c, 2).dtype;
    k->carry = given(in(c, 4));
    return planned_rows(c, k, k->row_count);
}

} // namespace ponder::cpu::PONDER_ISA
