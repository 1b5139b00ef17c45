// ttt_linear: see src/tensor/ops.hpp and ttt_linear.cuh. A step for each mini-batch:
//
//   Z = K W + b and Q W + b from the registers; the norm's sums of Z over the warps; one barrier
//   G, P; U = Q W + b + A P; W += K^T P, b += sum P
//
// The sums of U ride on the barrier of the next step, y is written after it. Tiles of q, k, v are
// fetched some steps ahead, and are known to all after the barrier of the step before.
//
// Losses: that before the step falls out of G; that after it is of one more row, the last key under
// the new state; that under the initial state has blocks of its own, as it waits for nothing.
#pragma once

#include "ttt_linear_host.hpp"
#include "ttt_linear_lockstep_ahead.cuh"
#include "ttt_linear_lockstep_behind.cuh"
#include "ttt_linear_lockstep_chain.cuh"
#include "ttt_linear_lockstep_state.cuh"
#include "ttt_linear_roles.cuh"

namespace ponder::cuda {

template <class L, int stages, bool output> struct LinearShared {
    using E = typename L::E;
    static constexpr int inputs = output ? 3 : 2; // k, v, q
    E *tiles, *p, *last_k;
    float *parts, *last_goal, *last_parts, *c, *mean, *block;
    Rates<L::M> rates;
    int size;
    __host__ __device__ explicit LinearShared(unsigned char *base) {
        SharedLayout s(base);
        tiles = s.take<E>(stages * inputs * L::tile);
        p = s.take<E>(L::tile);
        last_k = s.take<E>(2 * L::D);
        parts = s.take<float>(2 * L::mt * L::warps * 128);
        last_goal = s.take<float>(2 * L::D);
        last_parts = s.take<float>(2 * L::warps * 4);
        c = s.take<float>(4 * L::M);
        mean = s.take<float>(L::D + 8);
        block = s.take<float>(L::warps);
        rates = {s.take<float>(3 * L::M + 4)};
        size = s.size();
    }
    __device__ E *tile(int batch, int input) const {
        return tiles + (batch % stages * inputs + input) * L::tile;
    }
};

template <class L, int stages, bool output>
__global__ void __launch_bounds__(L::threads) linear_scan(const __grid_constant__ LinearParams p) {
    using E = typename L::E;
    constexpr int D = L::D, M = L::M;
    const Place at;
    const int scans = p.streams * p.heads;
    if (output && int(blockIdx.x) >= scans) {
        const int head = int(blockIdx.x) - scans;
        const float error = initial_error<L, L::warps>(p, head, at);
        if (at.thread == 0) {
            p.loss_part[head * 3] = error;
            finish_loss(p, head / p.heads, float(D));
        }
        return;
    }
    const LinearShared<L, stages, output> shared(shared_memory());
    const int head = int(blockIdx.x), s = head / p.heads, h = head % p.heads;
    const int width = p.heads * D;
    const int64_t offset = int64_t(s) * p.tokens * width + h * D;
    const int64_t rate_offset = int64_t(s) * p.tokens * p.heads + h;
    const int short_n = p.tokens - (p.batches - 1) * M;

    const auto fetch_batch = [&](int batch) {
        if (batch < p.batches) {
            const void *const from[3] = {p.k, p.v, p.q};
#pragma unroll
            for (int i = 0; i < shared.inputs; ++i)
                fetch<L>(shared.tile(batch, i), from[i], offset, width, batch * M, p.tokens,
                         at.thread);
        }
        commit_copies();
    };
    // lr of a mini-batch, and with the other factors of P, -f c_j
    const auto rate_of = [&](int batch) {
        const int token = batch * M + at.thread;
        return at.thread < M && token < p.tokens
                   ? rate_at(p, rate_offset + int64_t(token) * p.heads)
                   : 0.0f;
    };
    const auto set_rate = [&](int batch, float rate) {
        if (at.thread < M)
            shared.c[(batch & 3) * M + at.thread] =
                -shared.rates.f(batch == p.batches - 1) * shared.rates.c(at.thread) * rate;
    };

#pragma unroll
    for (int i = 0; i < (stages <= 2 ? stages : stages - 1); ++i)
        fetch_batch(i);
    float rate_ahead = rate_of(2);
    const float rate_0 = rate_of(0), rate_1 = rate_of(1);

    typename L::State w;
    read_state<L>(w, p.w1 + int64_t(head) * D * D, p.b1 + int64_t(head) * D, at);
    HeadNorm norm;
    norm.load(p, h * D + at.col + 2 * at.t);
    shared.rates.fill(p, at.thread, short_n);
    {                               // take the means over outputs out
        float *part = shared.parts; // [warps][D + 8]
#pragma unroll
        for (int j = 0; j < 2 * L::kt + 1; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float x = w[j][e] + w[j][e + 2];
                x += from_lane_xor(x, 4);
                x += from_lane_xor(x, 8);
                x += from_lane_xor(x, 16);
                if (at.g == 0)
                    part[at.warp * (D + 8) + 8 * j + 2 * at.t + e] = x;
            }
        sync_block();
        for (int c = at.thread; c < D + 8; c += L::threads) {
            float x = 0;
            for (int i = 0; i < L::warps; ++i)
                x += part[i * (D + 8) + c];
            shared.mean[c] = x / float(D);
        }
        set_rate(0, rate_0);
        set_rate(1, rate_1);
        wait_for_copies<(stages <= 2 ? stages - 1 : stages - 2)>();
        sync_block();
        each_element<L>(w, at, [&](float &x, int in, int) { x -= shared.mean[in]; });
    }

    typename L::Rows u;          // of the step before: Q W + b + A P
    Pair<E> q_rows[L::mt][2][2]; // its q
    float before = 0;            // this thread's part of the error before each step
    double after = 0;            // of thread 0
    E *y = static_cast<E *>(p.y) + offset;

    const auto finish_rows = [&](int m, const float(&r)[2], int first, int n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + at.g + 8 * half;
            if (row < n)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    const float2 q = floats(q_rows[m][nt][half]);
                    const float *x = &u[m][nt][2 * half];
                    store_pair(y + int64_t(first + row) * width + at.col + 8 * nt + 2 * at.t,
                               q.x + norm.b[nt][0] + norm.g[nt][0] * r[half] * x[0],
                               q.y + norm.b[nt][1] + norm.g[nt][1] * r[half] * x[1]);
                }
        }
    };
    // The last key of mini-batch `batch` under the state after it.
    const auto put_after = [&](int batch) {
        float z[2][4], bias[2][2];
        bias_of<L>(bias, w, at.t);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[nt][e] = bias[nt][e & 1];
#pragma unroll
        for (int k = 0; k < L::kt; ++k) {
            FragA<E> a;
            load_a_row(a, shared.last_k + (batch & 1) * D + 16 * k, at.lane);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                FragB<E> b;
                b_of_transposed(b, w[2 * k], w[2 * k + 1], nt);
                mma(z[nt], a, b);
            }
        }
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float goal =
                    shared.last_goal[(batch & 1) * D + at.col + 8 * nt + 2 * at.t + e];
                const float gz = norm.g[nt][e] * z[nt][e];
                sum[0] += z[nt][e] * z[nt][e];
                sum[1] += gz * gz;
                sum[2] += gz * goal;
                sum[3] += goal * goal;
            }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum[i] += from_lane_xor(sum[i], 1);
            sum[i] += from_lane_xor(sum[i], 2);
        }
        if (at.lane == 0)
            *reinterpret_cast<float4 *>(shared.last_parts +
                                        ((batch & 1) * L::warps + at.warp) * 4) = {sum[0], sum[1],
                                                                                   sum[2], sum[3]};
    };
    const auto add_after = [&](int batch) {
        float sum[4] = {0, 0, 0, 0};
        for (int i = 0; i < L::warps; ++i)
            for (int j = 0; j < 4; ++j)
                sum[j] += shared.last_parts[((batch & 1) * L::warps + i) * 4 + j];
        const float r = inverse_root(sum[0] / float(D) + p.eps);
        after += double(r * (r * sum[1] - 2 * sum[2]) + sum[3]);
    };

    for (int batch = 0; batch < p.batches; ++batch) {
        const bool is_last_batch = batch == p.batches - 1;
        const bool is_short = is_last_batch;
        const int n = is_last_batch ? short_n : M;
        const E *k_tile = shared.tile(batch, 0), *v_tile = shared.tile(batch, 1);
        const E *q_tile = shared.tile(batch, 2 % shared.inputs);
        float *parts = shared.parts + (batch & 1) * L::mt * L::warps * 128;

        if (p.trace_w && batch % trace_every == 0)
            store_state<L>(p.trace_w +
                               (int64_t(head) * trace_states(p.batches) + batch / trace_every) *
                                   L::state_size,
                           w, at.thread);

        typename L::Rows z, next_u, goal;
        if constexpr (output) {
            const E *const from[2] = {k_tile, q_tile};
            typename L::Rows *const to[2] = {&z, &next_u};
            products<L, 2>(to, from, w, at);
        } else {
            const E *const from[1] = {k_tile};
            typename L::Rows *const to[1] = {&z};
            products<L, 1>(to, from, w, at);
        }
        FragA<E> a_0; // A, where it is one tile
        const auto attend = [&](FragA<E> &a, int i, int j) {
            float c[2][4] = {};
            row_products<L>(c, q_tile + 16 * i * L::ld, k_tile + 16 * j * L::ld, at.lane);
#pragma unroll
            for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = 16 * i + at.g + 8 * (e >> 1);
                    const int key = 16 * j + 8 * jj + 2 * at.t + (e & 1);
                    c[jj][e] = key <= row + p.causal_k
                                   ? (c[jj][e] + 1) * shared.rates.a(is_short, row)
                                   : 0.0f;
                }
            a_of(a, c[0], c[1]);
        };
        if constexpr (output && L::mt == 1)
            attend(a_0, 0, 0);
