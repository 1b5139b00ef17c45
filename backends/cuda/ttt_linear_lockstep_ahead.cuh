// The warps ahead in the pipeline in lockstep: what depends on no state.
#pragma once

#include "ttt_linear_lockstep.cuh"

namespace ponder::cuda {

// Of several such warps, the first makes A, the last k_i k_j + 1, and each a share of the
// goals.
template <class C, class L>
__device__ __forceinline__ void LockstepScan<C, L>::ahead(const Place &at, int which) {
    constexpr int share = kt / C::helpers;
    const bool first = which == 0, last = which == C::helpers - 1;
    const int col = 16 * share * which;
    float g[2 * share][2], gb[2 * share][2];
#pragma unroll
    for (int n = 0; n < 2 * share; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int dim = head % p.heads * D + col + 8 * n + 2 * at.t + e;
            g[n][e] = p.g[dim];
            gb[n][e] = p.g[dim] * p.b[dim];
        }
    const int64_t rate_offset = int64_t(stream) * p.tokens * p.heads + head % p.heads;
    // Bits as they come, so that nothing waits for them before the next mini-batch.
    const auto rate_of = [&](int batch) {
        const int token = batch * M + at.lane;
        const int64_t i = rate_offset + int64_t(token) * p.heads;
        uint32_t bits = 0;
        if (first && at.lane < M && token < p.tokens)
            bits = p.rate_bf16 ? static_cast<const uint16_t *>(p.lr)[i]
                               : static_cast<const uint32_t *>(p.lr)[i];
        return bits;
    };
    uint32_t rate = rate_of(0);
    float by[2][2][2]; // what becomes of q_i k_j + 1
    const auto set_by = [&](bool is_short) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int row = at.g + 8 * half;
                    by[jj][half][e] =
                        8 * jj + 2 * at.t + e <= row + p.causal_k ? rates.a(is_short, row) : 0.0f;
                }
    };
    int of_slot = 0, of_ready = 0;
    const auto prepare = [&](int batch) {
        const typename C::Slot &slot = shared.slot[of_slot];
        typename C::Ready &to = shared.ready[of_ready];
        of_slot = of_slot == C::slots - 1 ? 0 : of_slot + 1;
        of_ready = of_ready == C::ready_slots - 1 ? 0 : of_ready + 1;
        const bool is_short = batch == p.batches - 1;
        if (first && at.lane < M)
            to.rate[at.lane] = -rates.f(is_short) * rates.c(at.lane) *
                               float_of_bits(p.rate_bf16 ? rate << 16 : rate);
        rate = rate_of(batch + 1);
        FragB<E> keys[kt][2]; // which lie as results do, too
        const auto load_keys = [&](int k) { load_b(keys[k], slot.k + 16 * k, L::ld, at.lane); };
        float sum[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < share; ++k) {
            FragB<E> v[2];
            load_b(v, slot.v + col + 16 * k, L::ld, at.lane);
            if constexpr (C::many)
                load_keys(k);
            else
                load_b(keys[k], slot.k + col + 16 * k, L::ld, at.lane);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                const int n = 2 * k + nt;
                float x[4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 vv = floats(Pair<E>{v[half].x[nt]}),
                                 kk = floats(Pair<E>{keys[k][half].x[nt]});
                    x[2 * half] = g[n][0] * (vv.x - kk.x) - gb[n][0];
                    x[2 * half + 1] = g[n][1] * (vv.y - kk.y) - gb[n][1];
                    sum[half] += x[2 * half] + x[2 * half + 1];
                }
                to.goal[2 * share * which + n][at.lane] = {x[0], x[1], x[2], x[3]};
            }
        }
        uint32_t of_last[2] = {};
        if (C::output) {
            if (!C::many && (first || (last && losses())))
#pragma unroll
                for (int k = 0; k < kt; ++k)
                    load_keys(k);
            const auto with_keys = [&](float(&c)[2][4], const FragA<E> &x, int k) {
                mma(c[0], x, keys[k][0]);
                mma(c[1], x, keys[k][1]);
            };
            if (first) {
                float c[2][4] = {};
#pragma unroll
                for (int k = 0; k < kt; ++k) {
                    FragA<E> q;
                    load_a(q, slot.q + 16 * k, L::ld, at.lane);
                    with_keys(c, q, k);
                }
                if (is_short)
                    set_by(true);
#pragma unroll
                for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        c[jj][e] = c[jj][e] * by[jj][e >> 1][e & 1] + by[jj][e >> 1][e & 1];
                FragA<E> a;
                a_of(a, c[0], c[1]);
                to.a[at.lane] = {a.x[0], a.x[1], a.x[2], a.x[3]};
            }
            if (last && losses()) {
                float c[2][4];
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    c[0][e] = c[1][e] = 1;
#pragma unroll
                for (int k = 0; k < kt; ++k) {
                    FragA<E> key;
                    load_a(key, slot.k + 16 * k, L::ld, at.lane);
                    with_keys(c, key, k);
                }
                FragA<E> a;
                a_of(a, c[0], c[1]);
                const bool lower = is_short && short_n <= 8;
                of_last[0] = lower ? a.x[0] : a.x[1];
                of_last[1] = lower ? a.x[2] : a.x[3];
            }
        }
        // The upper rows have that of the last key; the lower sum.
        if (last) {
            constexpr uint32_t one = 0x3f803f80u;
            to.sums[at.lane] = rates.learns(is_short) != 0 ? uint4{one, of_last[0], one, of_last[1]}
                                                           : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += from_lane_xor(sum[half], 1);
            sum[half] += from_lane_xor(sum[half], 2);
            if (at.t == 0)
                to.goal_sum[at.g + 8 * half][which] = sum[half];
        }
    };
    sync(); // the first two mini-batches are there, the rates, and sums of the initial state
    set_by(false);
    prepare(0);
    sync();
    for (int batch = 0; batch < p.batches; ++batch) {
        if (batch + 1 < p.batches)
            prepare(batch + 1);
        sync();
    }
    sync();
}

} // namespace ponder::cuda
