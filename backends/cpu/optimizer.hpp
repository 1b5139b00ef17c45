// What the optimizers and their vjps share: hyperparameters and moments, as vectors.
#pragma once

#include "kernel.hpp"

namespace ponder::cpu::PONDER_ISA {

constexpr int64_t kOptimizerBlock = 16384; // elements of a task

struct Optimizer : Kernel {
    int64_t n;
    uint32_t n_in;
    bool three; // rate, keep and start are among the inputs
};

struct Moments {
    vf m, v;
};

// h = lr, beta1, beta2, eps, 1-beta1^t, 1-beta2^t, clip, decay
struct Hyper {
    vf clip, beta1, beta2, rest1, rest2, eps, bias1, bias2; // bias: 1 / (1 - beta^t)
    bool clipped;
    float factor, length; // of the clip; gnorm + 1e-6

    __attribute__((always_inline)) Hyper(const float *h, float gnorm) {
        length = gnorm + 1e-6f;
        clipped = h[6] > 0 && h[6] < length;
        factor = clipped ? h[6] / length : 1;
        clip = set(factor);
        beta1 = set(h[1]), beta2 = set(h[2]), rest1 = set(1 - h[1]), rest2 = set(1 - h[2]);
        eps = set(h[3]), bias1 = set(1 / h[4]), bias2 = set(1 / h[5]);
    }
    __attribute__((always_inline)) Moments moments(vf g, vf m, vf v) const {
        const vf gi = g * clip;
        return {fma(beta1, m, rest1 * gi), fma(beta2, v, rest2 * gi * gi)};
    }
    __attribute__((always_inline)) vf update(const Moments &next) const {
        return next.m * bias1 / (sqrt(next.v * bias2) + eps);
    }
};

} // namespace ponder::cpu::PONDER_ISA