#pragma unroll
        for (int m = 0; m < L::mt; ++m) {
            goals<L>(goal[m], k_tile + 16 * m * L::ld, v_tile + 16 * m * L::ld, norm, at);
            float sum[2][8] = {};
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    add_loss_sums(sum[e >> 1], z[m][nt][e], norm.g[nt][e & 1], goal[m][nt][e]);
                    if (output && batch > 0)
                        sum[e >> 1][5] += u[m][nt][e] * u[m][nt][e];
                }
            RowSums::put(parts + m * L::warps * 128, sum[0], sum[1], at);
        }
        if (output && p.loss) {
            if (batch > 0)
                put_after(batch - 1);
            if (at.thread < D) {
                const int from = (n - 1) * L::ld + at.thread;
                shared.last_k[(batch & 1) * D + at.thread] = k_tile[from];
                shared.last_goal[(batch & 1) * D + at.thread] =
                    to_float(v_tile[from]) - to_float(k_tile[from]) - p.b[h * D + at.thread];
            }
        }
        if constexpr (stages > 2)
            wait_for_copies<stages - 3>();
        sync_block();
        if constexpr (stages > 2)
            fetch_batch(batch + stages - 1);
        set_rate(batch + 2, rate_ahead);
        rate_ahead = rate_of(batch + 3);
        if (output && p.loss && batch > 0 && at.thread == 0)
            add_after(batch - 1);

        float r_u[L::mt][2], squares = 0;
