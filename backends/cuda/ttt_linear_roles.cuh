// The scan of TTT-Linear for mini-batches of 16, where the chain from one step to the next is what
// takes the time. The warps of a block have three roles:
//
//   ahead:  four warps, each with every fourth mini-batch: fetches q, k, v, and from them all that
//           depends on no state: A, g goal, its sums, the factors -f c_j
//   chain:  D / 16 warps: Z = K W + b, its norm's sums, P, W += K^T P. Nothing else.
//   output: D / 16 warps with a copy of the state that follows P: U, y
//   losses: one warp: the error after each step, as that of z_last + sum_j (k_last k_j + 1) P_j
//
// They meet at barriers of slots in shared memory; the chain waits for no one but itself as long as
// the others keep up. Notation as in ttt_linear.cuh.
#pragma once

#include "ttt_linear_loss.cuh"

namespace ponder::cuda {

constexpr int roles_ahead = 4, roles_slots = 8, roles_p_slots = 4;

// A warp arrives by one lane, after it has met the others at a barrier of the warp: PTX's causality
// order is transitive, so theirs is what they did before. compute-sanitizer's racecheck takes an
// arrival to speak for its own lane; for it all of them can arrive.
#ifndef PONDER_ARRIVING_LANES
#define PONDER_ARRIVING_LANES 1
#endif
constexpr int arriving_lanes = PONDER_ARRIVING_LANES;
__device__ __forceinline__ void expect_warps(Arrivals *a, int warps) {
    set_arrivals(a, unsigned(arriving_lanes * warps));
}
__device__ __forceinline__ void arrive_warp(Arrivals *a, int lane) {
    if (lane < arriving_lanes)
        arrive(a);
}

// What the warps ahead leave of a mini-batch.
template <class L> struct RolesSlot {
    typename L::E k[L::tile], q[L::tile];
    float4 goal[L::warps][2][32];              // g goal as results lie: n 0 to 7, 8 to 15
    uint4 a[sizeof(typename L::E) / 2][2][32]; // A as a factor (f32: high, low)
    float goal_sum[16], c[16];                 // of g goal; -f c_j
    float last_goal[L::D];                     // of the last token, without g
    float last_keys[16];                       // k_last k_j + 1
};

template <class L, bool output> struct RolesShared {
    using E = typename L::E;
    RolesSlot<L> *slots;
    E *v, *p; // v: two tiles for each warp ahead
    float *parts, *u_parts, *z_last, *mean, *block;
    Arrivals *full, *empty, *p_full, *p_empty;
    Rates<16> rates;
    int size;
    __host__ __device__ constexpr explicit RolesShared(unsigned char *base) {
        SharedLayout s(base);
        slots = s.take<RolesSlot<L>>(roles_slots);
        v = s.take<E>(2 * roles_ahead * L::tile);
        p = s.take<E>(roles_p_slots * L::tile);
        parts = s.take<float>(2 * L::warps * 64);
        u_parts = s.take<float>(2 * 16 * L::warps);
        z_last = s.take<float>(roles_p_slots * L::D);
        mean = s.take<float>((L::warps + 1) * (L::D + 8));
        block = s.take<float>(16);
        full = s.take<Arrivals>(roles_slots);
        empty = s.take<Arrivals>(roles_slots);
        p_full = s.take<Arrivals>(L::warps * roles_p_slots);
        p_empty = s.take<Arrivals>(L::warps * roles_p_slots);
        rates = {s.take<float>(3 * 16 + 4)};
        size = s.size();
    }
};

template <class L, bool output> __host__ __device__ constexpr int roles_threads() {
    return 32 * ((output ? 2 : 1) * L::warps + roles_ahead + (output ? 1 : 0));
}

__device__ __forceinline__ void keep(uint4 (*to)[2][32], const FragA<Bf16> &a, int lane) {
    to[0][0][lane] = {a.x[0], a.x[1], a.x[2], a.x[3]};
}
__device__ __forceinline__ void keep(uint4 (*to)[2][32], const FragA<float> &a, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        to[0][i][lane] = {a.high[4 * i], a.high[4 * i + 1], a.high[4 * i + 2], a.high[4 * i + 3]};
        to[1][i][lane] = {a.low[4 * i], a.low[4 * i + 1], a.low[4 * i + 2], a.low[4 * i + 3]};
    }
}
__device__ __forceinline__ void kept(FragA<Bf16> &a, const uint4 (*from)[2][32], int lane) {
    const uint4 x = from[0][0][lane];
    a.x[0] = x.x, a.x[1] = x.y, a.x[2] = x.z, a.x[3] = x.w;
}
__device__ __forceinline__ void kept(FragA<float> &a, const uint4 (*from)[2][32], int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint4 x = from[0][i][lane], y = from[1][i][lane];
        a.high[4 * i] = x.x, a.high[4 * i + 1] = x.y, a.high[4 * i + 2] = x.z,
                   a.high[4 * i + 3] = x.w;
        a.low[4 * i] = y.x, a.low[4 * i + 1] = y.y, a.low[4 * i + 2] = y.z, a.low[4 * i + 3] = y.w;
    }
}

