// adam, adamw, sgd over flat vectors in one launch, and the vjps of adam and sgd. The equations
// are those of src/backend/reference/optimizer.cpp and optimizer_vjp.cpp.
#include "ops.hpp"
#include "reduce.hpp"

namespace ponder::cuda {

namespace {

constexpr int threads = 256;

struct Hyper {
    float lr, beta1, beta2, eps, unbias1, unbias2, clip, decay, gnorm, factor;
    bool clipped;
    __device__ Hyper(const float *h, const float *gradient_norm)
        : lr(h[0]), beta1(h[1]), beta2(h[2]), eps(h[3]), unbias1(h[4]), unbias2(h[5]), clip(h[6]),
          decay(h[7]), gnorm(*gradient_norm) {
        clipped = clip > 0 && clip < gnorm + 1e-6f;
        factor = clipped ? clip / (gnorm + 1e-6f) : 1.0f;
    }
    __device__ void moments(float g, float &m, float &v) const {
        g *= factor;
        m = beta1 * m + (1 - beta1) * g;
        v = beta2 * v + (1 - beta2) * g * g;
    }
    __device__ float update(float m, float v) const {
        return (m / unbias1) / (sqrtf(v / unbias2) + eps);
    }
};

// Vectors that may be absent.
struct Rates {
    const float *rate, *keep, *start;
    __device__ float rate_of(int64_t i, float lr) const { return rate ? rate[i] : lr; }
    __device__ float keep_of(int64_t i) const { return keep ? keep[i] : 1.0f; }
    __device__ float start_of(int64_t i) const { return start ? start[i] : 0.0f; }
    __device__ float kept(int64_t i, float w) const {
        return keep ? start_of(i) + keep[i] * (w - start_of(i)) : w;
    }
};

__device__ inline int64_t element() { return int64_t(blockIdx.x) * threads + threadIdx.x; }

template <bool decoupled>
__global__ void adam_kernel(int64_t n, const float *w, const float *g, const float *m,
                            const float *v, const float *h, const float *gnorm, Rates rates,
                            float *w2, float *m2, float *v2) {
    const int64_t i = element();
    if (i >= n)
        return;
    const Hyper hyper(h, gnorm);
    float next_m = m[i], next_v = v[i];
    hyper.moments(g[i], next_m, next_v);
    m2[i] = next_m;
    v2[i] = next_v;
    const float update = hyper.update(next_m, next_v);
    w2[i] = decoupled ? w[i] - hyper.lr * (update + hyper.decay * w[i])
                      : rates.kept(i, w[i]) - rates.rate_of(i, hyper.lr) * update;
}

__global__ void sgd_kernel(int64_t n, const float *w, const float *g, const float *h,
                           const float *gnorm, Rates rates, float *w2) {
    const int64_t i = element();
    if (i >= n)
        return;
    const Hyper hyper(h, gnorm);
    w2[i] = rates.kept(i, w[i]) - rates.rate_of(i, hyper.lr) * hyper.factor * g[i];
}

struct Back {
    float *dw, *rate, *keep, *start;
    __device__ void operator()(const Rates &rates, int64_t i, float w, float update,
                               float dw2) const {
        if (rate)
            rate[i] = -update * dw2;
        if (keep)
            keep[i] = (w - rates.start_of(i)) * dw2;
        if (start)
            start[i] = (1 - rates.keep_of(i)) * dw2;
        dw[i] = rates.keep_of(i) * dw2;
    }
};

__global__ void adam_vjp_kernel(int64_t n, const float *w, const float *g, const float *m,
                                const float *v, const float *h, const float *gnorm, Rates rates,
                                const float *dw2, const float *dm2, const float *dv2, float *dg,
                                float *dm, float *dv, Back back) {
    const int64_t i = element();
    if (i >= n)
        return;
    const Hyper hyper(h, gnorm);
    float next_m = m[i], next_v = v[i];
    hyper.moments(g[i], next_m, next_v);
    const float root = sqrtf(next_v / hyper.unbias2), below = root + hyper.eps;
    const float gw = dw2 ? dw2[i] : 0.0f, du = -rates.rate_of(i, hyper.lr) * gw;
    const float to_m = (dm2 ? dm2[i] : 0.0f) + du / (hyper.unbias1 * below);
    float to_v = dv2 ? dv2[i] : 0.0f;
    if (next_v > 0)
        to_v -= du * (next_m / hyper.unbias1) / (below * below) / (2 * root * hyper.unbias2);
    const float old_w = w[i], gradient = g[i];
    dm[i] = hyper.beta1 * to_m;
    dv[i] = hyper.beta2 * to_v;
    dg[i] = (1 - hyper.beta1) * to_m + 2 * (1 - hyper.beta2) * hyper.factor * gradient * to_v;
    back(rates, i, old_w, hyper.update(next_m, next_v), gw);
}

__global__ void sgd_vjp_kernel(int64_t n, const float *w, const float *g, const float *h,
                               const float *gnorm, Rates rates, const float *dw2, float *dg,
                               Back back) {
    const int64_t i = element();
    if (i >= n)
        return;
    const Hyper hyper(h, gnorm);
    const float up = dw2[i];
    dg[i] = -rates.rate_of(i, hyper.lr) * up;
    back(rates, i, w[i], hyper.factor * g[i], up);
}

// g was scaled by factor = clip / (gnorm + 1e-6): from the gradient of the scaled one to g's.
struct Along {
    const float *dg, *g;
    __device__ float operator()(int64_t i) const { return dg[i] * g[i]; }
};
struct Keep {
    double *to;
    __device__ void operator()(double sum) const { *to = sum; }
};
__global__ void through_clip(int64_t n, const float *h, const float *gnorm, const float *g,
                             const double *along, float *dg) {
    const int64_t i = element();
    if (i >= n)
        return;
    const Hyper hyper(h, gnorm);
    if (!hyper.clipped)
        return;
    const float back =
        hyper.gnorm > 0 ? float(*along) * hyper.factor / ((hyper.gnorm + 1e-6f) * hyper.gnorm) : 0;
    dg[i] = hyper.factor * dg[i] - back * g[i];
}

void clip_gradient(const Run &run, int64_t n, const float *h, const float *gnorm, const float *g,
                   float *dg) {
    double *along = reinterpret_cast<double *>(run.workspace);
    Run rest = run;
    rest.workspace += 256;
    reduce(n, rest, Along{dg, g}, Keep{along});
    through_clip<<<blocks_for(n, threads), threads, 0, run.stream>>>(n, h, gnorm, g, along, dg);
}

template <bool decoupled> int32_t plan_moments(const Call &call) {
    const int64_t n = call.count(0);
    const size_t out = call.out(0);
    const bool has_rate = !decoupled && call.has_in(6), has_keep = !decoupled && call.has_in(7),
               has_start = !decoupled && call.has_in(8);
    return call.is(0, [=](const Run &run) {
        const Rates rates{has_rate ? run.at<const float>(6) : nullptr,
                          has_keep ? run.at<const float>(7) : nullptr,
                          has_start ? run.at<const float>(8) : nullptr};
        adam_kernel<decoupled><<<blocks_for(n, threads), threads, 0, run.stream>>>(
            n, run.at<const float>(0), run.at<const float>(1), run.at<const float>(2),
            run.at<const float>(3), run.at<const float>(4), run.at<const float>(5), rates,
            run.at<float>(out), run.at<float>(out + 1), run.at<float>(out + 2));
    });
}

} // namespace

int32_t plan_adam(const Call &call) { return plan_moments<false>(call); }
int32_t plan_adamw(const Call &call) { return plan_moments<true>(call); }

int32_t plan_sgd(const Call &call) {
    const int64_t n = call.count(0);
    const size_t out = call.out(0);
    const bool has_rate = call.has_in(4), has_keep = call.has_in(5), has_start = call.has_in(6);
    return call.is(0, [=](const Run &run) {
        const Rates rates{has_rate ? run.at<const float>(4) : nullptr,
                          has_keep ? run.at<const float>(5) : nullptr,
                          has_start ? run.at<const float>(6) : nullptr};
        sgd_kernel<<<blocks_for(n, threads), threads, 0, run.stream>>>(
            n, run.at<const float>(0), run.at<const float>(1), run.at<const float>(2),
            run.at<const float>(3), rates, run.at<float>(out));
    });
}

int32_t plan_adam_vjp(const Call &call) {
    const int64_t n = call.count(0);
    const size_t out = call.out(0);
    return call.is(256 + reduce_workspace(n), [=](const Run &run) {
        const float *g = run.at<const float>(1), *h = run.at<const float>(4),
                    *gnorm = run.at<const float>(5);
        const Rates rates{run.at<const float>(6), run.at<const float>(7), run.at<const float>(8)};
        const Back back{run.at<float>(out), run.at<float>(out + 4), run.at<float>(out + 5),
                        run.at<float>(out + 6)};
        adam_vjp_kernel<<<blocks_for(n, threads), threads, 0, run.stream>>>(
            n, run.at<const float>(0), g, run.at<const float>(2), run.at<const float>(3), h, gnorm,
            rates, run.at<const float>(9), run.at<const float>(10), run.at<const float>(11),
            run.at<float>(out + 1), run.at<float>(out + 2), run.at<float>(out + 3), back);
        clip_gradient(run, n, h, gnorm, g, run.at<float>(out + 1));
    });
}

int32_t plan_sgd_vjp(const Call &call) {
    const int64_t n = call.count(0);
    const size_t out = call.out(0);
    return call.is(256 + reduce_workspace(n), [=](const Run &run) {
        const float *g = run.at<const float>(1), *h = run.at<const float>(2),
                    *gnorm = run.at<const float>(3);
        const Rates rates{run.at<const float>(4), run.at<const float>(5), run.at<const float>(6)};
        const Back back{run.at<float>(out), run.at<float>(out + 2), run.at<float>(out + 3),
                        run.at<float>(out + 4)};
        sgd_vjp_kernel<<<blocks_for(n, threads), threads, 0, run.stream>>>(
            n, run.at<const float>(0), g, h, gnorm, rates, run.at<const float>(7),
            run.at<float>(out + 1), back);
        clip_gradient(run, n, h, gnorm, g, run.at<float>(out + 1));
    });
}

} // namespace ponder::cuda
