// The warps behind in the pipeline in lockstep: y, the losses; and copies from memory.
#pragma once

#include "ttt_linear_lockstep.cuh"

namespace ponder::cuda {

// Several such warps have a share of the rows each, the first and the last the losses.
template <class C, class L>
__device__ __forceinline__ void LockstepScan<C, L>::behind(const Place &at, int which,
                                                           float &before, float &after) {
    constexpr int chunks = D / 8, copied = 32 / chunks; // copies a row, rows at a time
    const int row_0 = at.lane / chunks + which * copied, c_0 = at.lane % chunks * 8;
    const int64_t from_0 = offset + int64_t(row_0) * width + c_0;
    int64_t from = from_0;
    const int64_t stride = int64_t(C::helpers * copied) * width;
    int of_fetch = 0;
    const auto fetch_batch = [&](int batch) {
        if (batch < p.batches) {
            typename C::Slot &slot = shared.slot[of_fetch];
            of_fetch = of_fetch == C::slots - 1 ? 0 : of_fetch + 1;
#pragma unroll
            for (int i = 0; i < M / copied / C::helpers; ++i) {
                const int row = row_0 + i * C::helpers * copied;
                const bool valid = batch * M + row < p.tokens;
                const int64_t at_row = valid ? from : 0;
                const int to = row * L::ld + c_0;
                copy_async(slot.k + to, static_cast<const E *>(p.k) + at_row, valid);
                copy_async(slot.v + to, static_cast<const E *>(p.v) + at_row, valid);
                if (C::output)
                    copy_async(slot.q + to, static_cast<const E *>(p.q) + at_row, valid);
                from += stride;
            }
        }
        commit_copies();
    };
#pragma unroll
    for (int i = 0; i < 4; ++i)
        fetch_batch(i);
    // A lane has eight dims of a row of y, of every `apart`-th one; of the last token, every
    // 32nd.
    constexpr int apart = C::helpers * copied, rows = M / apart, few = D / 32;
    float g[8], b[8], g_last[few], b_last[few];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        g[i] = p.g[head % p.heads * D + c_0 + i];
        b[i] = p.b[head % p.heads * D + c_0 + i];
    }
#pragma unroll
    for (int i = 0; i < few; ++i) {
        g_last[i] = p.g[head % p.heads * D + at.lane + 32 * i];
        b_last[i] = p.b[head % p.heads * D + at.lane + 32 * i];
    }
    E *y = static_cast<E *>(p.y) + from_0;
    const float *const u_at = shared.u[0] + row_0 * C::u_ld + c_0, *const halves[2] = {
                                                                       u_at + C::u_turn(c_0),
                                                                       u_at + 4 - C::u_turn(c_0)};
    const int64_t y_stride = int64_t(M) * width;
    const float eps = p.eps;
    const bool with_losses = losses();
    int of_slot = 0;
    const auto put = [&](int batch, int n) {
        const typename C::Slot &slot = shared.slot[of_slot];
        of_slot = of_slot == C::slots - 1 ? 0 : of_slot + 1;
        const int odd = (batch & 1) * M * C::u_ld;
        float u[rows][8], square[rows];
#pragma unroll
        for (int j = 0; j < rows; ++j) {
            square[j] = 0;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float4 x =
                    *reinterpret_cast<const float4 *>(halves[i] + odd + apart * j * C::u_ld);
                u[j][4 * i] = x.x, u[j][4 * i + 1] = x.y, u[j][4 * i + 2] = x.z,
                         u[j][4 * i + 3] = x.w;
                square[j] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
            }
        }
#pragma unroll
        for (int i = 1; i < chunks; i *= 2)
#pragma unroll
            for (int j = 0; j < rows; ++j)
                square[j] += from_lane_xor(square[j], i);
#pragma unroll
        for (int j = 0; j < rows; ++j) {
            const float r = quick_inverse_root(square[j] * (1.0f / D) + eps);
            const uint4 q =
                *reinterpret_cast<const uint4 *>(slot.q + (row_0 + apart * j) * L::ld + c_0);
            const uint32_t qs[4] = {q.x, q.y, q.z, q.w};
            uint32_t out[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = floats(Pair<E>{qs[i]});
                out[i] = pack_bf16(g[2 * i] * (r * u[j][2 * i]) + (x.x + b[2 * i]),
                                   g[2 * i + 1] * (r * u[j][2 * i + 1]) + (x.y + b[2 * i + 1]));
            }
            if (row_0 + apart * j < n)
                *reinterpret_cast<uint4 *>(y + j * stride) = {out[0], out[1], out[2], out[3]};
        }
        y += y_stride;
        if (which == 0 && with_losses) { // the error after the step, and what was aimed at
            float goal[few], z[few], sum = 0;
#pragma unroll
            for (int i = 0; i < few; ++i) {
                const int from_tile = (n - 1) * L::ld + at.lane + 32 * i;
                goal[i] = to_float(slot.v[from_tile]) - to_float(slot.k[from_tile]) - b_last[i];
                z[i] = shared.z_last[batch & 1][at.lane + 32 * i];
                sum += z[i] * z[i];
                before += goal[i] * goal[i];
            }
#pragma unroll
            for (int i = 16; i > 0; i /= 2)
                sum += from_lane_xor(sum, i);
            const float r_last = quick_inverse_root(sum * (1.0f / D) + eps);
#pragma unroll
            for (int i = 0; i < few; ++i) {
                const float x = g_last[i] * r_last * z[i] - goal[i];
                after += x * x;
            }
        }
    };
    // The rest of the error before the step, from the sums of its last token.
    const auto add_before = [&](int batch, int n) {
        if (which != C::helpers - 1 || !with_losses)
            return;
        float square = 0, of_gg = 0, of_goal = 0;
#pragma unroll
        for (int i = 0; i < C::chain; ++i) {
            const float *from =
                reinterpret_cast<const float *>(shared.parts[batch & 1][i][(n - 1) & 7]) +
                ((n - 1) & 8) / 4;
            square += from[0];
            of_gg += from[4];
            of_goal += from[5];
        }
        const float r = quick_inverse_root(square * (1.0f / D) + eps);
        if (at.lane == 0)
            before += r * (r * of_gg - 2 * of_goal);
    };
    wait_for_copies<2>();
    sync();
    sync();
    // Until barrier i y of i - 2 is written and i + 2 has come.
    for (int batch = 0; batch <= p.batches; ++batch) {
        fetch_batch(batch + 4);
        if (C::output && batch >= 2)
            put(batch - 2, M);
        if (C::output && batch >= 1)
            add_before(batch - 1, batch == p.batches ? short_n : M);
        wait_for_copies<2>();
        sync();
    }
    if (C::output)
        put(p.batches - 1, short_n);
}

} // namespace ponder::cuda
