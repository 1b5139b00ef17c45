// The chain of the pipeline in lockstep: Z, P, the state, U.
#pragma once

#include "ttt_linear_lockstep.cuh"

namespace ponder::cuda {

// P of a chain warp, turned: x[n][h] has outputs 8 n + g of tokens 8 h + 2 t and the next.
template <int no> struct Turned {
    uint32_t x[no][2];
    __device__ __forceinline__ FragB<Bf16> second(int n) const { return {{x[n][0], x[n][1]}}; }
    __device__ __forceinline__ FragA<Bf16> first(int m) const {
        return {{x[2 * m][0], x[2 * m + 1][0], x[2 * m][1], x[2 * m + 1][1]}};
    }
};

// c[16,8] = start + a b
template <class C, class L>
__device__ __forceinline__ void LockstepScan<C, L>::mma_from(float (&c)[4], const FragA<E> &a,
                                                             const FragB<E> &b,
                                                             const float (&start)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
        c[e] = start[e];
    mma(c, a, b);
}

// What the limit on the norm of G leaves of it.
template <class C, class L>
__device__ __forceinline__ float
LockstepScan<C, L>::clip(const float (&z)[no][4], const float (&r)[2], const float (&mean_u)[2],
                         const float (&r_mean_uh)[2], const float (&gg)[no][2],
                         const typename C::Ready &ready, int n_tokens, const Place &at) {
    float square = 0;
#pragma unroll
    for (int n = 0; n < no; ++n) {
        const float4 goal4 = ready.goal[no * at.warp + n][at.lane];
        const float goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int half = e >> 1;
            const float x = r[half] * ((r[half] * gg[n][e & 1] - r_mean_uh[half]) * z[n][e] -
                                       goal[e] - mean_u[half]);
            if (at.g + 8 * half < n_tokens)
                square += x * x;
        }
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2)
        square += from_lane_xor(square, i);
    if (at.lane == 0)
        shared.block[at.warp] = square;
    sync_warps(2, 32 * C::chain);
    square = 0;
    for (int i = 0; i < C::chain; ++i)
        square += shared.block[i];
    const float length = square * quick_inverse_root(square + 1e-30f);
    return fminf(1.0f, quotient(p.max_norm, length + 1e-6f));
}

