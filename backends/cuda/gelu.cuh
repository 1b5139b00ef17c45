// The tanh form of gelu: Hendrycks & Gimpel 2016.
#pragma once

#include "kernel.hpp"

namespace ponder::cuda {

constexpr float gelu_scale = 0.79788456080286535588f, gelu_cube = 0.044715f;

// tanh to 1e-7, from one exponential: the tanh of the library branches.
__device__ inline float tanh_of(float u) {
    const float e = __expf(-2 * fabsf(u));
    return copysignf(__fdividef(1 - e, 1 + e), u);
}

__device__ inline float gelu_of(float x) {
    return 0.5f * x * (1 + tanh_of(gelu_scale * (x + gelu_cube * x * x * x)));
}

__device__ inline float gelu_slope(float x) {
    const float t = tanh_of(gelu_scale * (x + gelu_cube * x * x * x));
    const float du = gelu_scale * (1 + 3 * gelu_cube * x * x);
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * du;
}

} // namespace ponder::cuda
