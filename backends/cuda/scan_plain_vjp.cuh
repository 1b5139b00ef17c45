// What the plain scans' gradients share: rows of the norm backwards, and sums over streams.
#pragma once

#include "scan_plain.cuh"

namespace ponder::cuda::plain {

// A row of LN backwards, on a warp. What belongs to g and b is added to rows of its own, which one
// thread a column sums in the end.
struct Back {
    Norm norm;
    // dz += (d LN / dz)^T dy
    __device__ void output(const float *z, const float *dy, float *dz, float *dg, float *db) const {
        float mean, inverse;
        norm.moments(z, mean, inverse);
        float sum_u = 0, sum_uh = 0;
        lanes(norm.d, [&](int64_t j) {
            const float h = (z[j] - mean) * inverse, u = norm.g[j] * dy[j];
            dg[j] += dy[j] * h;
            db[j] += dy[j];
            sum_u += u;
            sum_uh += u * h;
        });
        const float mean_u = warp_sum(sum_u) / float(norm.d),
                    mean_uh = warp_sum(sum_uh) / float(norm.d);
        lanes(norm.d, [&](int64_t j) {
            const float h = (z[j] - mean) * inverse;
            dz[j] += (norm.g[j] * dy[j] - mean_u - h * mean_uh) * inverse;
        });
    }
    // Of weight mean((LN(z) - target)^2); dy is scratch.
    __device__ void error(const float *z, const float *target, float weight, float *dy, float *dz,
                          float *dtarget, float *dg, float *db) const {
        float mean, inverse;
        norm.moments(z, mean, inverse);
        lanes(norm.d, [&](int64_t j) {
            const float y = norm.g[j] * ((z[j] - mean) * inverse) + norm.b[j];
            dy[j] = 2 * weight / float(norm.d) * (y - target[j]);
            dtarget[j] -= dy[j];
        });
        __syncwarp();
        output(z, dy, dz, dg, db);
    }
    // Of the gradient of 0.5 |LN(z) - target|^2 in z; see NormGradient::loss_gradient.
    __device__ void loss_gradient(const float *z, const float *target, const float *dp, float *dz,
                                  float *dtarget, float *dg, float *db) const {
        const int64_t d = norm.d;
        const float *g = norm.g, *b = norm.b;
        float mean, r;
        norm.moments(z, mean, r);
        float sums[4] = {};
        lanes(d, [&](int64_t j) {
            const float h = (z[j] - mean) * r, u = g[j] * (g[j] * h + b[j] - target[j]);
            const float e = r * dp[j];
            sums[0] += u;
            sums[1] += u * h;
            sums[2] += e;
            sums[3] += e * h;
        });
        const float mean_u = warp_sum(sums[0]) / float(d), mean_uh = warp_sum(sums[1]) / float(d),
                    mean_e = warp_sum(sums[2]) / float(d), mean_eh = warp_sum(sums[3]) / float(d);
        float dr = 0, sum_dh = 0, sum_dhh = 0;
        const auto dh_of = [&](int64_t j, float h, float u, float du) {
            return -r * dp[j] * mean_uh - u * mean_eh + g[j] * g[j] * du;
        };
        lanes(d, [&](int64_t j) {
            const float h = (z[j] - mean) * r, residual = g[j] * h + b[j] - target[j];
            const float u = g[j] * residual, du = r * dp[j] - mean_e - h * mean_eh;
            dr += dp[j] * (u - mean_u - h * mean_uh);
            dg[j] += du * (residual + g[j] * h);
            db[j] += du * g[j];
            const float dh = dh_of(j, h, u, du);
            sum_dh += dh;
            sum_dhh += dh * h;
        });
        const float mean_dh = warp_sum(sum_dh) / float(d),
                    mean_dhh = (warp_sum(sum_dhh) + warp_sum(dr) * r) / float(d);
        lanes(d, [&](int64_t j) {
            const float h = (z[j] - mean) * r, u = g[j] * (g[j] * h + b[j] - target[j]);
            const float du = r * dp[j] - mean_e - h * mean_eh;
            dtarget[j] -= du * g[j];
            dz[j] += r * (dh_of(j, h, u, du) - mean_dh - h * mean_dhh);
        });
    }
};

// Sums over streams of `partial`, of each head gradients of g, b and the token rates, into outputs
// dindex, dg and db, which are `out` + 4 to 6.
void queue_sums(const Run &run, size_t out, const float *partial, int64_t streams, int64_t heads,
                int64_t d, int64_t m);

} // namespace ponder::cuda::plain
