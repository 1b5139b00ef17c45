// What ttt_linear and its vjp share: the norm of a head's row and the gradient of the
// reconstruction error.
#pragma once

#include "kernel.hpp"

namespace ponder::cpu::PONDER_ISA {

PONDER_INLINE View plain(const float *p) { return View::of(const_cast<float *>(p), kF32); }

struct Norm {
    float mean, scale;
};

PONDER_INLINE Norm norm_of(const float *z, int64_t d, float eps) {
    vf total = set(0), squares = set(0);
    each_vector(
        d, PONDER_EACH(i, n) { total += plain(z).get(i, n); });
    const vf mean = set(sum(total) / float(d));
    each_vector(
        d, PONDER_EACH(i, n) {
            vf x = plain(z).get(i, n) - mean;
            if (n != W)
                x = clear(x, n);
            squares = fma(x, x, squares);
        });
    return {sum(total) / float(d), 1 / __builtin_sqrtf(sum(squares) / float(d) + eps)};
}

// mean over d of (LN(z) - target)^2
PONDER_INLINE double error(const float *z, const float *target, View g, View b, int64_t d,
                           float eps) {
    const Norm s = norm_of(z, d, eps);
    vf squares = set(0);
    each_vector(
        d, PONDER_EACH(i, n) {
            const vf h = (plain(z).get(i, n) - set(s.mean)) * set(s.scale);
            vf r = fma(h, g.get(i, n), b.get(i, n)) - plain(target).get(i, n);
            if (n != W)
                r = clear(r, n);
            squares = fma(r, r, squares);
        });
    return double(sum(squares)) / double(d);
}

// u = g (LN(z) - target), gz = (u - mean(u) - h mean(u h)) / std for a row; returns |gz|^2.
PONDER_INLINE float loss_gradient(const float *z, const float *target, float *gz, View g, View b,
                                  int64_t d, float eps) {
    const Norm s = norm_of(z, d, eps);
    const vf mean = set(s.mean), scale = set(s.scale);
    vf su = set(0), suh = set(0), squares = set(0);
    each_vector(
        d, PONDER_EACH(i, n) {
            const vf h = (plain(z).get(i, n) - mean) * scale, gi = g.get(i, n);
            vf u = gi * (fma(h, gi, b.get(i, n)) - plain(target).get(i, n));
            if (n != W)
                u = clear(u, n);
            plain(gz).put(i, u, n);
            su += u;
            suh = fma(u, h, suh);
        });
    const vf mu = set(sum(su) / float(d)), muh = set(sum(suh) / float(d));
    each_vector(
        d, PONDER_EACH(i, n) {
            const vf h = (plain(z).get(i, n) - mean) * scale;
            vf x = (plain(gz).get(i, n) - mu - h * muh) * scale;
            if (n != W)
                x = clear(x, n);
            plain(gz).put(i, x, n);
            squares = fma(x, x, squares);
        });
    return sum(squares);
}

} // namespace ponder::cpu::PONDER_ISA
