// The chain of the reverse with roles: dP, dG, dz, dW; at the end the sums of all roles and the
// error under the initial state.
#pragma once

#include "ttt_linear_vjp_roles.cuh"

namespace ponder::cuda {

template <class L> __device__ __forceinline__ void ReverseRoles<L>::chain(const Place &at) const {
    typename L::State dw;
    read_state<L>(dw, p.dw_next ? p.dw_next + int64_t(head) * D * D : nullptr,
                  p.db_next ? p.db_next + int64_t(head) * D : nullptr, at);
    HeadNorm norm;
    norm.load(p, h * D + at.col + 2 * at.t);
    float mean_gg = 0;
    for (int i = 0; i < D; ++i)
        mean_gg += p.g[h * D + i] * p.g[h * D + i];
    mean_gg /= float(D);
    float gg[2][2], da_last = 0, da_short = 0;
#pragma unroll
    for (int nt = 0; nt < 2; ++nt)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            gg[nt][e] = norm.g[nt][e] * norm.g[nt][e];
    const int own = at.g + 8 * (at.t & 1);
    const float by = 1 / shared.rates.f(false), by_short = 1 / shared.rates.f(true);
    const bool always = shared.rates.learns(false) != 0, by_key = p.by_key, clips = p.max_norm > 0;
    const auto sync = [] { sync_warps(2, L::threads); };
    // The first mini-batch that is read is the last, which may be short.
    const auto one_step = [&](auto is_first, int step) {
        constexpr bool is_short = decltype(is_first)::value;
        const int n = is_short ? short_n : M;
        const ReverseSlot<L> &slot = shared.slots[step % reverse_slots];
        const ReverseState<L> &state = shared.states[step % reverse_state_slots];
        ReverseChain<L> &to = shared.chains[step % reverse_chain_slots];
        float *parts = shared.chain_parts + (step & 1) * L::warps * 128;
        const bool learns = is_short ? shared.rates.learns(true) != 0 : always;
        // where the state is, the warps ahead have been
        wait_for_phase(shared.state_full + step % reverse_state_slots,
                       step / reverse_state_slots & 1);
        if (step >= reverse_chain_slots)
            wait_for_phase(shared.chain_empty + step % reverse_chain_slots,
                           (step / reverse_chain_slots - 1) & 1);
        if (weight[2] != 0)
            each_element<L>(dw, at, [&](float &x, int in, int out) {
                if (in <= D)
                    x += state.probe[in] * state.probe[D + 4 + out];
            });
        // dP; of it that part, which needs no dW, apart
        typename L::Rows d_rows;
        {
            const E *const from[1] = {slot.k};
            typename L::Rows *const into[1] = {&d_rows};
            products<L, 1>(into, from, dw, at);
        }
        float(&d)[2][4] = d_rows[0];
        float rest[2][4] = {};
        FragB<E> du[2];
        load_b_transposed(du, state.du + at.col, L::ld, at.lane);
        {
            FragA<E> a;
            kept(a, slot.a_transposed, at.lane);
            mma(rest[0], a, du[0]);
            mma(rest[1], a, du[1]);
        }
        // h of z, u = g residual
        float hh[2][4], uu[2][4], r[2], mean_u[2], mean_uh[2], c[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            r[half] = state.r[at.g + 8 * half];
            mean_u[half] = state.mean_u[at.g + 8 * half];
            mean_uh[half] = state.mean_uh[at.g + 8 * half];
            c[half] = slot.c[at.g + 8 * half];
        }
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
            const float4 x = state.h[at.warp][nt][at.lane], y = slot.goal[at.warp][nt][at.lane];
            hh[nt][0] = x.x, hh[nt][1] = x.y, hh[nt][2] = x.z, hh[nt][3] = x.w;
            const float goal[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int e = 0; e < 4; ++e)
                uu[nt][e] = gg[nt][e & 1] * hh[nt][e] - norm.g[nt][e & 1] * goal[e];
        }
        copy_state<L>(to.dw, dw, at);
        if (!by_key) {
            float along = 0;
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 x = floats(
                        pair_at(slot.p + (at.g + 8 * half) * L::ld + at.col + 8 * nt + 2 * at.t));
                    along += x.x * d[nt][2 * half] + x.y * d[nt][2 * half + 1];
                }
            (is_short && n < M ? da_short : da_last) += along * (is_short ? by_short : by);
        }
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                d[nt][e] = learns ? d[nt][e] + rest[nt][e] : rest[nt][e];
        // r (u - mean(u) - h mean(u h)) is G before the clip
        float minus[2] = {-mean_u[0] * r[0], -mean_u[1] * r[1]},
              minus_h[2] = {-mean_uh[0] * r[0], -mean_uh[1] * r[1]};
        const auto raw = [&](int nt, int e) {
            const int half = e >> 1;
            return r[half] * uu[nt][e] + (hh[nt][e] * minus_h[half] + minus[half]);
        };
        float factor = 1, inward = 0;
        if (clips) {
            float s[8] = {};
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (at.g + 8 * (e >> 1) < n) {
                        const float x = raw(nt, e);
                        s[0] += x * x;
                        s[1] += c[e >> 1] * d[nt][e] * x;
                    }
            block_sums<L>(s, shared.chain_sums, at, sync);
            const float length = s[0] * quick_inverse_root(s[0] + 1e-30f);
            factor = fminf(1.0f, quotient(p.max_norm, length + 1e-6f));
            if (factor < 1)
                inward = quotient(s[1] * factor, (length + 1e-6f) * length);
        }
        float sum[2][8] = {};
        const float by_c[2] = {factor * c[0] * r[0], factor * c[1] * r[1]};
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int half = e >> 1;
                const float x = raw(nt, e);
                sum[half][5] += x * d[nt][e];
                float er = by_c[half] * d[nt][e];
                if (clips)
                    er = at.g + 8 * half < n ? er - inward * x * r[half] : 0.0f;
                d[nt][e] = er;
                const float gg_er = gg[nt][e & 1] * er;
                sum[half][0] += er;
                sum[half][1] += er * hh[nt][e];
                sum[half][2] += gg_er;
                sum[half][3] += gg_er * hh[nt][e];
                sum[half][4] += er * uu[nt][e];
            }
        RowSums::put_quick<6>(parts, sum[0], sum[1], at);
        sync();
        float s[8], mean_e[2], mean_eh[2], mean_dh[2], along_h[2];
        RowSums::get(s, parts, L::warps, at);
        {
            const float own_u = state.mean_u[own], own_uh = state.mean_uh[own],
                        own_ggh = state.ggh[own], own_gghh = state.gghh[own];
            const float own_e = s[0] * (1.0f / D), own_eh = s[1] * (1.0f / D);
            const float own_dh = s[2] * (1.0f / D) - own_e * mean_gg - own_eh * own_ggh -
                                 own_e * own_uh - own_u * own_eh;
            const float own_along = s[3] * (1.0f / D) - own_e * own_ggh - own_eh * own_gghh -
                                    2 * own_eh * own_uh + s[4] * (1.0f / D) - own_e * own_u -
                                    own_eh * own_uh;
            RowSums::spread(mean_e, own_e, at);
            RowSums::spread(mean_eh, own_eh, at);
            RowSums::spread(mean_dh, own_dh, at);
            RowSums::spread(along_h, own_along, at);
        }
        if (at.warp == 0 && at.t < 2)
            to.dc[own] = factor * s[5];
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
            float dx[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = at.g + 8 * half, dim = at.col + 8 * nt + 2 * at.t;
                float dz[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int i = 2 * half + e;
                    const float hx = hh[nt][i], er = d[nt][i];
                    const float x = er - mean_e[half] - hx * mean_eh[half];
                    const float dh = gg[nt][e] * x - er * mean_uh[half] - uu[nt][i] * mean_eh[half];
                    dz[e] = r[half] * (dh - mean_dh[half] - hx * along_h[half]);
                    if (weight[1] != 0 && row == n - 1)
                        dz[e] += weight[1] * raw(nt, i);
                    dx[i] = x;
                }
                store_pair(to.dz + row * L::ld + dim, dz[0], dz[1]);
            }
            to.dx[at.warp][nt][at.lane] = {dx[0], dx[1], dx[2], dx[3]};
        }
        sync_warp();
        arrive_warp(shared.chain_full + step % reverse_chain_slots, at.lane);
        add_outer<L>(dw, slot.k, to.dz, at);
        add_outer<L>(dw, slot.q, a_of(du), at);
        sync_warp();
        arrive_warp(shared.state_empty + step % reverse_state_slots, at.lane);
        arrive_warp(shared.empty + step % reverse_slots, at.lane);
    };
    one_step(std::true_type(), 0);
    for (int step = 1; step < p.batches; ++step)
        one_step(std::false_type(), step);
    sync_block();         // all of dq, dk, dv; the sums of the other roles
    if (weight[0] != 0) { // the error under the initial state, whose copy is there
        const E *copy = shared.states[(p.batches - 1) % reverse_state_slots].w;
        float *out = shared.states[(p.batches - 1) % reverse_state_slots].probe;
        for (int batch = 0; batch < p.batches; ++batch) {
            const int64_t row = offset + int64_t(min((batch + 1) * M, p.tokens) - 1) * width;
            float *goal = shared.chain_parts;
            if (at.thread < D)
                goal[at.thread] = to_float(static_cast<const E *>(p.v)[row + at.thread]) -
                                  to_float(static_cast<const E *>(p.k)[row + at.thread]) -
                                  p.b[h * D + at.thread];
            sync();
            probe<L>(
                p, out, shared.norm_sums, shared.chain_sums, copy,
                static_cast<const E *>(p.k) + row, [&](int i) { return goal[i]; }, h, weight[0], at,
                sync);
            each_element<L>(dw, at, [&](float &x, int in, int o) {
                if (in <= D)
                    x += out[in] * out[D + 4 + o];
            });
            if (at.thread < D) {
                const float dtarget = out[2 * D + 4 + at.thread];
                const float *rest = last_rows_at(batch) + at.thread;
                store(static_cast<E *>(p.dk) + row + at.thread,
                      rest[0] + out[3 * D + 4 + at.thread] - dtarget);
                store(static_cast<E *>(p.dv) + row + at.thread, rest[D] + dtarget);
            }
            sync();
        }
    }
    each_element<L>(dw, at, [&](float &x, int in, int out) {
        if (in < D)
            p.dw[(int64_t(head) * D + in) * D + out] = x;
        else if (in == D)
            p.db1[int64_t(head) * D + out] = x;
    });
    float *part = p.part + int64_t(head) * (2 * D + M);
    sync();
    if (at.thread < 2 * D)
        part[at.thread] = shared.norm_sums[at.thread] + shared.norms_of_inputs[at.thread];
    float last[8] = {da_last, da_short};
    block_sums<L>(last, shared.chain_sums, at, sync);
    if (p.by_key) {
        if (at.thread < M)
            part[2 * D + at.thread] = shared.token_sums[at.thread];
    } else if (at.thread < M) {
        float x = at.thread == M - 1 ? last[0] : 0.0f;
        if (at.thread == short_n - 1 && short_n < M)
            x += last[1];
        for (int i = 0; i < L::warps; ++i)
            x += shared.rates_parts[i * M + at.thread];
        part[2 * D + at.thread] = p.scale * x;
    }
    sync_block();
}

} // namespace ponder::cuda
