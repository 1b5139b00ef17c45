// ttt_linear on clusters: see ttt_linear.cuh and ttt_linear_wide.cuh. A mini-batch:
//
//   Z = K W + b, U = Q W + b; the norm's sums of Z go round, meanwhile A
//   G, P; U += A P; the sums of U go round, meanwhile W += K^T P, b += sum P
//   y
//
// and one exchange more where the gradient's norm has a limit. The loss after a step is of one more
// row, the last key under the new state; that under the initial state has clusters of its own.
#pragma once

#include "ttt_linear_host.hpp"
#include "ttt_linear_loss.cuh"
#include "ttt_linear_wide.cuh"

namespace ponder::cuda {

template <class L> struct WideScanShared {
    using E = typename L::E;
    using Own = OwnColumns<L>;
    static constexpr int stages = 2;
    E *k, *q, *v, *p, *a;
    float *c, *mean;
    Exchange<L> exchange;
    Rates<L::M> rates;
    int size;
    __host__ __device__ explicit WideScanShared(unsigned char *base) {
        SharedLayout s(base);
        k = s.take<E>(stages * L::tile);
        q = s.take<E>(stages * L::tile);
        v = s.take<E>(stages * Own::tile);
        p = s.take<E>(Own::tile);
        a = s.take<E>(L::M * causal_ld<L>);
        c = s.take<float>(2 * L::M);
        mean = s.take<float>(L::D + 8);
        exchange = {s.take<float>(Exchange<L>::row_parts)};
        rates = {s.take<float>(3 * L::M + 4)};
        size = s.size();
    }
};

// z = x W + b for one row x, the first of z.
template <class L>
__device__ __forceinline__ void row_product(float (&z)[2][4], const typename L::E *x,
                                            const typename L::State &w, const Place &at) {
    using E = typename L::E;
    float bias[2][2], sum[2][2][4] = {}; // two sums, so that fewer products wait in a row
    bias_of<L>(bias, w, at.t);
#pragma unroll
    for (int k = 0; k < L::kt; ++k) {
        FragA<E> a;
        load_a_row(a, x + 16 * k, at.lane);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
            FragB<E> b;
            b_of_transposed(b, w[2 * k], w[2 * k + 1], nt);
            mma(sum[k % 2][nt], a, b);
        }
    }
#pragma unroll
    for (int nt = 0; nt < 2; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            z[nt][e] = sum[0][nt][e] + sum[1][nt][e] + bias[nt][e & 1];
}

template <class L>
__global__ void __launch_bounds__(L::threads)
    linear_wide_scan(const __grid_constant__ LinearParams p) {
    if constexpr (!has_clusters)
        return;
    using E = typename L::E;
    using Shared = WideScanShared<L>;
    using Own = OwnColumns<L>;
    constexpr int D = L::D, M = L::M, mt = L::mt;
    const ClusterPlace<L> at;
    const int number = int(blockIdx.x) / L::split, scans = p.streams * p.heads;
    if (number >= scans) {
        if (at.rank > 0) // one block has time enough
            return;
        const int head = number - scans;
        const float error = initial_error<L, L::warps>(p, head, at);
        if (at.thread == 0) {
            p.loss_part[head * 3] = error;
            finish_loss(p, head / p.heads, float(D));
        }
        return;
    }
    const Shared shared(kept_shared_memory());
    const Exchange<L> &exchange = shared.exchange;
    const int head = number, s = head / p.heads, h = head % p.heads;
    const int width = p.heads * D;
    const int64_t offset = int64_t(s) * p.tokens * width + h * D;
    const int64_t rate_offset = int64_t(s) * p.tokens * p.heads + h;
    const int short_n = p.tokens - (p.batches - 1) * M;
    const bool queries = p.y;

    const auto fetch_batch = [&](int batch) {
        if (batch < p.batches) {
            const int stage = batch % Shared::stages;
            fetch<L>(shared.k + stage * L::tile, p.k, offset, width, batch * M, p.tokens,
                     at.thread);
            if (queries)
                fetch<L>(shared.q + stage * L::tile, p.q, offset, width, batch * M, p.tokens,
                         at.thread);
            fetch<Own>(shared.v + stage * Own::tile, p.v, offset + at.rank * L::own, width,
                       batch * M, p.tokens, at.thread);
        }
        commit_copies();
    };
    const auto rate_of = [&](int batch) {
        const int token = batch * M + at.thread;
        return at.thread < M && token < p.tokens
                   ? rate_at(p, rate_offset + int64_t(token) * p.heads)
                   : 0.0f;
    };
    // with the other factors of P, -f c_j
    const auto set_rate = [&](int batch, float rate) {
        if (at.thread < M)
            shared.c[(batch & 1) * M + at.thread] =
                -shared.rates.f(batch == p.batches - 1) * shared.rates.c(at.thread) * rate;
    };

    exchange.close(); // nothing in the box: the first to open it waits for all blocks to be there
    fetch_batch(0);
    const float first_rate = rate_of(0);
    typename L::State w;
    read_state<L>(w, p.w1 + int64_t(head) * D * D, p.b1 + int64_t(head) * D, at);
    HeadNorm norm;
    norm.load(p, h * D + at.col + 2 * at.t);
    shared.rates.fill(p, at.thread, short_n);
    for (int i = at.warp; i < D + 8; i += L::warps) { // means over outputs, which are taken out
        const float *from = i < D ? p.w1 + (int64_t(head) * D + i) * D : p.b1 + int64_t(head) * D;
        float sum = 0;
        if (i <= D)
            for (int c = at.lane; c < D; c += 32)
                sum += from[c];
        for (int l = 16; l > 0; l /= 2)
            sum += from_lane_xor(sum, l);
        if (at.lane == 0)
            shared.mean[i] = sum / float(D);
    }
    sync_block();
    set_rate(0, first_rate);
    each_element<L>(w, at, [&](float &x, int in, int) { x -= shared.mean[in]; });

    float before[1] = {0}; // this thread's part of the error before each step
    // The error after a step: this thread's part of the last key's sums, which go round with the
    // next step's, as the first token's sums 4 to 7.
    float last[8] = {};
    double after = 0;
    const auto add_after = [&](const float(&sum)[8]) {
        const float r = inverse_root(sum[4] / float(D) + p.eps);
        after += double(r * (r * sum[5] - 2 * sum[6]) + sum[7]);
    };

    for (int batch = 0; batch < p.batches; ++batch) {
        const bool is_short = batch == p.batches - 1;
        const int n = is_short ? short_n : M;
        const int stage = batch % Shared::stages;
        const E *const k_tile = shared.k + stage * L::tile;
        const E *const q_tile = shared.q + stage * L::tile;
        const E *const v_tile = shared.v + stage * Own::tile;

        wait_for_copies<0>();
        sync_block(); // the tiles have come, those of the mini-batch before have been read
        fetch_batch(batch + 1);
        const float next_rate = rate_of(batch + 1);
        if (p.trace_w && batch % trace_every == 0)
            store_state<L>(p.trace_w +
                               (int64_t(head) * trace_states(p.batches) + batch / trace_every) *
                                   L::state_size,
                           w, at.head_thread);

        typename L::Rows z, u;
        if (queries) {
            const E *const from[2] = {k_tile, q_tile};
            typename L::Rows *const to[2] = {&z, &u};
            products<L, 2>(to, from, w, at);
        } else {
            const E *const from[1] = {k_tile};
            typename L::Rows *const to[1] = {&z};
            products<L, 1>(to, from, w, at);
        }
        exchange.open();
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float goal[2][4], sum[2][8] = {};
            own_goals<L>(goal, k_tile + 16 * m * L::ld, v_tile + 16 * m * Own::ld, norm, at);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    add_loss_sums(sum[e >> 1], z[m][nt][e], norm.g[nt][e & 1], goal[nt][e]);
            exchange.put_rows(m, sum[0], sum[1], at);
        }
        exchange.send();
        if (queries)
            causal_products<L>(
                q_tile, k_tile, 1, p.causal_k, at, [&](int row, int key, float x, float y) {
                    const float rate = shared.rates.a(is_short, row);
                    store_pair(shared.a + row * causal_ld<L> + key, rate * x, rate * y);
                });
        set_rate(batch + 1, next_rate);
        exchange.receive();

        float squares[1] = {0};
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float sum[8], r[2], mean_u[2], mean_uh[2], goal[2][4];
            exchange.get_rows(sum, m, at);
            const LossStats stats(sum, float(D), p.eps);
            RowSums::spread(r, stats.r, at);
            RowSums::spread(mean_u, stats.mean_u, at);
            RowSums::spread(mean_uh, stats.mean_uh, at);
            own_goals<L>(goal, k_tile + 16 * m * L::ld, v_tile + 16 * m * Own::ld, norm, at);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int half = e >> 1, row = 16 * m + at.g + 8 * half;
                    const float g = norm.g[nt][e & 1];
                    if (row == n - 1) {
                        const float error = g * r[half] * z[m][nt][e] - goal[nt][e];
                        before[0] += error * error;
                    }
                    z[m][nt][e] = loss_gradient(z[m][nt][e], g, goal[nt][e], r[half], mean_u[half],
                                                mean_uh[half]);
                    if (row < n)
                        squares[0] += z[m][nt][e] * z[m][nt][e];
                }
        }
        exchange.close();
        float factor = 1;
        if (p.max_norm > 0) {
            exchange.total(squares, at);
            factor = fminf(1.0f, p.max_norm / (sqrtf(squares[0]) + 1e-6f));
        }