template <class C, class L>
__device__ __forceinline__ void LockstepScan<C, L>::chain(const Place &at) {
    const int col = C::outs * at.warp;
    float w[mo][2 * kt][4], b[no][4], gg[no][2];
    start_state(w, b, col, at);
#pragma unroll
    for (int n = 0; n < no; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float g = p.g[head % p.heads * D + col + 8 * n + 2 * at.t + e];
            gg[n][e] = g * g;
        }
    // Where this lane reads and writes
    const int tile_at = (at.lane & 15) * L::ld + (at.lane >> 4) * 8;
    float *const u_at = shared.u[0] + at.g * C::u_ld + col + (2 * at.t ^ C::u_turn(col));
    float *const last_at = shared.z_last[0] + col + 2 * at.t;
    const bool writes = at.t == 0;
    float4 *const put_at = shared.parts[0][at.warp][at.g];
    const float4 *const get_at = shared.parts[0][C::chain == 2 ? 1 - at.warp : 0][at.g];
    E *trace = static_cast<E *>(p.trace_p);
    if (trace)
        trace += (int64_t(head) * p.tokens + at.g) * D + col + quad_column(at);
    const float eps = p.eps;
    const bool clips = p.max_norm > 0, with_losses = losses(), always = rates.learns(false) != 0;
    int of_slot = 0, of_ready = 0;

    // Of the last mini-batch, or one before it.
    const auto step = [&](auto is_last, int batch) {
        constexpr bool is_short = decltype(is_last)::value;
        const int n_tokens = is_short ? short_n : M;
        const typename C::Slot &slot = shared.slot[of_slot];
        const typename C::Ready &ready = shared.ready[of_ready];
        const int odd = batch & 1;
        of_slot = of_slot == C::slots - 1 ? 0 : of_slot + 1;
        of_ready = of_ready == C::ready_slots - 1 ? 0 : of_ready + 1;
        if (p.trace_w && batch % trace_every == 0)
            keep_state(batch / trace_every, w, b, at);

        // Z = K W + b, U = Q W + b: the products of one leave room between them for the
        // other's.
        // Where registers allow, Z is two sums: half as many products wait for each other.
        constexpr int parts = C::many ? 1 : 2;
        float z_parts[parts][no][4], u[no][4];
#pragma unroll
        for (int k = 0; k < kt; ++k) {
            FragA<E> x;
            [[maybe_unused]] FragA<E> q;
            load_matrices(x.x, slot.k + tile_at + 16 * k);
            if constexpr (C::output)
                load_matrices(q.x, slot.q + tile_at + 16 * k);
#pragma unroll
            for (int n = 0; n < no; ++n) {
                FragB<E> f;
                b_of_transposed(f, w[n / 2][2 * k], w[n / 2][2 * k + 1], n & 1);
                float(&z)[4] = z_parts[parts * k / kt][n];
                if (k == 0)
                    mma_from(z, x, f, b[n]);
                else if (parts * k % kt == 0)
                    mma_from(z, x, f, {0, 0, 0, 0});
                else
                    mma(z, x, f);
                if constexpr (C::output) {
                    if (k == 0)
                        mma_from(u[n], q, f, b[n]);
                    else
                        mma(u[n], q, f);
                }
            }
        }
        float(&z)[no][4] = z_parts[0];
#pragma unroll
        for (int n = 0; n < no && parts > 1; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[n][e] += z_parts[parts - 1][n][e];
        // sums of z^2, g^2 z, g^2 z^2, g goal z; of tokens g and g + 8
        float sums[2][4];
        {
            float s[2][4] = {};
#pragma unroll
            for (int n = 0; n < no; ++n) {
                const float4 goal4 = ready.goal[no * at.warp + n][at.lane];
                const float goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float(&to)[4] = s[e >> 1];
                    const float ggz = gg[n][e & 1] * z[n][e];
                    to[0] += z[n][e] * z[n][e];
                    to[1] = n == 0 && (e & 1) == 0 ? ggz : to[1] + ggz;
                    to[2] += ggz * z[n][e];
                    to[3] += goal[e] * z[n][e];
                }
            }
            RowSums::of_lanes(sums[0], s[0][0], s[1][0], s[0][1], s[1][1], at);
            RowSums::of_lanes(sums[1], s[0][2], s[1][2], s[0][3], s[1][3], at);
        }
        if (writes) {
            float4 *to = put_at + odd * C::chain * 16;
            to[0] = {sums[0][0], sums[0][1], sums[0][2], sums[0][3]};
            to[1] = {sums[1][0], sums[1][1], sums[1][2], sums[1][3]};
        }
        sync();
        {
            const float4 *from = get_at + odd * C::chain * 16;
            if constexpr (C::chain > 2) {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sums[0][e] = sums[1][e] = 0;
            }
#pragma unroll
            for (int i = 0; i < (C::chain > 2 ? C::chain : 1); ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float4 x = from[16 * i + j];
                    sums[j][0] += x.x, sums[j][1] += x.y, sums[j][2] += x.z, sums[j][3] += x.w;
                }
        }
        FragB<E> keys[kt][2]; // of K^T P
        uint4 factor_a{}, factor_sums{};
        const auto load_keys = [&](int k) {
            load_b_transposed(keys[k], slot.k + 16 * k, L::ld, at.lane);
        };
        const auto load_a_factor = [&] {
            if (C::output)
                factor_a = ready.a[at.lane];
        };
        const auto load_sums_factor = [&] { factor_sums = ready.sums[at.lane]; };
        if constexpr (!C::many) { // where registers allow
#pragma unroll
            for (int k = 0; k < kt; ++k)
                load_keys(k);
            load_sums_factor();
            load_a_factor();
        }
        float r[2], mean_u[2], r_mean_uh[2], by[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float goal_sum = ready.goal_sum[at.g + 8 * half][0];
#pragma unroll
            for (int i = 1; i < C::helpers; ++i)
                goal_sum += ready.goal_sum[at.g + 8 * half][i];
            by[half] = ready.rate[at.g + 8 * half];
            r[half] = quick_inverse_root(sums[0][2 * half] * (1.0f / D) + eps);
            mean_u[half] = (r[half] * sums[0][2 * half + 1] - goal_sum) * (1.0f / D);
            r_mean_uh[half] = (r[half] * r[half]) *
                              (r[half] * sums[1][2 * half] - sums[1][2 * half + 1]) * (1.0f / D);
            by[half] *= r[half];
        }
        if (clips) {
            const float factor_of = clip(z, r, mean_u, r_mean_uh, gg, ready, n_tokens, at);
            by[0] *= factor_of;
            by[1] *= factor_of;
        }
        // P = -f c r (g^2 r z - g goal - mean_u - r mean_uh z)
        Turned<no> turned;
        {
            float by_r[2], by_uh[2], by_u[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                by_r[half] = by[half] * r[half];
                by_uh[half] = by[half] * r_mean_uh[half];
                by_u[half] = by[half] * mean_u[half];
            }
#pragma unroll
            for (int n = 0; n < no; ++n) {
                const float4 goal4 = ready.goal[no * at.warp + n][at.lane];
                const float goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        x[e] = (by_r[half] * gg[n][e] - by_uh[half]) * z[n][2 * half + e] -
                               by_u[half] - by[half] * goal[2 * half + e];
                    turned.x[n][half] = pack_bf16(x[0], x[1]);
                }
            }
        }
        if (trace) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int m = 0; m < mo; ++m) {
                    const uint2 x = quad_of(turned.x[2 * m][half], turned.x[2 * m + 1][half], at);
                    if (at.g + 8 * half < n_tokens)
                        *reinterpret_cast<uint2 *>(trace + 8 * half * D + 16 * m) = x;
                }
            trace += M * D;
        }