#pragma unroll
        for (int m = 0; m < L::mt; ++m) {
            float sum[8], r[2], mean_u[2], mean_uh[2];
            RowSums::get(sum, parts + m * L::warps * 128, L::warps, at);
            const LossStats stats(sum, float(D), p.eps);
            RowSums::spread(r, stats.r, at);
            RowSums::spread(mean_u, stats.mean_u, at);
            RowSums::spread(mean_uh, stats.mean_uh, at);
            if (output)
                RowSums::spread(r_u[m], inverse_root(sum[5] / float(D) + p.eps), at);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int half = e >> 1, row = 16 * m + at.g + 8 * half;
                    const float g = norm.g[nt][e & 1];
                    if (output && row == n - 1) {
                        const float error = g * r[half] * z[m][nt][e] - goal[m][nt][e];
                        before += error * error;
                    }
                    z[m][nt][e] = loss_gradient(z[m][nt][e], g, goal[m][nt][e], r[half],
                                                mean_u[half], mean_uh[half]);
                    if (row < n)
                        squares += z[m][nt][e] * z[m][nt][e];
                }
        }
        float factor = 1;
        if (p.max_norm > 0)
            factor = fminf(
                1.0f, p.max_norm / (sqrtf(block_sum<L::warps>(squares, shared.block, at)) + 1e-6f));