#pragma unroll
        for (int m = 0; m < mt; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + at.g + 8 * half;
                const float c = factor * shared.c[(batch & 1) * M + row];
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    const int dim = 8 * nt + 2 * at.t;
                    const float x = c * z[m][nt][2 * half], y = c * z[m][nt][2 * half + 1];
                    store_pair(shared.p + row * Own::ld + 16 * at.warp + dim, x, y);
                    if (p.trace_p && row < n)
                        store_pair(static_cast<E *>(p.trace_p) +
                                       (int64_t(head) * p.tokens + batch * M + row) * D + at.col +
                                       dim,
                                   x, y);
                }
            }
        sync_block(); // of P, a warp reads its own dims only; A is complete

        if (queries) {
#pragma unroll
            for (int i = 0; i < mt; ++i)
#pragma unroll
                for (int j = 0; j <= i; ++j) {
                    FragA<E> a;
                    FragB<E> b[2];
                    load_a(a, shared.a + 16 * i * causal_ld<L> + 16 * j, causal_ld<L>, at.lane);
                    load_b_transposed(b, shared.p + 16 * j * Own::ld + 16 * at.warp, Own::ld,
                                      at.lane);
                    mma(u[i][0], a, b[0]);
                    mma(u[i][1], a, b[1]);
                }
            exchange.open();
#pragma unroll
            for (int m = 0; m < mt; ++m) {
                float sum[2][8] = {};
                if (m == 0)
#pragma unroll
                    for (int i = 4; i < 8; ++i)
                        sum[0][i] = last[i];
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        sum[e >> 1][0] += u[m][nt][e] * u[m][nt][e];
                exchange.put_rows(m, sum[0], sum[1], at);
            }
            exchange.send();
        }
        if (shared.rates.learns(is_short) != 0)
