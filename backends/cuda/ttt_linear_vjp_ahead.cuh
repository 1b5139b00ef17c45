// The warps ahead of the reverse with roles: they fetch, and make what depends on no state.
#pragma once

#include "ttt_linear_vjp_roles.cuh"

namespace ponder::cuda {

template <class L> __device__ __forceinline__ void ReverseRoles<L>::ahead(const Place &at) const {
    constexpr int per = 16 / int(sizeof(E)), chunks = D / per;
    const int row_0 = at.lane / chunks, c_0 = at.lane % chunks * per;
    uint32_t rate_ahead = 0; // bits as they come, so that nothing waits for them yet
    const auto fetch_step = [&](int step) {
        if (step < p.batches) {
            ReverseSlot<L> &slot = shared.slots[step % reverse_slots];
            if (step >= reverse_slots)
                wait_for_phase(shared.empty + step % reverse_slots, (step / reverse_slots - 1) & 1);
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

} // namespace ponder::cuda