#pragma unroll
        for (int m = 0; m < L::mt; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + at.g + 8 * half;
                const float c = factor * shared.c[(batch & 3) * M + row];
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    const int dim = at.col + 8 * nt + 2 * at.t;
                    const float *x = &z[m][nt][2 * half];
                    store_pair(shared.p + row * L::ld + dim, c * x[0], c * x[1]);
                    if (p.trace_p && row < n)
                        store_pair(static_cast<E *>(p.trace_p) +
                                       (int64_t(head) * p.tokens + batch * M + row) * D + dim,
                                   c * x[0], c * x[1]);
                }
            }
        sync_warp(); // of P, a warp reads its own dims only
        if (shared.rates.learns(is_short) != 0)
            add_outer<L>(w, k_tile, shared.p, at);

        if constexpr (output) {
            if (batch > 0)
#pragma unroll
                for (int m = 0; m < L::mt; ++m)
                    finish_rows(m, r_u[m], (batch - 1) * M, M);
#pragma unroll
            for (int i = 0; i < L::mt; ++i)
#pragma unroll
                for (int j = 0; j <= i; ++j) {
                    FragA<E> a;
                    if constexpr (L::mt == 1)
                        a = a_0;
                    else
                        attend(a, i, j);
                    FragB<E> b[2];
                    load_b_transposed(b, shared.p + 16 * j * L::ld + at.col, L::ld, at.lane);
                    mma(next_u[i][0], a, b[0]);
                    mma(next_u[i][1], a, b[1]);
                }
#pragma unroll
            for (int m = 0; m < L::mt; ++m)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        u[m][nt][e] = next_u[m][nt][e];
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        q_rows[m][nt][half] = pair_at(q_tile + (16 * m + at.g + 8 * half) * L::ld +
                                                      at.col + 8 * nt + 2 * at.t);
                }
        }
        if constexpr (stages <= 2) {
            if constexpr (stages == 2)
                wait_for_copies<0>();
            sync_block();
            fetch_batch(batch + stages);
            if constexpr (stages == 1) {
                wait_for_copies<0>();
                sync_block();
            }
        } else
            sync_warp(); // before P is written again
    }

    if (p.trace_w)
        store_state<L>(p.trace_w +
                           (int64_t(head) * trace_states(p.batches) + trace_states(p.batches) - 1) *
                               L::state_size,
                       w, at.thread);
    if constexpr (output) {
        const int batch = p.batches;
        float *parts = shared.parts + (batch & 1) * L::mt * L::warps * 128;
#pragma unroll
        for (int m = 0; m < L::mt; ++m) {
            float sum[2][8] = {};
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sum[e >> 1][5] += u[m][nt][e] * u[m][nt][e];
            RowSums::put(parts + m * L::warps * 128, sum[0], sum[1], at);
        }
        if (p.loss)
            put_after(batch - 1);
        sync_block();
#pragma unroll
        for (int m = 0; m < L::mt; ++m) {
            float sum[8], r[2];
            RowSums::get(sum, parts + m * L::warps * 128, L::warps, at);
            RowSums::spread(r, inverse_root(sum[5] / float(D) + p.eps), at);
            finish_rows(m, r, (batch - 1) * M, short_n);
        }
        if (p.w_out)
            each_element<L>(w, at, [&](float &x, int in, int out) {
                if (in < D)
                    p.w_out[(int64_t(head) * D + in) * D + out] = x + shared.mean[in];
                else if (in == D)
                    p.b_out[int64_t(head) * D + out] = x + shared.mean[in];
            });
        if (p.loss) {
            const float sum = block_sum<L::warps>(before, shared.block, at);
            if (at.thread == 0) {
                add_after(batch - 1);
                p.loss_part[head * 3 + 1] = sum;
                p.loss_part[head * 3 + 2] = float(after);
                finish_loss(p, s, float(D));
            }
        }
    }
}

template <class L, bool output> constexpr int scan_stages() {
    constexpr int bytes = L::tile_bytes * (output ? 3 : 2);
    return 5 * bytes <= 64 * 1024    ? 5
           : 3 * bytes <= 128 * 1024 ? 3
           : 2 * bytes <= 128 * 1024 ? 2
                                     : 1;
}