#pragma unroll
            for (int m = 0; m < mt; ++m) {
                FragA<E> a;
                load_a_transposed(a, shared.p + 16 * m * Own::ld + 16 * at.warp, Own::ld, at.lane);
                add_outer<L>(w, k_tile + 16 * m * L::ld, a, at);
            }
        if (!queries)
            continue;

        if (p.loss) {
            float z[2][4];
            row_product<L>(z, k_tile + (n - 1) * L::ld, w, at);
            const E *const key = k_tile + (n - 1) * L::ld + at.col;
            const E *const value = v_tile + (n - 1) * Own::ld + 16 * at.warp;
#pragma unroll
            for (int i = 4; i < 8; ++i)
                last[i] = 0;
            if (at.g == 0)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int dim = 8 * nt + 2 * at.t + e;
                        const float goal =
                            to_float(value[dim]) - to_float(key[dim]) - norm.b[nt][e];
                        const float gz = norm.g[nt][e] * z[nt][e];
                        last[4] += z[nt][e] * z[nt][e];
                        last[5] += gz * gz;
                        last[6] += gz * goal;
                        last[7] += goal * goal;
                    }
        }
        exchange.receive();
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float sum[8], r[2];
            exchange.get_rows(sum, m, at);
            RowSums::spread(r, inverse_root(sum[0] / float(D) + p.eps), at);
            if (m == 0 && p.loss && at.thread == 0)
                add_after(sum);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + at.g + 8 * half;
                if (row < n)
#pragma unroll
                    for (int nt = 0; nt < 2; ++nt) {
                        const int dim = at.col + 8 * nt + 2 * at.t;
                        const float2 q = floats(pair_at(q_tile + row * L::ld + dim));
                        const float *x = &u[m][nt][2 * half];
                        store_pair(static_cast<E *>(p.y) + offset +
                                       (int64_t(batch) * M + row) * width + dim,
                                   q.x + norm.b[nt][0] + norm.g[nt][0] * r[half] * x[0],
                                   q.y + norm.b[nt][1] + norm.g[nt][1] * r[half] * x[1]);
                    }
            }
        }
        exchange.close();
    }

    if (p.trace_w)
        store_state<L>(p.trace_w +
                           (int64_t(head) * trace_states(p.batches) + trace_states(p.batches) - 1) *
                               L::state_size,
                       w, at.head_thread);
    if (p.w_out)
        each_element<L>(w, at, [&](float &x, int in, int out) {
            if (in < D)
                p.w_out[(int64_t(head) * D + in) * D + out] = x + shared.mean[in];
            else if (in == D)
                p.b_out[int64_t(head) * D + out] = x + shared.mean[in];
        });
    if (p.loss) {
        exchange.total(before, at);
        exchange.total(last, at);
        if (at.rank == 0 && at.thread == 0) {
            add_after(last);
            p.loss_part[head * 3 + 1] = before[0];
            p.loss_part[head * 3 + 2] = float(after);
            finish_loss(p, s, float(D));
        }
    }
    exchange.open(); // all have read what this block sent, which may go
}

template <class L> size_t wide_scan_shared() {
    const size_t keys = size_t(L::warps * L::D * 8) * sizeof(float); // see initial_error
    const size_t bytes = size_t(WideScanShared<L>(nullptr).size);
    return bytes > keys ? bytes : keys;
}

} // namespace ponder::cuda