#pragma unroll
        for (int n = 0; n < no; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                turned.x[n][half] = turn_matrix(turned.x[n][half]);

        if (C::many)
            load_keys(0);
        const bool learns = is_short ? rates.learns(true) != 0 : always;
        if (learns) { // W += K^T P
#pragma unroll
            for (int k = 0; k < kt; ++k) {
                if (C::many && k + 1 < kt)
                    load_keys(k + 1);
#pragma unroll
                for (int m = 0; m < mo; ++m) {
                    mma(w[m][2 * k], turned.first(m), keys[k][0]);
                    mma(w[m][2 * k + 1], turned.first(m), keys[k][1]);
                }
            }
        }
        if (C::many) {
            load_sums_factor();
            load_a_factor();
        }
        // b += sum P, and the last key under the new state, z + sum_j (k k_j + 1) P_j. All rows of
        // b are alike: those of the upper eight tokens make room for that of the last key, which is
        // one of them or, in a short mini-batch, put there.
        {
            const bool lower = n_tokens <= 8;
            const bool mine = with_losses && at.g == ((n_tokens - 1) & 7);
            const FragA<E> a{{factor_sums.x, factor_sums.y, factor_sums.z, factor_sums.w}};
            float *to = last_at + odd * D;
#pragma unroll
            for (int n = 0; n < no; ++n) {
                b[n][2] = lower ? z[n][0] : z[n][2];
                b[n][3] = lower ? z[n][1] : z[n][3];
                mma(b[n], a, turned.second(n));
            }
#pragma unroll
            for (int n = 0; n < no; ++n) {
                store_if(mine, to + 8 * n, b[n][2], b[n][3]);
                b[n][2] = b[n][0];
                b[n][3] = b[n][1];
            }
        }
        if (C::output) {
            const FragA<E> a{{factor_a.x, factor_a.y, factor_a.z, factor_a.w}};
            float *to = u_at + odd * 16 * C::u_ld;
#pragma unroll
            for (int n = 0; n < no; ++n) {
                mma(u[n], a, turned.second(n));
                *reinterpret_cast<float2 *>(to + 8 * n) = {u[n][0], u[n][1]};
                *reinterpret_cast<float2 *>(to + 8 * C::u_ld + 8 * n) = {u[n][2], u[n][3]};
            }
        }
    };
    for (int batch = 0; batch < p.batches - 1; ++batch)
        step(std::false_type(), batch);
    step(std::true_type(), p.batches - 1);
    sync();
    if (p.trace_w)
        keep_state(int(trace_states(p.batches)) - 1, w, b, at);
    if (C::output && p.w_out) {
        each(w, col, at, [&](float &x, int in, int out) {
            p.w_out[(int64_t(head) * D + in) * D + out] = x + shared.mean[in];
        });
        if (at.g == 0)
#pragma unroll
            for (int n = 0; n < no; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    p.b_out[int64_t(head) * D + col + 8 * n + 2 * at.t + e] =
                        b[n][e] + shared.mean[D];
    }
}

} // namespace ponder::cuda