template <class L, bool output> size_t scan_shared() {
    const LinearShared<L, scan_stages<L, output>(), output> shared(nullptr);
    const size_t keys = output ? size_t(L::warps * L::D * 8) * sizeof(float) : 0;
    return size_t(shared.size) > keys ? size_t(shared.size) : keys;
}

// In bf16 and with head dim 64, mini-batches of 16 have the pipeline in lockstep; others have
// roles, where their registers suffice.
template <class L> constexpr bool has_lockstep() {
    return L::M == 16 && L::D == 64 && sizeof(typename L::E) == 2;
}
template <class L> constexpr bool has_roles() {
    return L::M == 16 && L::D <= 64 && !has_lockstep<L>();
}
template <class L, bool output> size_t roles_shared() {
    const size_t keys = size_t(roles_threads<L, output>() * L::D / 4) * sizeof(float);
    const size_t bytes = size_t(RolesShared<L, output>(nullptr).size);
    return output && keys > bytes ? keys : bytes;
}
// They take the least time for a step, but a multiprocessor to themselves: with more heads than
// that, blocks whose warps are alike, of which it holds three, get through them faster. Measured on
// an H100.
template <class L, bool output> bool wants_roles(const LinearParams &p, int kernel) {
    const DeviceLimits device;
    if (kernel == 1 || kernel == 3 || roles_shared<L, output>() > size_t(device.shared))
        return false;
    const int scans = p.streams * p.heads;
    return kernel == 2 || (sizeof(typename L::E) == 2 ? scans <= 2 * device.processors
                                                      : 2 * scans <= device.processors);
}

// The pipeline's form, as in TttLinearShape; 0: none. Where a head has a multiprocessor to itself,
// that with more warps; else that of which three blocks share one. Measured on an H200.
template <class L, bool output> int lockstep_form(const LinearParams &p, int kernel) {
    const DeviceLimits device;
    if (kernel == 1 || kernel == 3 ||
        sizeof(typename Lockstep<L, 4, 4, output>::Shared) > size_t(device.shared))
        return 0;
    if (kernel >= 4)
        return kernel;
    return p.streams * p.heads <= device.processors ? 5 : 4;
}
template <class L, int chain, int helpers, bool output>
cudaError_t launch_lockstep(const LinearParams &p, unsigned blocks, cudaStream_t stream) {
    using C = Lockstep<L, chain, helpers, output>;
    return launch(linear_lockstep<L, chain, helpers, output>, blocks, C::threads,
                  sizeof(typename C::Shared), stream, p);
}

template <class L, bool output>
cudaError_t launch_scan(const LinearParams &p, int kernel, cudaStream_t stream) {
    const unsigned scans = unsigned(p.streams * p.heads);
    const unsigned blocks = output && p.loss ? 2 * scans : scans;
    if constexpr (has_lockstep<L>())
        switch (lockstep_form<L, output>(p, kernel)) {
        case 4:
            return launch_lockstep<L, 2, 1, output>(p, blocks, stream);
        case 5:
            return launch_lockstep<L, 4, 4, output>(p, blocks, stream);
        }
    if constexpr (has_roles<L>())
        if (wants_roles<L, output>(p, kernel))
            return launch(linear_roles<L, output>, blocks, roles_threads<L, output>(),
                          roles_shared<L, output>(), stream, p);
    return launch(linear_scan<L, scan_stages<L, output>(), output>, blocks, L::threads,
                  scan_shared<L, output>(), stream, p);
}

template <class E, int M>
cudaError_t LinearScan<E, M>::run(const TttLinearShape &shape, const LinearParams &p,
                                  cudaStream_t stream) {
    return visit_dim<E, M>(
        shape, [&](auto l) { return launch_scan<decltype(l), true>(p, shape.kernel, stream); });
}
template <class E, int M>
cudaError_t LinearScan<E, M>::states(const TttLinearShape &shape, const LinearParams &p,
                                     cudaStream_t stream) {
    return visit_dim<E, M>(
        shape, [&](auto l) { return launch_scan<decltype(l), false>(p, shape.kernel, stream); });
}
template <class E, int M> const char *LinearScan<E, M>::misses(const TttLinearShape &shape) {
    return visit_dim<E, M>(shape,
                           [](auto l) { return shared_misses(scan_shared<decltype(l), true>()); });
}

} // namespace ponder::cuda
