// The reverse of TTT-Linear for mini-batches of 16, its warps in roles as in ttt_linear_roles.cuh
// and with the equations of ttt_linear_vjp.cu. Each of the last three has D / 16 warps:
//
//   ahead:  four warps: fetch k, v, q, dy, P; what depends on no state
//   states: W backwards, Z, U and their norms, du: depends on the trace alone, so it runs ahead
//   chain:  dP, dG, dz, dW: what one mini-batch has to wait for the other with, and nothing else
//   inputs: dq, dk, dv, dlr and the norm's gradients, from copies of W and dW; follows
//
// Order: whoever waits does so with all lanes. Chain and inputs wait for the states only, which
// have waited for the warps ahead.
#pragma once

#include "ttt_linear_roles.cuh"
#include "ttt_linear_vjp.cuh"

#include <type_traits>

namespace ponder::cuda {

constexpr int reverse_slots = 8, reverse_state_slots = 3, reverse_chain_slots = 2;

// Of one mini-batch: from the warps ahead,
template <class L> struct ReverseSlot {
    typename L::E k[L::tile], q[L::tile], dy[L::tile], p[L::tile];
    union {
        float4 goal[L::warps][2][32]; // target - b, as results lie
        typename L::E v[L::tile];     // what it is made of
    };
    uint4 a[sizeof(typename L::E) / 2][2][32];            // (q_i k_j + 1), queries by keys
    uint4 a_transposed[sizeof(typename L::E) / 2][2][32]; // times a_i / f, keys by queries
    float goal_sum[16], c[16], lr[16];                    // sum of g goal; -f c_j
    float last_goal[L::D];
};
// from the states,
template <class L> struct ReverseState {
    typename L::E du[L::tile], w[L::D * L::ld];
    float4 h[L::warps][2][32];
    float r[16], mean_u[16], mean_uh[16], ggh[16], gghh[16];
    float probe[4 * L::D + 4]; // of the loss after the step
};
// from the chain.
template <class L> struct ReverseChain {
    typename L::E dz[L::tile], dw[L::D * L::ld];
    float4 dx[L::warps][2][32]; // of the gradient at u = g (g h - goal)
    float dc[16];               // of c_j, without the factor -f
};

template <class L> struct ReverseRolesShared {
    using E = typename L::E;
    ReverseSlot<L> *slots;
    ReverseState<L> *states;
    ReverseChain<L> *chains;
    float *state_parts, *chain_parts, *state_sums, *chain_sums, *norms, *rates_parts, *norm_sums;
    float *norms_of_inputs, *token_sums;
    Arrivals *full, *empty, *state_full, *state_empty, *chain_full, *chain_empty;
    Rates<16> rates;
    int size;
    __host__ __device__ explicit ReverseRolesShared(unsigned char *base) {
        SharedLayout s(base);
        slots = s.take<ReverseSlot<L>>(reverse_slots);
        states = s.take<ReverseState<L>>(reverse_state_slots);
        chains = s.take<ReverseChain<L>>(reverse_chain_slots);
        state_parts = s.take<float>(2 * L::warps * 128);
        chain_parts = s.take<float>(2 * L::warps * 128);
        state_sums = s.take<float>(8 * L::warps);
        chain_sums = s.take<float>(8 * L::warps);
        norms = s.take<float>(2 * L::D);
        rates_parts = s.take<float>(L::warps * 16);
        norm_sums = s.take<float>(2 * L::D);
        norms_of_inputs = s.take<float>(2 * L::D);
        token_sums = s.take<float>(16);
        full = s.take<Arrivals>(reverse_slots);
        empty = s.take<Arrivals>(reverse_slots);
        state_full = s.take<Arrivals>(reverse_state_slots);
        state_empty = s.take<Arrivals>(reverse_state_slots);
        chain_full = s.take<Arrivals>(reverse_chain_slots);
        chain_empty = s.take<Arrivals>(reverse_chain_slots);
        rates = {s.take<float>(3 * 16 + 4)};
        size = s.size();
    }
};

template <class L> __host__ __device__ constexpr int reverse_roles_threads() {
    return 32 * (3 * L::warps + roles_ahead);
}

template <class L> class ReverseRoles {
    using E = typename L::E;
    static constexpr int D = L::D, M = 16;
    static_assert(L::M == 16);

public:
    __device__ ReverseRoles(const LinearParams &p)
        : p(p), shared(kept_shared_memory()), head(int(blockIdx.x)), stream(head / p.heads),
          h(head % p.heads), width(p.heads * D), offset(int64_t(stream) * p.tokens * width + h * D),
          rate_offset(int64_t(stream) * p.tokens * p.heads + h),
          short_n(p.tokens - (p.batches - 1) * M) {}

    __device__ void run() {
        Place at;
        at.warp = uniform(at.warp);
        if (at.thread == 0) {
            for (int i = 0; i < reverse_slots; ++i) {
                expect_warps(shared.full + i, 1);
                expect_warps(shared.empty + i, 3 * L::warps);
            }
            for (int i = 0; i < reverse_state_slots; ++i) {
                expect_warps(shared.state_full + i, L::warps);
                expect_warps(shared.state_empty + i, 2 * L::warps);
            }
            for (int i = 0; i < reverse_chain_slots; ++i) {
                expect_warps(shared.chain_full + i, L::warps);
                expect_warps(shared.chain_empty + i, L::warps);
            }
        }
        shared.rates.fill(p, at.thread, short_n);
        if (at.thread < 2 * D)
            shared.norms[at.thread] = 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const float x = p.dloss ? p.dloss[stream * 3 + i] * 2 /
                                          (float(D) * float(p.heads) * float(p.batches))
                                    : 0.0f;
            weight[i] = from_lane(x, 0); // so that all lanes are known to agree
        }

        const int role = at.warp / L::warps; // chain, states, inputs, ahead
        if (role < 3) {
            at.warp -= role * L::warps;
            at.thread -= role * L::threads;
        } else
            at.warp -= 3 * L::warps;
        at.col = 16 * at.warp;
        sync_block();
        if (role == 0)
            chain(at);
        else if (role == 1)
            states(at);
        else if (role == 2)
            inputs(at);
        else
            ahead(at);
    }

private:
    __device__ __forceinline__ int batch_of(int step) const { return p.batches - 1 - step; }
    __device__ __forceinline__ float *last_rows_at(int batch) const {
        return p.last_rows + (int64_t(head) * p.batches + batch) * 2 * D;
    }
    __device__ __forceinline__ int tokens_of(int step) const { return step == 0 ? short_n : M; }
    __device__ __forceinline__ void leave(Arrivals *a, const Place &at) const {
        sync_warp();
        arrive_warp(a, at.lane);
    }

