// What the optimizers and their vjps share: hyperparameters, moments, and the step of one element.
#pragma once

#include "backend/reference/kernel.hpp"

namespace ponder::reference {

template <class T> struct Moments { T m, v; };

// h = lr, beta1, beta2, eps, 1-beta1^t, 1-beta2^t, clip, decay
template <class T> struct Hyper {
    T lr, beta1, beta2, eps, unbias1, unbias2, clip, gnorm, factor;
    bool clipped;
    Hyper(const T *h, T gradient_norm)
        : lr(h[0]), beta1(h[1]), beta2(h[2]), eps(h[3]), unbias1(h[4]), unbias2(h[5]), clip(h[6]),
          gnorm(gradient_norm) {
        clipped = clip > 0 && clip < gnorm + T(1e-6);
        factor = clipped ? clip / (gnorm + T(1e-6)) : T(1);
    }
    Moments<T> moments(T g, T m, T v) const {
        const T gradient = factor * g;
        return {beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient * gradient};
    }
    T update(const Moments<T> &next) const {
        return (next.m / unbias1) / (std::sqrt(next.v / unbias2) + eps);
    }
};

// w' = start + keep (w - start) - rate update, each of the three for every element or absent
template <class T> struct Step {
    T lr;
    const T *rate, *keep, *start;
    T rate_of(int64_t i) const { return rate ? rate[i] : lr; }
    T keep_of(int64_t i) const { return keep ? keep[i] : T(1); }
    T start_of(int64_t i) const { return start ? start[i] : T(0); }
    T kept(int64_t i, T w) const { return keep ? start_of(i) + keep[i] * (w - start_of(i)) : w; }
};

} // namespace ponder::reference
