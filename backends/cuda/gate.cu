// gate, commit: whether a chunk is learned from, and whether what was learned is kept. As
// src/backend/reference/gate.cpp, but for the order of the sums over tokens.
#include "launch.cuh"
#include "ops.hpp"

#include "ponder/gate_rule.h"

#include <algorithm>

namespace ponder::cuda {

namespace {

constexpr int gate_threads = 256, commit_threads = 256;

struct GateArgs {
    const float *nll, *entropy, *reconstruction;
    const ponder_gate *from;
    ponder_gate *to;
    int32_t *flags;
    float *h;
    int predictions, told, steps; // steps: rows of h, flags but one
    double share;                 // 1 / predictions
    double lr, beta1, beta2, epsilon, clip;
};

__device__ double unknown() { return nan(""); }

// One block. The code is kept small: it has left the caches when the next chunk comes, and fetching
// it takes most of the time.
__global__ void __launch_bounds__(gate_threads) gate_kernel(const GateArgs p) {
    constexpr int words = int(sizeof(ponder_gate) / sizeof(int32_t)), warps = gate_threads / 32;
    static_assert(words <= gate_threads);
    __shared__ ponder_gate g;
    __shared__ double parts[warps][2];
    wait_for_earlier();
    let_next_start();
    const int thread = int(threadIdx.x), warp = thread / 32;
    if (thread < words)
        reinterpret_cast<int32_t *>(&g)[thread] = reinterpret_cast<const int32_t *>(p.from)[thread];
    double nll = 0, entropy = 0;
#pragma unroll 1
    for (int t = thread; t < p.predictions; t += gate_threads) {
        nll += p.nll ? double(p.nll[t]) : 0;
        entropy += p.entropy ? double(p.entropy[t]) : 0;
    }
    for (int step = 16; step > 0; step /= 2) {
        nll += __shfl_xor_sync(~0u, nll, step);
        entropy += __shfl_xor_sync(~0u, entropy, step);
    }
    if (thread % 32 == 0) {
        parts[warp][0] = nll;
        parts[warp][1] = entropy;
    }
    __syncthreads();
    if (thread == 0) {
        nll = entropy = 0;
        for (int i = 0; i < warps; ++i) {
            nll += parts[i][0];
            entropy += parts[i][1];
        }
        if (p.nll)
            g.signals[PONDER_GATE_LOSS] = nll * p.share;
        if (p.entropy)
            g.signals[PONDER_GATE_ENTROPY] = entropy * p.share;
        if (p.reconstruction && g.granted > 0)
            g.signals[PONDER_GATE_RECONSTRUCTION] = double(p.reconstruction[1]);
        if (p.told != 0) {
            if (p.told > 0) {
                g.wanted = g.granted = p.told;
                g.calibrating = 0;
                g.score = g.compared = unknown();
            } else {
                const bool update = ponder_gate_decide(&g, g.signals[g.signal]);
                ponder_gate_grant(&g, update ? g.steps : 0);
            }
            g.accepted = 0;
            g.gradient_norm = g.update_norm = unknown();
            if (p.flags) {
#pragma unroll 1
                for (int k = 0; k < p.steps; ++k)
                    p.flags[k] = k < g.granted;
                p.flags[p.steps] = g.granted == 0;
            }
            double power1 = g.power1, power2 = g.power2;
#pragma unroll 1
            for (int k = 0; p.h && k < p.steps; ++k) {
                float *const h = p.h + 8 * k;
                power1 *= p.beta1;
                power2 *= p.beta2;
                h[0] = float(p.lr);
                h[1] = float(p.beta1);
                h[2] = float(p.beta2);
                h[3] = float(p.epsilon);
                h[4] = float(1 - power1);
                h[5] = float(1 - power2);
                h[6] = float(p.clip);
                h[7] = 0;
            }
        }
    }
    __syncthreads();
    if (thread < words)
        reinterpret_cast<int32_t *>(p.to)[thread] = reinterpret_cast<const int32_t *>(&g)[thread];
}

// All blocks see whether; one of them notes it down.
__global__ void commit_kernel(const float *norms, int steps, const float *distance,
                              const ponder_gate *from, ponder_gate *to, const float *fresh,
                              float *w, int64_t n, double beta1, double beta2) {
    wait_for_earlier();
    const double gradient_norm = norms ? double(*norms) : unknown(),
                 update_norm = double(*distance);
    bool accepted = isfinite(update_norm) && update_norm <= from->guard_norm;
#pragma unroll 1
    for (int k = 0; k < steps && k < from->granted; ++k)
        accepted = accepted && isfinite(norms[k]);
    if (accepted && w)
        for (int64_t i = int64_t(blockIdx.x) * commit_threads + threadIdx.x; i < n;
             i += int64_t(gridDim.x) * commit_threads)
            w[i] = fresh[i];
    if (blockIdx.x != 0 || threadIdx.x != 0)
        return;
    ponder_gate g = *from;
    g.gradient_norm = gradient_norm;
    g.update_norm = update_norm;
    g.accepted = accepted;
    if (accepted) {
        g.signals[PONDER_GATE_UPDATE_NORM] = update_norm;
        g.optimizer_steps += g.granted;
        for (int64_t k = 0; k < g.granted; ++k) {
            g.power1 *= beta1;
            g.power2 *= beta2;
        }
    }
    *to = g;
}

bool is_state(const Call &call, size_t i) {
    return call.type(i) == PONDER_DTYPE_I32 &&
           call.count(i) * int64_t(sizeof(int32_t)) == int64_t(sizeof(ponder_gate));
}
const ponder_gate *state_at(const Run &run, size_t i) { return run.at<const ponder_gate>(i); }

} // namespace

int32_t plan_gate(const Call &call) {
    const size_t out = call.out(0);
    if (!is_state(call, 3) || !is_state(call, out))
        return PONDER_PLAN_NONE;
    GateArgs p{};
    p.predictions = int(call.attr(0));
    p.share = 1 / call.attr(0);
    p.told = int(call.attr(1));
    p.lr = call.attr(2);
    p.beta1 = call.attr(3);
    p.beta2 = call.attr(4);
    p.epsilon = call.attr(5);
    p.clip = call.attr(6);
    p.steps = call.has(out + 1)   ? int(call.count(out + 1)) - 1
              : call.has(out + 2) ? int(call.dim(out + 2, 0))
                                  : 0;
    if (call.has(out + 2) && call.dim(out + 2, 0) != p.steps)
        return PONDER_PLAN_NONE;
    const bool has_nll = call.has(0), has_entropy = call.has(1), has_reconstruction = call.has(2),
               has_flags = call.has(out + 1), has_h = call.has(out + 2);
    return call.is(0, [=](const Run &run) {
        GateArgs q = p;
        q.nll = has_nll ? run.at<const float>(0) : nullptr;
        q.entropy = has_entropy ? run.at<const float>(1) : nullptr;
        q.reconstruction = has_reconstruction ? run.at<const float>(2) : nullptr;
        q.from = state_at(run, 3);
        q.to = run.at<ponder_gate>(out);
        q.flags = has_flags ? run.at<int32_t>(out + 1) : nullptr;
        q.h = has_h ? run.at<float>(out + 2) : nullptr;
        launch(run, gate_kernel, 1, gate_threads, 0, q);
    });
}

int32_t plan_commit(const Call &call) {
    const size_t out = call.out(0);
    if (!is_state(call, 3) || !is_state(call, out))
        return PONDER_PLAN_NONE;
    const int steps = call.has(0) ? int(call.count(0)) : 0;
    const bool has_w = call.has(2) && call.has(out + 1);
    const double beta1 = call.attr(0), beta2 = call.attr(1);
    const int64_t n = has_w ? call.count(2) : 0;
    const unsigned blocks =
        unsigned(std::clamp<int64_t>(n / (4 * commit_threads), 1, 4 * call.device->processors));
    return call.is(0, [=](const Run &run) {
        launch(run, commit_kernel, blocks, commit_threads, 0,
               steps > 0 ? run.at<const float>(0) : nullptr, steps, run.at<const float>(1),
               state_at(run, 3), run.at<ponder_gate>(out), has_w ? run.at<const float>(2) : nullptr,
               has_w ? run.at<float>(out + 1) : nullptr, n, beta1, beta2);
    });
}

} // namespace ponder::cuda
