// The states of the reverse with roles: W backwards from the trace, Z, U and their norms, du.
#pragma once

#include "ttt_linear_vjp_roles.cuh"

namespace ponder::cuda {

template <class L> __device__ __forceinline__ void ReverseRoles<L>::states(const Place &at) const {
    const float *kept_states = p.trace_w + int64_t(head) * trace_states(p.batches) * L::state_size;
    typename L::State w;
    load_state<L>(w, kept_states + (trace_states(p.batches) - 1) * L::state_size, at.thread);
    HeadNorm norm;
    norm.load(p, h * D + at.col + 2 * at.t);
    float dg[2][2] = {}, db[2][2] = {}, da[2] = {};
    const int own = at.g + 8 * (at.t & 1);
    const float by = 1 / shared.rates.f(false), by_short = 1 / shared.rates.f(true);
    const auto sync = [] { sync_warps(1, L::threads); };
    if (weight[2] != 0) { // the state after the last step, where the step after it would be
        copy_state<L>(shared.states[reverse_state_slots - 1].w, w, at);
        sync();
    }
    const bool always = shared.rates.learns(false) != 0;
    const float row_rate[2] = {shared.rates.a(false, at.g), shared.rates.a(false, at.g + 8)};
    const auto one_step = [&](auto is_first, int step) {
        constexpr bool is_short = decltype(is_first)::value;
        const int n = is_short ? short_n : M, batch = batch_of(step);
        const ReverseSlot<L> &slot = shared.slots[step % reverse_slots];
        ReverseState<L> &to = shared.states[step % reverse_state_slots];
        float *parts = shared.state_parts + (step & 1) * L::warps * 128;
        wait_for_phase(shared.full + step % reverse_slots, step / reverse_slots & 1);
        if (step >= reverse_state_slots)
            wait_for_phase(shared.state_empty + step % reverse_state_slots,
                           (step / reverse_state_slots - 1) & 1);
        if (weight[2] != 0) {
            const ReverseState<L> &after =
                shared.states[(step + reverse_state_slots - 1) % reverse_state_slots];
            probe<L>(
                p, to.probe, shared.norms, shared.state_sums, after.w, slot.k + (n - 1) * L::ld,
                [&](int i) { return slot.last_goal[i]; }, h, weight[2], at, sync);
        }
        FragB<E> step_p[2];
        load_b_transposed(step_p, slot.p + at.col, L::ld, at.lane);
        if (is_short ? shared.rates.learns(true) != 0 : always) {
            FragA<E> minus = a_of(step_p);
            negate(minus);
            add_outer<L>(w, slot.k, minus, at);
        }
        if (batch % trace_every == 0)
            load_state<L>(w, kept_states + batch / trace_every * L::state_size, at.thread);
        copy_state<L>(to.w, w, at);

        typename L::Rows z, u;
        {
            const E *const from[2] = {slot.k, slot.q};
            typename L::Rows *const into[2] = {&z, &u};
            products<L, 2>(into, from, w, at);
        }
        float products_p[2][4] = {}, ge[2][4], sum[2][8] = {};
        FragA<E> a;
        kept(a, slot.a, at.lane);
        mma(products_p[0], a, step_p[0]);
        mma(products_p[1], a, step_p[1]);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
            const float4 goal4 = slot.goal[at.warp][nt][at.lane];
            const float goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = at.g + 8 * half;
                const float rate = is_short ? shared.rates.a(true, row) : row_rate[half];
                const float2 dy =
                    floats(pair_at(slot.dy + row * L::ld + at.col + 8 * nt + 2 * at.t));
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int x = 2 * half + e;
                    const float zz = z[0][nt][x], gz = norm.g[nt][e] * zz;
                    u[0][nt][x] += rate * products_p[nt][x];
                    ge[nt][x] = e ? dy.y : dy.x;
                    sum[half][0] += zz * zz;
                    sum[half][1] += norm.g[nt][e] * gz;
                    sum[half][2] += gz * gz;
                    sum[half][3] += goal[x] * gz;
                    sum[half][5] += u[0][nt][x] * u[0][nt][x];
                    const float scaled = norm.g[nt][e] * ge[nt][x];
                    sum[half][6] += scaled;
                    sum[half][7] += scaled * u[0][nt][x];
                }
            }
        }
        RowSums::put_quick<8>(parts, sum[0], sum[1], at);
        sync();
        float s[8], r[2], r_u[2], mean_e[2], along_e[2];
        RowSums::get(s, parts, L::warps, at);
        s[4] = slot.goal_sum[own];
        const LossStats stats(s, float(D), p.eps);
        const float own_r = inverse_root(s[5] * (1.0f / D) + p.eps);
        RowSums::spread(r, stats.r, at);
        RowSums::spread(r_u, own_r, at);
        RowSums::spread(mean_e, own_r * s[6] * (1.0f / D), at);
        RowSums::spread(along_e, own_r * own_r * own_r * s[7] * (1.0f / D), at);
        if (at.warp == 0 && at.t < 2) {
            to.r[own] = stats.r;
            to.mean_u[own] = stats.mean_u;
            to.mean_uh[own] = stats.mean_uh;
            to.ggh[own] = stats.r * s[1] * (1.0f / D);
            to.gghh[own] = stats.r * stats.r * s[2] * (1.0f / D);
        }
        float along[2] = {0, 0};
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float du[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int x = 2 * half + e;
                    dg[nt][e] += ge[nt][x] * (r_u[half] * u[0][nt][x]);
                    db[nt][e] += ge[nt][x];
                    du[e] = r_u[half] * norm.g[nt][e] * ge[nt][x] - mean_e[half] -
                            u[0][nt][x] * along_e[half];
                    along[half] += du[e] * products_p[nt][x];
                }
                store_pair(to.du + (at.g + 8 * half) * L::ld + at.col + 8 * nt + 2 * at.t, du[0],
                           du[1]);
            }
            to.h[at.warp][nt][at.lane] = {r[0] * z[0][nt][0], r[0] * z[0][nt][1],
                                          r[1] * z[0][nt][2], r[1] * z[0][nt][3]};
        }
        da[0] += (is_short ? by_short : by) * along[0];
        da[1] += (is_short ? by_short : by) * along[1];
        sync_warp();
        arrive_warp(shared.state_full + step % reverse_state_slots, at.lane);
        arrive_warp(shared.empty + step % reverse_slots, at.lane);
    };
    one_step(std::true_type(), 0);
    for (int step = 1; step < p.batches; ++step)
        one_step(std::false_type(), step);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float x = da[half];
        x += from_lane_xor(x, 1);
        x += from_lane_xor(x, 2);
        if (at.t == 0)
            shared.rates_parts[at.warp * M + at.g + 8 * half] = x;
    }
    sync();
    put_norms(shared.norm_sums, dg, db, shared.norms, at);
    sync_block();
    sync_block();
}

} // namespace ponder::cuda
