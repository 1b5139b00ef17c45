// What gradients of the TTT scans share.
#pragma once

#include "backend/reference/ttt.hpp"

namespace ponder::reference {

// One row of LN backwards. dg and db are added to.
template <class T> struct NormGradient {
    const HeadNorm<T> &norm;
    T *dg, *db; // [D]
    std::vector<T> y, h, u;
    NormGradient(const HeadNorm<T> &norm, T *dg, T *db)
        : norm(norm), dg(dg), db(db), y(size_t(norm.d)), h(size_t(norm.d)), u(size_t(norm.d)) {}

    // dz += (d LN / dz)^T dy
    void output(const T *z, const T *dy, T *dz) {
        T inverse_std;
        norm.forward(z, y.data(), h.data(), &inverse_std);
        normalised(dy, inverse_std, dz);
    }
    // Of weight mean((LN(z) - target)^2).
    void error(const T *z, const T *target, T weight, T *dz, T *dtarget) {
        T inverse_std;
        norm.forward(z, y.data(), h.data(), &inverse_std);
        std::vector<T> dy(y.size());
        for (int64_t j = 0; j < norm.d; ++j) {
            dy[size_t(j)] = 2 * weight / T(norm.d) * (y[size_t(j)] - target[j]);
            dtarget[j] -= dy[size_t(j)];
        }
        normalised(dy.data(), inverse_std, dz);
    }
    // Of p = r (u - mean(u) - h mean(u h)), u = g (g h + b - target): with D = dp and E = r D,
    //   du = E - mean(E) - h mean(E h),  dh = -E mean(u h) - u mean(E h) + g (g du),
    //   dr = D p / r,  dz = r (dh - mean(dh) - h mean(dh h)) - dr r^2 h / d
    void loss_gradient(const T *z, const T *target, const T *dp, T *dz, T *dtarget) {
        const int64_t d = norm.d;
        const T *g = norm.g;
        T r;
        norm.forward(z, y.data(), h.data(), &r);
        double mean_u = 0, mean_uh = 0, mean_e = 0, mean_eh = 0;
        for (int64_t j = 0; j < d; ++j) {
            const size_t i = size_t(j);
            u[i] = g[j] * (y[i] - target[j]);
            mean_u += u[i];
            mean_uh += double(u[i]) * h[i];
            mean_e += r * dp[j];
            mean_eh += double(r * dp[j]) * h[i];
        }
        mean_u /= double(d);
        mean_uh /= double(d);
        mean_e /= double(d);
        mean_eh /= double(d);
        double dr = 0, mean_dh = 0, mean_dhh = 0;
        std::vector<T> dh(y.size());
        for (int64_t j = 0; j < d; ++j) {
            const size_t i = size_t(j);
            const T e = r * dp[j], residual = y[i] - target[j];
            const T du = e - T(mean_e) - h[i] * T(mean_eh);
            dr += double(dp[j]) * (u[i] - T(mean_u) - h[i] * T(mean_uh));
            dg[j] += du * (residual + g[j] * h[i]);
            db[j] += du * g[j];
            dtarget[j] -= du * g[j];
            dh[i] = -e * T(mean_uh) - u[i] * T(mean_eh) + g[j] * g[j] * du;
            mean_dh += dh[i];
            mean_dhh += double(dh[i]) * h[i];
        }
        mean_dh /= double(d);
        mean_dhh = (mean_dhh + dr * r) / double(d);
        for (int64_t j = 0; j < d; ++j)
            dz[j] += r * (dh[size_t(j)] - T(mean_dh) - h[size_t(j)] * T(mean_dhh));
    }

private:
    void normalised(const T *dy, T inverse_std, T *dz) {
        const int64_t d = norm.d;
        double mean_u = 0, mean_uh = 0;
        for (int64_t j = 0; j < d; ++j) {
            const size_t i = size_t(j);
            u[i] = norm.g[j] * dy[j];
            mean_u += u[i];
            mean_uh += double(u[i]) * h[i];
            dg[j] += dy[j] * h[i];
            db[j] += dy[j];
        }
        mean_u /= double(d);
        mean_uh /= double(d);
        for (int64_t j = 0; j < d; ++j)
            dz[j] += inverse_std * (u[size_t(j)] - T(mean_u) - h[size_t(j)] * T(mean_uh));
    }
};

template <class T> void copy_or_zero(const T *from, int64_t first, int64_t n, T *to) {
    if (from)
        std::copy_n(from + first, n, to);
    else
        std::fill_n(to, n, T(0));
}

} // namespace ponder::reference