template <class L, bool output> class Roles {
    using E = typename L::E;
    static constexpr int D = L::D, M = 16;
    static_assert(L::M == 16);

public:
    __device__ Roles(const LinearParams &p)
        : p(p), shared(shared_memory()), head(int(blockIdx.x)), stream(head / p.heads),
          width(p.heads * D), offset(int64_t(stream) * p.tokens * width + head % p.heads * D),
          short_n(p.tokens - (p.batches - 1) * M) {}

    __device__ void run() {
        Place at; // of this warp in its role
        for (int i = at.thread; i < roles_slots; i += roles_threads<L, output>()) {
            expect_warps(shared.full + i, 1);
            expect_warps(shared.empty + i, (output ? 2 : 1) * L::warps + (losses() ? 1 : 0));
        }
        for (int i = at.thread; i < L::warps * roles_p_slots; i += roles_threads<L, output>()) {
            expect_warps(shared.p_full + i, 1);
            expect_warps(shared.p_empty + i, losses() ? 2 : 1);
        }
        shared.rates.fill(p, at.thread, short_n);
        typename L::State w;
        const int role = at.warp < L::warps                     ? 0
                         : at.warp < roles_ahead + L::warps     ? 1
                         : at.warp < roles_ahead + 2 * L::warps ? 2
                                                                : 3;
        at.warp -= role == 0   ? 0
                   : role == 1 ? L::warps
                   : role == 2 ? L::warps + roles_ahead
                               : 2 * L::warps + roles_ahead;
        at.col = 16 * at.warp;
        float *parts = shared.mean + D + 8; // [warps][D + 8]
        if (role == 0 || role == 2) {
            read_state<L>(w, p.w1 + int64_t(head) * D * D, p.b1 + int64_t(head) * D, at);
            if (role == 0)
#pragma unroll
                for (int j = 0; j < 2 * L::kt + 1; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float x = w[j][e] + w[j][e + 2];
                        x += from_lane_xor(x, 4);
                        x += from_lane_xor(x, 8);
                        x += from_lane_xor(x, 16);
                        if (at.g == 0)
                            parts[at.warp * (D + 8) + 8 * j + 2 * at.t + e] = x;
                    }
        }
        sync_block();
        for (int c = at.thread; c < D + 8; c += roles_threads<L, output>()) {
            float x = 0;
            for (int i = 0; i < L::warps; ++i)
                x += parts[i * (D + 8) + c];
            shared.mean[c] = x / float(D);
        }
        sync_block();
        if (role == 0 || role == 2)
            each_element<L>(w, at, [&](float &x, int in, int) { x -= shared.mean[in]; });
        float loss = 0;
        if (role == 0)
            loss = chain(w, at);
        else if (role == 1)
            loss = ahead(at);
        else if (role == 2)
            outputs(w, at);
        else if (losses())
            loss = errors_after(at);
        if (losses())
            finish(loss, role, at);
    }

private:
    __device__ __forceinline__ bool losses() const { return output && p.loss; }

    // Returns this lane's part of the error before each step that depends on no state.
    __device__ __forceinline__ float ahead(const Place &at) {
        float g[L::warps][2][2], b[L::warps][2][2], error = 0;
#pragma unroll
        for (int w = 0; w < L::warps; ++w)
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int dim = head % p.heads * D + 16 * w + 8 * nt + 2 * at.t + e;
                    g[w][nt][e] = p.g[dim];
                    b[w][nt][e] = p.b[dim];
                }
        const int64_t rate_offset = int64_t(stream) * p.tokens * p.heads + head % p.heads;
        constexpr int per = 16 / int(sizeof(E)), chunks = D / per; // copies a row
        const int row_0 = at.lane / chunks, c_0 = at.lane % chunks * per;
        float rate_ahead = 0;
        const auto fetch = [&](int batch) {
            if (batch < p.batches) {
                RolesSlot<L> &slot = shared.slots[batch % roles_slots];
                if (batch >= roles_slots)
                    wait_for_phase(shared.empty + batch % roles_slots,
                                   (batch / roles_slots - 1) & 1);
                E *v = shared.v + (batch / roles_ahead % 2 * roles_ahead + at.warp) * L::tile;
#pragma unroll
                for (int i = 0; i < 16 * chunks / 32; ++i) {
                    const int row = row_0 + i * (32 / chunks), token = batch * M + row;
                    const bool valid = token < p.tokens;
                    const int64_t from = offset + int64_t(valid ? token : 0) * width + c_0;
                    const int to = row * L::ld + c_0;
                    copy_async(slot.k + to, static_cast<const E *>(p.k) + from, valid);
                    copy_async(v + to, static_cast<const E *>(p.v) + from, valid);
                    if (output)
                        copy_async(slot.q + to, static_cast<const E *>(p.q) + from, valid);
                }
                const int token = batch * M + at.lane;
                rate_ahead = at.lane < M && token < p.tokens
                                 ? rate_at(p, rate_offset + int64_t(token) * p.heads)
                                 : 0.0f;
            }
            commit_copies();
        };
        fetch(at.warp);
        for (int batch = at.warp; batch < p.batches; batch += roles_ahead) {
            const bool is_short = batch == p.batches - 1;
            const int n = is_short ? short_n : M;
            const float rate = rate_ahead;
            fetch(batch + roles_ahead);
            wait_for_copies<1>();
            sync_warp();
            RolesSlot<L> &slot = shared.slots[batch % roles_slots];
            const E *v = shared.v + (batch / roles_ahead % 2 * roles_ahead + at.warp) * L::tile;
            if (output) {
                float c[2][4] = {};
                row_products<L>(c, slot.q, slot.k, at.lane);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = at.g + 8 * half;
                    const float a = shared.rates.a(is_short, row);
#pragma unroll
                    for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float &x = c[jj][2 * half + e];
                            x = 8 * jj + 2 * at.t + e <= row + p.causal_k ? (x + 1) * a : 0.0f;
                        }
                }
                FragA<E> a;
                a_of(a, c[0], c[1]);
                keep(slot.a, a, at.lane);
            }
            if (losses()) {
                float c[2][4] = {};
#pragma unroll
                for (int k = 0; k < L::kt; ++k) {
                    FragA<E> a;
                    FragB<E> b[2];
                    load_a_row(a, slot.k + (n - 1) * L::ld + 16 * k, at.lane);
                    load_b(b, slot.k + 16 * k, L::ld, at.lane);
                    mma(c[0], a, b[0]);
                    mma(c[1], a, b[1]);
                }
                if (at.g == 0)
#pragma unroll
                    for (int jj = 0; jj < 2; ++jj)
                        *reinterpret_cast<float2 *>(slot.last_keys + 8 * jj +
                                                    2 * at.t) = {c[jj][0] + 1, c[jj][1] + 1};
            }
            float sum[2] = {0, 0};