    __device__ __forceinline__ void ahead(const Place &at) const {
        constexpr int per = 16 / int(sizeof(E)), chunks = D / per;
        const int row_0 = at.lane / chunks, c_0 = at.lane % chunks * per;
        uint32_t rate_ahead = 0; // bits as they come, so that nothing waits for them yet
        const auto fetch_step = [&](int step) {
            if (step < p.batches) {
                ReverseSlot<L> &slot = shared.slots[step % reverse_slots];
                if (step >= reverse_slots)
                    wait_for_phase(shared.empty + step % reverse_slots,
                                   (step / reverse_slots - 1) & 1);
                const int batch = batch_of(step);
#pragma unroll
                for (int i = 0; i < 16 * chunks / 32; ++i) {
                    const int row = row_0 + i * (32 / chunks), token = batch * M + row;
                    const bool valid = token < p.tokens;
                    const int64_t from = offset + int64_t(valid ? token : 0) * width + c_0;
                    const int to = row * L::ld + c_0;
                    copy_async(slot.k + to, static_cast<const E *>(p.k) + from, valid);
                    copy_async(slot.v + to, static_cast<const E *>(p.v) + from, valid);
                    copy_async(slot.q + to, static_cast<const E *>(p.q) + from, valid);
                    copy_async(slot.dy + to, static_cast<const E *>(p.dy ? p.dy : p.q) + from,
                               valid && p.dy);
                    copy_async(slot.p + to,
                               static_cast<const E *>(p.trace_p) +
                                   (int64_t(head) * p.tokens + (valid ? token : 0)) * D + c_0,
                               valid);
                }
                const int token = batch * M + at.lane;
                const int64_t i = rate_offset + int64_t(token) * p.heads;
                rate_ahead = 0;
                if (at.lane < M && token < p.tokens)
                    rate_ahead = p.rate_bf16 ? static_cast<const uint16_t *>(p.lr)[i]
                                             : static_cast<const uint32_t *>(p.lr)[i];
            }
            commit_copies();
        };
        fetch_step(at.warp);
        for (int step = at.warp; step < p.batches; step += roles_ahead) {
            const bool is_short = step == 0;
            const int n = tokens_of(step);
            const float rate = float_of_bits(p.rate_bf16 ? rate_ahead << 16 : rate_ahead);
            fetch_step(step + roles_ahead);
            wait_for_copies<1>();
            sync_warp();
            ReverseSlot<L> &slot = shared.slots[step % reverse_slots];
            FragB<E> keys[L::kt][2], v[L::kt][2]; // which lie as results do, too
#pragma unroll
            for (int k = 0; k < L::kt; ++k) {
                load_b(keys[k], slot.k + 16 * k, L::ld, at.lane);
                load_b(v[k], slot.v + 16 * k, L::ld, at.lane);
            }
            {
                float c[2][4] = {};
                FragA<E> a;
#pragma unroll
                for (int k = 0; k < L::kt; ++k) {
                    load_a(a, slot.q + 16 * k, L::ld, at.lane);
                    mma(c[0], a, keys[k][0]);
                    mma(c[1], a, keys[k][1]);
                }
#pragma unroll
                for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = at.g + 8 * (e >> 1), key = 8 * jj + 2 * at.t + (e & 1);
                        c[jj][e] = key <= row + p.causal_k ? c[jj][e] + 1 : 0.0f;
                    }
                a_of(a, c[0], c[1]);
                keep(slot.a, a, at.lane);
#pragma unroll
                for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        c[jj][e] *= shared.rates.a(is_short, at.g + 8 * (e >> 1));
                a_of(a, c[0], c[1]);
                keep(slot.a_transposed, turned(a), at.lane);
            }
            sync_warp(); // the goals go where v is
            float sum[2] = {0, 0};
#pragma unroll
            for (int w = 0; w < L::warps; ++w)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    float x[4];
                    const int dim = 16 * w + 8 * nt + 2 * at.t;
                    const float2 g = *reinterpret_cast<const float2 *>(p.g + h * D + dim),
                                 b = *reinterpret_cast<const float2 *>(p.b + h * D + dim);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 vv = floats(Pair<E>{v[w][half].x[nt]}),
                                     kk = floats(Pair<E>{keys[w][half].x[nt]});
                        const float goal[2] = {vv.x - kk.x - b.x, vv.y - kk.y - b.y};
                        if (at.g + 8 * half == n - 1)
                            *reinterpret_cast<float2 *>(slot.last_goal + dim) = {goal[0], goal[1]};
                        x[2 * half] = goal[0];
                        x[2 * half + 1] = goal[1];
                        sum[half] += g.x * goal[0] + g.y * goal[1];
                    }
                    slot.goal[w][nt][at.lane] = {x[0], x[1], x[2], x[3]};
                }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[half] += from_lane_xor(sum[half], 1);
                sum[half] += from_lane_xor(sum[half], 2);
                if (at.t == 0)
                    slot.goal_sum[at.g + 8 * half] = sum[half];
            }
            if (at.lane < M) {
                slot.c[at.lane] = -shared.rates.f(is_short) * shared.rates.c(at.lane) * rate;
                slot.lr[at.lane] = rate;
            }
            leave(shared.full + step % reverse_slots, at);
        }
        // as the other roles, at the end
        sync_block();
        sync_block();
    }

    __device__ __forceinline__ void states(const Place &at) const {
        const float *kept_states =
            p.trace_w + int64_t(head) * trace_states(p.batches) * L::state_size;
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
                    store_pair(to.du + (at.g + 8 * half) * L::ld + at.col + 8 * nt + 2 * at.t,
                               du[0], du[1]);
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

    // A warp's sums over tokens, its dims, and what is there besides.
    __device__ __forceinline__ void put_norms(float *to, const float (&dg)[2][2],
                                              const float (&db)[2][2], const float *besides,
                                              const Place &at) const {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float x = dg[nt][e], y = db[nt][e];
#pragma unroll
                for (int l = 4; l < 32; l *= 2) {
                    x += from_lane_xor(x, l);
                    y += from_lane_xor(y, l);
                }
                const int dim = at.col + 8 * nt + 2 * at.t + e;
                if (at.g == 0) {
                    to[dim] = x + (besides ? besides[dim] : 0.0f);
                    to[D + dim] = y + (besides ? besides[D + dim] : 0.0f);
                }
            }
    }

    __device__ __forceinline__ void chain(const Place &at) const {
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
        const bool always = shared.rates.learns(false) != 0, by_key = p.by_key,
                   clips = p.max_norm > 0;
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
                        const float2 x = floats(pair_at(slot.p + (at.g + 8 * half) * L::ld +
                                                        at.col + 8 * nt + 2 * at.t));
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
                        const float dh =
                            gg[nt][e] * x - er * mean_uh[half] - uu[nt][i] * mean_eh[half];
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
                    static_cast<const E *>(p.k) + row, [&](int i) { return goal[i]; }, h, weight[0],
                    at, sync);
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

    __device__ __forceinline__ void inputs(const Place &at) const {
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
                        const float2 dy = floats(pair_at(slot.dy + (at.g + 8 * half) * L::ld +
                                                         at.col + 8 * nt + 2 * at.t));
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
                const float4 x4 = chain.dx[at.warp][nt][at.lane],
                             h4 = state.h[at.warp][nt][at.lane],
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
                            const float residual =
                                weight[1] * (norm.g[nt][i & 1] * hh[i] - goal[i]);
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
    __device__ __forceinline__ void put_rows(E *to, const float (&x)[2][4], int n,
                                             const Place &at) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint2 four = quad_of(pack_bf16(x[0][2 * half], x[0][2 * half + 1]),
                                       pack_bf16(x[1][2 * half], x[1][2 * half + 1]), at);
            if (at.g + 8 * half < n)
                *reinterpret_cast<uint2 *>(to + int64_t(8 * half) * width) = four;
        }
    }

    const LinearParams &p;
    const ReverseRolesShared<L> shared;
    const int head, stream, h, width;
    const int64_t offset, rate_offset;
    const int short_n;
    float weight[3]; // of the losses, as factors of |LN(z) - target|^2 / 2
};

template <class L>
__global__ void __launch_bounds__(reverse_roles_threads<L>(), 1)
    linear_reverse_roles(const __grid_constant__ LinearParams p) {
    ReverseRoles<L>(p).run();
}

} // namespace ponder::cuda
