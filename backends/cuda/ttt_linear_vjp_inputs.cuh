// The inputs' gradients in the reverse with roles: dq, dk, dv, dlr, and the norm's.
#pragma once

#include "ttt_linear_vjp_roles.cuh"

namespace ponder::cuda {

template <class L>
__device__ __forceinline__ void ReverseRoles<L>::put_rows(E *to, const float (&x)[2][4], int n,
                                                          const Place &at) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint2 four = quad_of(pack_bf16(x[0][2 * half], x[0][2 * half + 1]),
                                   pack_bf16(x[1][2 * half], x[1][2 * half + 1]), at);
        if (at.g + 8 * half < n)
            *reinterpret_cast<uint2 *>(to + int64_t(8 * half) * width) = four;
    }
}

template <class L> __device__ __forceinline__ void ReverseRoles<L>::inputs(const Place &at) const {
    HeadNorm norm;
    norm.load(p, h * D + at.col + 2 * at.t);
    float dg[2][2] = {}, db[2][2] = {}, dtoken = 0;
    const bool with_losses = weight[0] != 0 || weight[1] != 0 || weight[2] != 0,
               always = shared.rates.learns(false) != 0;
    float by[2][4]; // a_i / f where query i sees key j
    const auto set_rates = [&](bool is_short) {
#pragma unroll
        for (int jj = 0; jj < 2; ++jj)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = at.g + 8 * (e >> 1), column = 8 * jj + 2 * at.t + (e & 1);
                by[jj][e] = column <= row + p.causal_k ? shared.rates.a(is_short, row) : 0.0f;
            }
    };
    const auto one_step = [&](auto is_first, int step) {
        constexpr bool is_short = decltype(is_first)::value;
        const int n = is_short ? short_n : M, batch = batch_of(step);
        const ReverseSlot<L> &slot = shared.slots[step % reverse_slots];
        const ReverseState<L> &state = shared.states[step % reverse_state_slots];
        const ReverseChain<L> &chain = shared.chains[step % reverse_chain_slots];
        // where the state is, the warps ahead have been
        wait_for_phase(shared.state_full + step % reverse_state_slots,
                       step / reverse_state_slots & 1);
        const int64_t at_row =
            offset + int64_t(batch * M + at.g) * width + at.col + quad_column(at);
        FragA<E> a; // du_i P_j a_i / f
        FragB<E> b[2], w[L::kt][2];
#pragma unroll
        for (int k = 0; k < L::kt; ++k)
            load_b_transposed(w[k], state.w + 16 * k * L::ld + at.col, L::ld, at.lane);
        { // dq
            float c[2][4] = {}, dq[2][4];
            row_products<L>(c, state.du, slot.p, at.lane);
#pragma unroll
            for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    c[jj][e] *= by[jj][e];
            a_of(a, c[0], c[1]);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 dy = floats(
                        pair_at(slot.dy + (at.g + 8 * half) * L::ld + at.col + 8 * nt + 2 * at.t));
                    dq[nt][2 * half] = dy.x;
                    dq[nt][2 * half + 1] = dy.y;
                }
            add_products<L>(dq, state.du, w, at);
            load_b_transposed(b, slot.k + at.col, L::ld, at.lane);
            mma(dq[0], a, b[0]);
            mma(dq[1], a, b[1]);
            put_rows(static_cast<E *>(p.dq) + at_row, dq, n, at);
        }
        float dk[2][4];
        a = turned(a);
        wait_for_phase(shared.chain_full + step % reverse_chain_slots,
                       step / reverse_chain_slots & 1);
        // dtarget = -g dx, and what the losses add; g and b
        float dv[2][4];
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
            const float4 x4 = chain.dx[at.warp][nt][at.lane], h4 = state.h[at.warp][nt][at.lane],
                         goal4 = slot.goal[at.warp][nt][at.lane];
            const float x[4] = {x4.x, x4.y, x4.z, x4.w}, hh[4] = {h4.x, h4.y, h4.z, h4.w},
                        goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float g = norm.g[nt][i & 1], gh = g * hh[i], residual = gh - goal[i];
                dv[nt][i] = -g * x[i];
                dg[nt][i & 1] += x[i] * (residual + gh);
                db[nt][i & 1] += g * x[i];
                dk[nt][i] = g * x[i];
            }
        }
        if (with_losses) {
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                const float4 h4 = state.h[at.warp][nt][at.lane],
                             goal4 = slot.goal[at.warp][nt][at.lane];
                const float hh[4] = {h4.x, h4.y, h4.z, h4.w},
                            goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (at.g + 8 * (i >> 1) == n - 1) {
                        const int dim = at.col + 8 * nt + 2 * at.t + (i & 1);
                        const float residual = weight[1] * (norm.g[nt][i & 1] * hh[i] - goal[i]);
                        dg[nt][i & 1] += residual * hh[i];
                        db[nt][i & 1] += residual;
                        dv[nt][i] -= residual;
                        dk[nt][i] += residual;
                        if (weight[2] != 0) {
                            dv[nt][i] += state.probe[2 * D + 4 + dim];
                            dk[nt][i] +=
                                state.probe[3 * D + 4 + dim] - state.probe[2 * D + 4 + dim];
                        }
                        last_rows_at(batch)[D + dim] = dv[nt][i];
                    }
            }
        }
        put_rows(static_cast<E *>(p.dv) + at_row, dv, n, at);
        if (at.warp == 0 && at.lane < M && at.lane < n) {
            const float dc = -shared.rates.f(is_short) * chain.dc[at.lane];
            const int64_t i = rate_offset + int64_t(batch * M + at.lane) * p.heads;
            if (p.rate_bf16)
                store(static_cast<Bf16 *>(p.dlr) + i, dc * shared.rates.c(at.lane));
            else
                static_cast<float *>(p.dlr)[i] = dc * shared.rates.c(at.lane);
            dtoken += p.scale * slot.lr[at.lane] * dc;
        }
        load_b_transposed(b, slot.q + at.col, L::ld, at.lane);
        mma(dk[0], a, b[0]);
        mma(dk[1], a, b[1]);
        if (is_short ? shared.rates.learns(true) != 0 : always)
            add_products<L>(dk, slot.p, chain.dw, at);
        add_products<L>(dk, chain.dz, w, at);
        put_rows(static_cast<E *>(p.dk) + at_row, dk, n, at);
        if (weight[0] != 0)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (at.g + 8 * half == n - 1)
#pragma unroll
                    for (int nt = 0; nt < 2; ++nt)
                        store_pair(last_rows_at(batch) + at.col + 8 * nt + 2 * at.t,
                                   dk[nt][2 * half], dk[nt][2 * half + 1]);
        sync_warp();
        arrive_warp(shared.chain_empty + step % reverse_chain_slots, at.lane);
        arrive_warp(shared.state_empty + step % reverse_state_slots, at.lane);
        arrive_warp(shared.empty + step % reverse_slots, at.lane);
    };
    set_rates(true);
    one_step(std::true_type(), 0);
    set_rates(false);
    for (int step = 1; step < p.batches; ++step)
        one_step(std::false_type(), step);
    put_norms(shared.norms_of_inputs, dg, db, nullptr, at);
    if (at.warp == 0 && at.lane < M)
        shared.token_sums[at.lane] = dtoken;
    sync_block();
    sync_block();
}

} // namespace ponder::cuda