#pragma unroll
            for (int w = 0; w < L::warps; ++w)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    float x[4];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int dim = 16 * w + 8 * nt + 2 * at.t,
                                  from = (at.g + 8 * half) * L::ld + dim;
                        const float2 vv = floats(pair_at(v + from)),
                                     kk = floats(pair_at(slot.k + from));
                        const float goal[2] = {vv.x - kk.x - b[w][nt][0],
                                               vv.y - kk.y - b[w][nt][1]};
                        if (output && at.g + 8 * half == n - 1)
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                slot.last_goal[dim + e] = goal[e];
                                error += goal[e] * goal[e];
                            }
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            x[2 * half + e] = g[w][nt][e] * goal[e];
                            sum[half] += x[2 * half + e];
                        }
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
            if (at.lane < M)
                slot.c[at.lane] = -shared.rates.f(is_short) * shared.rates.c(at.lane) * rate;
            sync_warp();
            arrive_warp(shared.full + batch % roles_slots, at.lane);
        }
        return error;
    }

    // Returns this lane's part of the rest of the error before each step.
    __device__ __forceinline__ float chain(typename L::State &w, const Place &at) {
        float gg[2][2], error = 0;
        {
            HeadNorm norm;
            norm.load(p, head % p.heads * D + at.col + 2 * at.t);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    gg[nt][e] = norm.g[nt][e] * norm.g[nt][e];
        }
        E *trace = static_cast<E *>(p.trace_p);
        if (trace)
            trace += (int64_t(head) * p.tokens + at.g) * D + at.col + 2 * at.t;
        const int own = at.g + 8 * (at.t & 1); // the token whose factors this lane works out
        for (int batch = 0; batch < p.batches; ++batch) {
            const bool is_short = batch == p.batches - 1;
            const int n = is_short ? short_n : M;
            RolesSlot<L> &slot = shared.slots[batch % roles_slots];
            float *parts = shared.parts + (batch & 1) * L::warps * 64;
            if (p.trace_w && batch % trace_every == 0)
                store_state<L>(p.trace_w +
                                   (int64_t(head) * trace_states(p.batches) + batch / trace_every) *
                                       L::state_size,
                               w, at.thread);
            wait_for_phase(shared.full + batch % roles_slots, batch / roles_slots & 1);
            typename L::Rows z_rows;
            {
                const E *const from[1] = {slot.k};
                typename L::Rows *const to[1] = {&z_rows};
                products<L, 1>(to, from, w, at);
            }
            float(&z)[2][4] = z_rows[0];
            float goal[2][4], ggz[2][4], low[4] = {}, high[4] = {};
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                const float4 x = slot.goal[at.warp][nt][at.lane];
                goal[nt][0] = x.x, goal[nt][1] = x.y, goal[nt][2] = x.z, goal[nt][3] = x.w;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float(&sum)[4] = e < 2 ? low : high;
                    ggz[nt][e] = gg[nt][e & 1] * z[nt][e];
                    sum[0] += z[nt][e] * z[nt][e];
                    sum[1] += ggz[nt][e];
                    sum[2] += ggz[nt][e] * z[nt][e];
                    sum[3] += goal[nt][e] * z[nt][e];
                }
            }
            const float goal_sum = slot.goal_sum[own], rate = slot.c[own];
            { // parts: [warps][16][4]
                const bool odd = at.t & 1, upper = at.t & 2;
                float a[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    a[i] = (odd ? high[i] : low[i]) + from_lane_xor(odd ? low[i] : high[i], 1);
                float2 pair;
                pair.x = (upper ? a[2] : a[0]) + from_lane_xor(upper ? a[0] : a[2], 2);
                pair.y = (upper ? a[3] : a[1]) + from_lane_xor(upper ? a[1] : a[3], 2);
                *reinterpret_cast<float2 *>(parts + (at.warp * 16 + own) * 4 + (at.t & 2)) = pair;
            }
            sync_warps(1, L::threads);
            float s[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < L::warps; ++i) {
                const float4 x = *reinterpret_cast<const float4 *>(parts + (i * 16 + own) * 4);
                s[0] += x.x, s[1] += x.y, s[2] += x.z, s[3] += x.w;
            }
            const float r = inverse_root(s[0] * (1.0f / D) + p.eps);
            const float mean_u = (r * s[1] - goal_sum) * (1.0f / D);
            const float along = r * s[2] - s[3], mean_uh = r * along * (1.0f / D);
            if (output && own == n - 1)
                error += r * (along - s[3]);
            float by = rate * r;
            if (p.max_norm > 0) {
                float square = 0; // of G, from its parts
                float k_r[2], k_u[2], k_uh[2];
                RowSums::spread(k_r, r, at);
                RowSums::spread(k_u, mean_u, at);
                RowSums::spread(k_uh, mean_uh, at);
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int half = e >> 1;
                        const float x = k_r[half] * (k_r[half] * ggz[nt][e] - goal[nt][e] -
                                                     k_u[half] - k_r[half] * k_uh[half] * z[nt][e]);
                        if (at.g + 8 * half < n)
                            square += x * x;
                    }
#pragma unroll
                for (int i = 16; i > 0; i /= 2)
                    square += from_lane_xor(square, i);
                if (at.lane == 0)
                    shared.block[at.warp] = square;
                sync_warps(1, L::threads);
                square = 0;
                for (int i = 0; i < L::warps; ++i)
                    square += shared.block[i];
                by *= fminf(1.0f, p.max_norm / (sqrtf(square) + 1e-6f));
            }
            // P = -f c r (g^2 r z - g goal - mean_u - r mean_uh z)
            float f_ggz[2], f_goal[2], f_mean[2], f_z[2];
            RowSums::spread(f_goal, by, at);
            RowSums::spread(f_ggz, by * r, at);
            RowSums::spread(f_mean, by * mean_u, at);
            RowSums::spread(f_z, by * r * mean_uh, at);
            E *const p_tile = shared.p + batch % roles_p_slots * L::tile;
            Arrivals *const p_full =
                shared.p_full + at.warp * roles_p_slots + batch % roles_p_slots;
            if (output && batch >= roles_p_slots)
                wait_for_phase(shared.p_empty + at.warp * roles_p_slots + batch % roles_p_slots,
                               (batch / roles_p_slots - 1) & 1);
            if (losses())
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (at.g + 8 * half == n - 1)
#pragma unroll
                        for (int nt = 0; nt < 2; ++nt)
                            store_pair(shared.z_last + batch % roles_p_slots * D + at.col + 8 * nt +
                                           2 * at.t,
                                       z[nt][2 * half], z[nt][2 * half + 1]);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    float x[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int i = 2 * half + e;
                        x[e] = f_ggz[half] * ggz[nt][i] - f_goal[half] * goal[nt][i] -
                               f_mean[half] - f_z[half] * z[nt][i];
                    }
                    store_pair(p_tile + (at.g + 8 * half) * L::ld + at.col + 8 * nt + 2 * at.t,
                               x[0], x[1]);
                    if (trace && at.g + 8 * half < n)
                        store_pair(trace + 8 * half * D + 8 * nt, x[0], x[1]);
                }
            if (trace)
                trace += M * D;
            sync_warp();
            if (output)
                arrive_warp(p_full, at.lane);
            if (shared.rates.learns(is_short) != 0)
                add_outer<L>(w, slot.k, p_tile, at);
            sync_warp();
            arrive_warp(shared.empty + batch % roles_slots, at.lane);
        }
        if (p.trace_w)
            store_state<L>(p.trace_w + (int64_t(head) * trace_states(p.batches) +
                                        trace_states(p.batches) - 1) *
                                           L::state_size,
                           w, at.thread);
        return error;
    }

    __device__ __forceinline__ void outputs(typename L::State &w, const Place &at) {
        HeadNorm norm;
        norm.load(p, head % p.heads * D + at.col + 2 * at.t);
        E *y = static_cast<E *>(p.y) + offset + int64_t(at.g) * width + at.col + 2 * at.t;
        const int own = at.g + 8 * (at.t & 1);
        for (int batch = 0; batch < p.batches; ++batch) {
            const bool is_short = batch == p.batches - 1;
            const int n = is_short ? short_n : M;
            const RolesSlot<L> &slot = shared.slots[batch % roles_slots];
            float *u_parts = shared.u_parts + (batch & 1) * 16 * L::warps;
            wait_for_phase(shared.full + batch % roles_slots, batch / roles_slots & 1);
            typename L::Rows u_rows;
            {
                const E *const from[1] = {slot.q};
                typename L::Rows *const to[1] = {&u_rows};
                products<L, 1>(to, from, w, at);
            }
            float(&u)[2][4] = u_rows[0];
            FragA<E> a;
            kept(a, slot.a, at.lane);
            const E *const p_tile = shared.p + batch % roles_p_slots * L::tile;
            const int p_at = at.warp * roles_p_slots + batch % roles_p_slots;
            wait_for_phase(shared.p_full + p_at, batch / roles_p_slots & 1);
            FragB<E> b[2];
            load_b_transposed(b, p_tile + at.col, L::ld, at.lane);
            mma(u[0], a, b[0]);
            mma(u[1], a, b[1]);
            if (shared.rates.learns(is_short) != 0)
                add_outer<L>(w, slot.k, p_tile, at);
            sync_warp();
            arrive_warp(shared.p_empty + p_at, at.lane);
            { // u_parts: [16][warps]
                float low = 0, high = 0;
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        low += u[nt][e] * u[nt][e];
                        high += u[nt][2 + e] * u[nt][2 + e];
                    }
                const bool odd = at.t & 1;
                float x = (odd ? high : low) + from_lane_xor(odd ? low : high, 1);
                x += from_lane_xor(x, 2);
                if (at.t < 2)
                    u_parts[own * L::warps + at.warp] = x;
            }
            sync_warps(2, L::threads);
            float sum = 0, r[2];
#pragma unroll
            for (int i = 0; i < L::warps; ++i)
                sum += u_parts[own * L::warps + i];
            RowSums::spread(r, inverse_root(sum * (1.0f / D) + p.eps), at);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    const int row = at.g + 8 * half;
                    const float2 q =
                        floats(pair_at(slot.q + row * L::ld + at.col + 8 * nt + 2 * at.t));
                    if (row < n)
                        store_pair(y + int64_t(8 * half) * width + 8 * nt,
                                   q.x + norm.b[nt][0] + norm.g[nt][0] * r[half] * u[nt][2 * half],
                                   q.y + norm.b[nt][1] +
                                       norm.g[nt][1] * r[half] * u[nt][2 * half + 1]);
                }
            y += int64_t(M) * width;
            sync_warp();
            arrive_warp(shared.empty + batch % roles_slots, at.lane);
        }
        if (p.w_out)
            each_element<L>(w, at, [&](float &x, int in, int out) {
                if (in < D)
                    p.w_out[(int64_t(head) * D + in) * D + out] = x + shared.mean[in];
                else if (in == D)
                    p.b_out[int64_t(head) * D + out] = x + shared.mean[in];
            });
    }

    // Returns this lane's part of the error after each step.
    __device__ __forceinline__ float errors_after(const Place &at) {
        constexpr int per = D / 32;
        float g[per], error = 0;
#pragma unroll
        for (int i = 0; i < per; ++i)
            g[i] = p.g[head % p.heads * D + at.lane + 32 * i];
        for (int batch = 0; batch < p.batches; ++batch) {
            const RolesSlot<L> &slot = shared.slots[batch % roles_slots];
            wait_for_phase(shared.full + batch % roles_slots, batch / roles_slots & 1);
            for (int w = 0; w < L::warps; ++w)
                wait_for_phase(shared.p_full + w * roles_p_slots + batch % roles_p_slots,
                               batch / roles_p_slots & 1);
            const E *p_tile = shared.p + batch % roles_p_slots * L::tile;
            const bool learns = shared.rates.learns(batch == p.batches - 1) != 0;
            float z[per], step[per] = {}, square = 0;
#pragma unroll
            for (int j = 0; j < M; ++j)
#pragma unroll
                for (int i = 0; i < per; ++i)
                    step[i] += slot.last_keys[j] * to_float(p_tile[j * L::ld + at.lane + 32 * i]);
#pragma unroll
            for (int i = 0; i < per; ++i) {
                z[i] = shared.z_last[batch % roles_p_slots * D + at.lane + 32 * i] +
                       (learns ? step[i] : 0.0f);
                square += z[i] * z[i];
            }
#pragma unroll
            for (int i = 16; i > 0; i /= 2)
                square += from_lane_xor(square, i);
            const float r = inverse_root(square * (1.0f / D) + p.eps);
#pragma unroll
            for (int i = 0; i < per; ++i) {
                const float e = g[i] * r * z[i] - slot.last_goal[at.lane + 32 * i];
                error += e * e;
            }
            sync_warp();
            for (int w = 0; w < L::warps; ++w)
                arrive_warp(shared.p_empty + w * roles_p_slots + batch % roles_p_slots, at.lane);
            arrive_warp(shared.empty + batch % roles_slots, at.lane);
        }
        return error;
    }

    __device__ __forceinline__ void finish(float loss, int role, const Place &at) {
        // before: the warps ahead, and of the chain the first (each has all)
        float x = role == 2 || (role == 0 && (at.warp != 0 || at.t >= 2)) ? 0.0f : loss;
#pragma unroll
        for (int i = 16; i > 0; i /= 2)
            x += from_lane_xor(x, i);
        sync_block();
        if (at.lane == 0 && role == 1)
            shared.block[1 + at.warp] = x;
        if (at.lane == 0 && role == 0 && at.warp == 0)
            shared.block[0] = x;
        if (at.lane == 0 && role == 3)
            shared.block[1 + roles_ahead] = x;
        sync_block();
        if (at.thread == 0) {
            float before = 0;
            for (int i = 0; i < 1 + roles_ahead; ++i)
                before += shared.block[i];
            p.loss_part[head * 3 + 1] = before;
            p.loss_part[head * 3 + 2] = shared.block[1 + roles_ahead];
            finish_loss(p, stream, float(D));
        }
    }

    const LinearParams &p;
    const RolesShared<L, output> shared;
    const int head, stream, width;
    const int64_t offset;
    const int short_n;
};

template <class L, bool output>
__global__ void __launch_bounds__(roles_threads<L, output>(), 1)
    linear_roles(const __grid_constant__ LinearParams p) {
    if constexpr (RolesShared<L, output>(nullptr).size > most_shared_memory)
        return;
    const int scans = p.streams * p.heads;
    if (output && int(blockIdx.x) >= scans) {
        const Place at;
        const int head = int(blockIdx.x) - scans;
        const float error = initial_error<L, roles_threads<L, output>() / 32>(p, head, at);
        if (at.thread == 0) {
            p.loss_part[head * 3] = error;
            finish_loss(p, head / p.heads, float(L::D));
        }
        return;
    }
    Roles<L, output>(p).run();
}

} // namespace ponder::cuda
