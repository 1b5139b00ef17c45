// ttt_linear_vjp: the mini-batches read backwards. Notation as in ttt_linear.cuh; dX is the
// gradient that arrives at X, W' and dW' the state after a mini-batch and its gradient.
//
//   W = W' - sum_j k_j^T P_j: the trace has P, so states come back by subtraction, and exactly
//   every few mini-batches, where the trace has them whole du from dy through the output norm dP_j
//   = k_j dW' + db' + sum_i A_ij du_i, dG_j = -f c_j dP_j, through the clip dz from dG through the
//   gradient of the reconstruction loss: a second derivative of the norm dW = dW' + sum_j k_j^T
//   dz_j + sum_i q_i^T du_i, likewise db dk_j = dz_j W^T + P_j dW'^T + sum_i a_i / f (du_i P_j) q_i
//   - dtarget_j, dv_j = dtarget_j dq_i = dy_i + du_i W^T + sum_j a_i / f (du_i P_j) k_j
//
// W and dW are held in registers as in the scan, 16 outputs a warp; products that sum over outputs
// read copies in shared memory, and give a warp 16 inputs. Four barriers a mini-batch: tiles have
// come, sums of the first norms, sums of the second, dz and the copies are complete.
//
// With E = r dG, x = E - mean(E) - h mean(E h) (the gradient at u = g (g h - goal)):
//   dh = -E mean(u h) - u mean(E h) + g^2 x,  dz = r (dh - mean(dh) - h s),
//   s = mean(dh h) + mean(E u) - mean(E) mean(u) - mean(E h) mean(u h);
// the means of dh and dh h follow from those of E, E h, g^2 E, g^2 h E, so one exchange does.
#include "ttt_linear_host.hpp"
#pragma once

#include "ttt_linear_host.hpp"
#include "ttt_linear_vjp.cuh"
#include "ttt_linear_vjp_ahead.cuh"
#include "ttt_linear_vjp_chain.cuh"
#include "ttt_linear_vjp_inputs.cuh"
#include "ttt_linear_vjp_states.cuh"

namespace ponder::cuda {

template <class L, int stages> struct ReverseShared {
    using E = typename L::E;
    E *tiles, *du, *dz, *w, *dw; // w, dw: [D, D + 8], output by input, then the bias
    float *parts, *lr, *block, *probe;
    Rates<L::M> rates;
    int size;
    __host__ __device__ constexpr explicit ReverseShared(unsigned char *base) {
        SharedLayout s(base);
        tiles = s.take<E>(stages * 5 * L::tile);
        du = s.take<E>(L::tile);
        dz = s.take<E>(L::tile);
        w = s.take<E>(L::D * L::ld);
        dw = s.take<E>(L::D * L::ld);
        parts = s.take<float>(2 * L::mt * L::warps * 128);
        lr = s.take<float>(2 * L::M);
        block = s.take<float>(8 * L::warps);
        probe = s.take<float>(6 * L::D + 4);
        rates = {s.take<float>(3 * L::M + 4)};
        size = s.size();
    }
    // input: k, v, q, dy, P
    __device__ E *tile(int batch, int input) const {
        return tiles + (batch % stages * 5 + input) * L::tile;
    }
};

template <class L, int stages, int resident>
__global__ void __launch_bounds__(L::threads, resident)
    linear_reverse(const __grid_constant__ LinearParams p) {
    if constexpr (ReverseShared<L, stages>(nullptr).size > most_shared_memory)
        return;
    using E = typename L::E;
    constexpr int D = L::D, M = L::M, mt = L::mt;
    const Place at;
    const ReverseShared<L, stages> shared(shared_memory());
    const int head = int(blockIdx.x), s = head / p.heads, h = head % p.heads;
    const int width = p.heads * D;
    const int64_t offset = int64_t(s) * p.tokens * width + h * D;
    const int64_t rate_offset = int64_t(s) * p.tokens * p.heads + h;
    const int short_n = p.tokens - (p.batches - 1) * M;

    const auto last_rows_at = [&](int batch) {
        return p.last_rows + (int64_t(head) * p.batches + batch) * 2 * D;
    };
    const auto fetch_batch = [&](int batch) {
        if (batch >= 0) {
            const void *const from[4] = {p.k, p.v, p.q, p.dy ? p.dy : p.q};
#pragma unroll
            for (int i = 0; i < 4; ++i)
                fetch<L>(shared.tile(batch, i), from[i], offset, width, batch * M,
                         i == 3 && !p.dy ? 0 : p.tokens, at.thread);
            fetch<L>(shared.tile(batch, 4), p.trace_p, int64_t(head) * p.tokens * D, D, batch * M,
                     p.tokens, at.thread);
            const int token = batch * M + at.thread;
            if (at.thread < M)
                shared.lr[(batch & 1) * M + at.thread] =
                    token < p.tokens ? rate_at(p, rate_offset + int64_t(token) * p.heads) : 0.0f;
        }
        commit_copies();
    };
    fetch_batch(p.batches - 1);

    const float *states = p.trace_w + int64_t(head) * trace_states(p.batches) * L::state_size;
    typename L::State w, dw;
    load_state<L>(w, states + (trace_states(p.batches) - 1) * L::state_size, at.thread);
    read_state<L>(dw, p.dw_next ? p.dw_next + int64_t(head) * D * D : nullptr,
                  p.db_next ? p.db_next + int64_t(head) * D : nullptr, at);
    HeadNorm norm;
    norm.load(p, h * D + at.col + 2 * at.t);
    shared.rates.fill(p, at.thread, short_n);
    float mean_gg = 0;
    for (int i = 0; i < D; ++i)
        mean_gg += p.g[h * D + i] * p.g[h * D + i];
    mean_gg /= float(D);
    // Of the losses, as factors of |LN(z) - target|^2 / 2.
    float weight[3] = {0, 0, 0};
    if (p.dloss)
#pragma unroll
        for (int i = 0; i < 3; ++i)
            weight[i] = p.dloss[s * 3 + i] * 2 / (float(D) * float(p.heads) * float(p.batches));
    float *const probe_dz = shared.probe + D + 4, *const probe_dtarget = probe_dz + D,
                 *const probe_dkey = probe_dtarget + D, *const probe_dg = probe_dkey + D,
                 *const probe_db = probe_dg + D;
    if (at.thread < D)
        probe_dg[at.thread] = probe_db[at.thread] = 0;
    if (weight[2] != 0)
        copy_state<L>(shared.w, w, at);

    // Sums over all tokens: gradients of g and b at this thread's dims; of a_i; of the last a_i
    // through the state, in full mini-batches and in a short last one; of token rates by key.
    float dg[2][2] = {}, db[2][2] = {}, da[mt][2] = {}, da_last = 0, da_short = 0, dtoken[mt] = {};

    for (int batch = p.batches - 1; batch >= 0; --batch) {
        const bool is_short = batch == p.batches - 1;
        const int n = is_short ? short_n : M;
        const E *k_tile = shared.tile(batch, 0), *v_tile = shared.tile(batch, 1);
        const E *q_tile = shared.tile(batch, 2), *dy_tile = shared.tile(batch, 3);
        const E *p_tile = shared.tile(batch, 4);
        const float *lr = shared.lr + (batch & 1) * M;
        float *parts = shared.parts;
        const int64_t first = int64_t(batch) * M;

        wait_for_copies<0>();
        sync_block();
        if constexpr (stages == 2)
            fetch_batch(batch - 1);
        const float by = shared.rates.f(is_short);
        const bool learns = shared.rates.learns(is_short) != 0;

        if (weight[2] != 0) {
            probe<L>(
                p, shared.probe, probe_dg, shared.block, shared.w, k_tile + (n - 1) * L::ld,
                [&](int i) {
                    const int from = (n - 1) * L::ld + i;
                    return to_float(v_tile[from]) - to_float(k_tile[from]) - p.b[h * D + i];
                },
                h, weight[2], at, [] { sync_block(); });
            each_element<L>(dw, at, [&](float &x, int in, int out) {
                if (in <= D)
                    x += shared.probe[in] * probe_dz[out];
            });
        }
        copy_state<L>(shared.dw, dw, at);
        if (learns)
            add_outer<L, true>(w, k_tile, p_tile, at);
        if (batch % trace_every == 0)
            load_state<L>(w, states + batch / trace_every * L::state_size, at.thread);
        copy_state<L>(shared.w, w, at);

        // Z, U and their norms' sums
        typename L::Rows z, u, products_p; // products_p: sum_j (q_i k_j + 1) P_j
        {
            const E *const from[2] = {k_tile, q_tile};
            typename L::Rows *const to[2] = {&z, &u};
            products<L, 2>(to, from, w, at);
        }
#pragma unroll
        for (int i = 0; i < mt; ++i) {
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    products_p[i][nt][e] = 0;
#pragma unroll
            for (int j = 0; j <= i; ++j) {
                float c[2][4] = {};
                row_products<L>(c, q_tile + 16 * i * L::ld, k_tile + 16 * j * L::ld, at.lane);
#pragma unroll
                for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = 16 * i + at.g + 8 * (e >> 1);
                        const int key = 16 * j + 8 * jj + 2 * at.t + (e & 1);
                        c[jj][e] = key <= row + p.causal_k ? c[jj][e] + 1 : 0.0f;
                    }
                FragA<E> a;
                FragB<E> b[2];
                a_of(a, c[0], c[1]);
                load_b_transposed(b, p_tile + 16 * j * L::ld + at.col, L::ld, at.lane);
                mma(products_p[i][0], a, b[0]);
                mma(products_p[i][1], a, b[1]);
            }
            float goal[2][4], sum[2][8] = {};
            goals<L>(goal, k_tile + 16 * i * L::ld, v_tile + 16 * i * L::ld, norm, at);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = 16 * i + at.g + 8 * half;
                    const float a = shared.rates.a(is_short, row);
                    const float2 dy =
                        floats(pair_at(dy_tile + row * L::ld + at.col + 8 * nt + 2 * at.t));
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int x = 2 * half + e;
                        u[i][nt][x] += a * products_p[i][nt][x];
                        add_loss_sums(sum[half], z[i][nt][x], norm.g[nt][e], goal[nt][x]);
                        const float ge = norm.g[nt][e] * (e ? dy.y : dy.x);
                        sum[half][5] += u[i][nt][x] * u[i][nt][x];
                        sum[half][6] += ge;
                        sum[half][7] += ge * u[i][nt][x];
                    }
                }
            RowSums::put(parts + i * L::warps * 128, sum[0], sum[1], at);
        }
        sync_block();

        // du
        float r[mt][2], mean_u[mt][2], mean_uh[mt][2];
        float own_u[mt], own_uh[mt], own_ggh[mt], own_gghh[mt]; // of token g + 8 (t % 2)
        float squares = 0;
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float sum[8], r_u[2], mean_e[2], mean_eh[2], goal[2][4];
            RowSums::get(sum, parts + m * L::warps * 128, L::warps, at);
            const LossStats stats(sum, float(D), p.eps);
            own_u[m] = stats.mean_u;
            own_uh[m] = stats.mean_uh;
            own_ggh[m] = stats.r * sum[1] / float(D);
            own_gghh[m] = stats.r * stats.r * sum[2] / float(D);
            RowSums::spread(r[m], stats.r, at);
            RowSums::spread(mean_u[m], stats.mean_u, at);
            RowSums::spread(mean_uh[m], stats.mean_uh, at);
            const float own_r = inverse_root(sum[5] / float(D) + p.eps);
            RowSums::spread(r_u, own_r, at);
            RowSums::spread(mean_e, sum[6] / float(D), at);
            RowSums::spread(mean_eh, own_r * sum[7] / float(D), at);
            if (p.max_norm > 0)
                goals<L>(goal, k_tile + 16 * m * L::ld, v_tile + 16 * m * L::ld, norm, at);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + at.g + 8 * half;
                float along = 0;
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    const int at_tile = row * L::ld + at.col + 8 * nt + 2 * at.t;
                    const float2 dy = floats(pair_at(dy_tile + at_tile));
                    float du[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int x = 2 * half + e;
                        const float upstream = e ? dy.y : dy.x, hu = r_u[half] * u[m][nt][x];
                        dg[nt][e] += upstream * hu;
                        db[nt][e] += upstream;
                        du[e] = r_u[half] *
                                (norm.g[nt][e] * upstream - mean_e[half] - hu * mean_eh[half]);
                        along += du[e] * products_p[m][nt][x];
                        if (p.max_norm > 0 && row < n) {
                            const float raw =
                                loss_gradient(z[m][nt][x], norm.g[nt][e], goal[nt][x], r[m][half],
                                              mean_u[m][half], mean_uh[m][half]);
                            squares += raw * raw;
                        }
                    }
                    store_pair(shared.du + at_tile, du[0], du[1]);
                }
                da[m][half] += along / by;
            }
        }
        float factor = 1, length = 1;
        if (p.max_norm > 0) {
            length = sqrtf(block_sum<L::warps>(squares, shared.block, at));
            factor = fminf(1.0f, p.max_norm / (length + 1e-6f));
        }
        sync_warp(); // of du, a warp reads its own dims until the last barrier

        // dP
        typename L::Rows d;
        {
            const E *const from[1] = {k_tile};
            typename L::Rows *const to[1] = {&d};
            products<L, 1>(to, from, dw, at);
        }
        if (!p.by_key) {
            float along = 0;
#pragma unroll
            for (int m = 0; m < mt; ++m)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 x =
                            floats(pair_at(p_tile + (16 * m + at.g + 8 * half) * L::ld + at.col +
                                           8 * nt + 2 * at.t));
                        along += x.x * d[m][nt][2 * half] + x.y * d[m][nt][2 * half + 1];
                    }
            (is_short && n < M ? da_short : da_last) += along / by;
        }
        if (!learns)
#pragma unroll
            for (int m = 0; m < mt; ++m)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        d[m][nt][e] = 0;
#pragma unroll
        for (int j = 0; j < mt; ++j)
#pragma unroll
            for (int i = j; i < mt; ++i) {
                float c[2][4] = {};
                row_products<L>(c, k_tile + 16 * j * L::ld, q_tile + 16 * i * L::ld, at.lane);
#pragma unroll
                for (int ii = 0; ii < 2; ++ii)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int key = 16 * j + at.g + 8 * (e >> 1);
                        const int row = 16 * i + 8 * ii + 2 * at.t + (e & 1);
                        c[ii][e] = key <= row + p.causal_k
                                       ? (c[ii][e] + 1) * shared.rates.a(is_short, row)
                                       : 0.0f;
                    }
                FragA<E> a;
                FragB<E> b[2];
                a_of(a, c[0], c[1]);
                load_b_transposed(b, shared.du + 16 * i * L::ld + at.col, L::ld, at.lane);
                mma(d[j][0], a, b[0]);
                mma(d[j][1], a, b[1]);
            }

        // dG, through the clip, and the sums that dz needs
        float *parts_2 = shared.parts + mt * L::warps * 128, inward = 0;
        if (p.max_norm > 0) {
            float along = 0;
#pragma unroll
            for (int m = 0; m < mt; ++m) {
                float goal[2][4];
                goals<L>(goal, k_tile + 16 * m * L::ld, v_tile + 16 * m * L::ld, norm, at);
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int half = e >> 1, row = 16 * m + at.g + 8 * half;
                        const float raw =
                            loss_gradient(z[m][nt][e], norm.g[nt][e & 1], goal[nt][e], r[m][half],
                                          mean_u[m][half], mean_uh[m][half]);
                        along += -by * shared.rates.c(row) * lr[row] * d[m][nt][e] * raw;
                    }
            }
            sync_block(); // the sum before has been read
            along = block_sum<L::warps>(along, shared.block, at);
            if (factor < 1)
                inward = along * factor / ((length + 1e-6f) * length);
        }
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float goal[2][4], sum[2][8] = {};
            goals<L>(goal, k_tile + 16 * m * L::ld, v_tile + 16 * m * L::ld, norm, at);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + at.g + 8 * half;
                const float c = -by * shared.rates.c(row) * lr[row];
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int x = 2 * half + e;
                        const float g = norm.g[nt][e], h = r[m][half] * z[m][nt][x];
                        const float raw = loss_gradient(z[m][nt][x], g, goal[nt][x], r[m][half],
                                                        mean_u[m][half], mean_uh[m][half]);
                        sum[half][5] += factor * raw * d[m][nt][x];
                        const float dgradient =
                            row < n ? factor * c * d[m][nt][x] - inward * raw : 0.0f;
                        const float er = r[m][half] * dgradient;
                        d[m][nt][x] = er;
                        sum[half][0] += er;
                        sum[half][1] += er * h;
                        sum[half][2] += g * g * er;
                        sum[half][3] += g * g * h * er;
                        sum[half][4] += goal[nt][x] * g * er;
                    }
            }
            RowSums::put(parts_2 + m * L::warps * 128, sum[0], sum[1], at);
        }
        sync_block();

        // dz, dv and that part of dk; lr
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float sum[8], mean_e[2], mean_eh[2], mean_dh[2], along_h[2], goal[2][4];
            RowSums::get(sum, parts_2 + m * L::warps * 128, L::warps, at);
            const float own_e = sum[0] / float(D), own_eh = sum[1] / float(D);
            const float own_dh = sum[2] / float(D) - own_e * mean_gg - own_eh * own_ggh[m] -
                                 own_e * own_uh[m] - own_u[m] * own_eh;
            const float own_along =
                sum[3] / float(D) - own_e * own_ggh[m] - own_eh * own_gghh[m] - // mean(g^2 h x)
                2 * own_eh * own_uh[m] +                                        // mean(dh h)
                (sum[3] - sum[4]) / float(D) - own_e * own_u[m] - own_eh * own_uh[m];
            RowSums::spread(mean_e, own_e, at);
            RowSums::spread(mean_eh, own_eh, at);
            RowSums::spread(mean_dh, own_dh, at);
            RowSums::spread(along_h, own_along, at);
            goals<L>(goal, k_tile + 16 * m * L::ld, v_tile + 16 * m * L::ld, norm, at);
            if (at.warp == 0 && at.t < 2) {
                const int row = 16 * m + at.g + 8 * at.t;
                const float dc = -by * sum[5];
                const int64_t to = rate_offset + (first + row) * p.heads;
                if (row < n) {
                    if (p.rate_bf16)
                        store(static_cast<Bf16 *>(p.dlr) + to, dc * shared.rates.c(row));
                    else
                        static_cast<float *>(p.dlr)[to] = dc * shared.rates.c(row);
                    dtoken[m] += p.scale * lr[row] * dc;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + at.g + 8 * half;
                const float before = row == n - 1 ? weight[1] : 0.0f;
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    float dz[2], dtarget[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int x = 2 * half + e;
                        const float g = norm.g[nt][e], h = r[m][half] * z[m][nt][x];
                        const float residual = g * h - goal[nt][x], uu = g * residual;
                        const float er = d[m][nt][x], dx = er - mean_e[half] - h * mean_eh[half];
                        const float dh = g * g * dx - er * mean_uh[m][half] - uu * mean_eh[half];
                        dz[e] =
                            r[m][half] * (dh - mean_dh[half] - h * along_h[half] +
                                          before * (uu - mean_u[m][half] - h * mean_uh[m][half]));
                        dtarget[e] = -g * dx - before * residual;
                        dg[nt][e] += dx * (residual + g * h) + before * residual * h;
                        db[nt][e] += dx * g + before * residual;
                    }
                    const int dim = at.col + 8 * nt + 2 * at.t;
                    store_pair(shared.dz + row * L::ld + dim, dz[0], dz[1]);
                    if (row == n - 1 && weight[2] != 0) {
                        dtarget[0] += probe_dtarget[dim];
                        dtarget[1] += probe_dtarget[dim + 1];
                    }
                    if (row == n - 1 && weight[0] != 0)
                        store_pair(last_rows_at(batch) + D + dim, dtarget[0], dtarget[1]);
                    if (row < n)
                        store_pair(static_cast<E *>(p.dv) + offset + (first + row) * width + dim,
                                   dtarget[0], dtarget[1]);
                    d[m][nt][2 * half] = -dtarget[0];
                    d[m][nt][2 * half + 1] = -dtarget[1];
                }
            }
        }
        sync_block();

        // dq and dk of this warp's dims as inputs
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            if (learns)
                add_products<L>(d[m], p_tile + 16 * m * L::ld, shared.dw, at);
            add_products<L>(d[m], shared.dz + 16 * m * L::ld, shared.w, at);
#pragma unroll
            for (int i = m; i < mt; ++i) { // keys m, queries i
                float c[2][4] = {};
                row_products<L>(c, p_tile + 16 * m * L::ld, shared.du + 16 * i * L::ld, at.lane);
#pragma unroll
                for (int ii = 0; ii < 2; ++ii)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int key = 16 * m + at.g + 8 * (e >> 1);
                        const int row = 16 * i + 8 * ii + 2 * at.t + (e & 1);
                        c[ii][e] = key <= row + p.causal_k
                                       ? c[ii][e] * shared.rates.a(is_short, row)
                                       : 0.0f;
                    }
                FragA<E> a;
                FragB<E> b[2];
                a_of(a, c[0], c[1]);
                load_b_transposed(b, q_tile + 16 * i * L::ld + at.col, L::ld, at.lane);
                mma(d[m][0], a, b[0]);
                mma(d[m][1], a, b[1]);
            }
            float dq[2][4];
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 dy = floats(pair_at(dy_tile + (16 * m + at.g + 8 * half) * L::ld +
                                                     at.col + 8 * nt + 2 * at.t));
                    dq[nt][2 * half] = dy.x;
                    dq[nt][2 * half + 1] = dy.y;
                }
            add_products<L>(dq, shared.du + 16 * m * L::ld, shared.w, at);
#pragma unroll
            for (int j = 0; j <= m; ++j) { // queries m, keys j
                float c[2][4] = {};
                row_products<L>(c, shared.du + 16 * m * L::ld, p_tile + 16 * j * L::ld, at.lane);
#pragma unroll
                for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = 16 * m + at.g + 8 * (e >> 1);
                        const int key = 16 * j + 8 * jj + 2 * at.t + (e & 1);
                        c[jj][e] = key <= row + p.causal_k
                                       ? c[jj][e] * shared.rates.a(is_short, row)
                                       : 0.0f;
                    }
                FragA<E> a;
                FragB<E> b[2];
                a_of(a, c[0], c[1]);
                load_b_transposed(b, k_tile + 16 * j * L::ld + at.col, L::ld, at.lane);
                mma(dq[0], a, b[0]);
                mma(dq[1], a, b[1]);
            }
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = 16 * m + at.g + 8 * half, dim = at.col + 8 * nt + 2 * at.t;
                    if (row >= n)
                        continue;
                    const int64_t to = offset + (first + row) * width + dim;
                    float dk[2] = {d[m][nt][2 * half], d[m][nt][2 * half + 1]};
                    if (row == n - 1 && weight[2] != 0) {
                        dk[0] += probe_dkey[dim];
                        dk[1] += probe_dkey[dim + 1];
                    }
                    if (row == n - 1 && weight[0] != 0)
                        store_pair(last_rows_at(batch) + dim, dk[0], dk[1]);
                    store_pair(static_cast<E *>(p.dk) + to, dk[0], dk[1]);
                    store_pair(static_cast<E *>(p.dq) + to, dq[nt][2 * half], dq[nt][2 * half + 1]);
                }
        }
        add_outer<L>(dw, k_tile, shared.dz, at);
        add_outer<L>(dw, q_tile, shared.du, at);
        if constexpr (stages == 1) {
            sync_block();
            fetch_batch(batch - 1);
        }
    }

    if (weight[0] != 0) { // the error under the initial state, whose copy is there
        sync_block();
        for (int batch = 0; batch < p.batches; ++batch) {
            const int64_t row = offset + int64_t(min((batch + 1) * M, p.tokens) - 1) * width;
            probe<L>(
                p, shared.probe, probe_dg, shared.block, shared.w,
                static_cast<const E *>(p.k) + row,
                [&](int i) {
                    return to_float(static_cast<const E *>(p.v)[row + i]) -
                           to_float(static_cast<const E *>(p.k)[row + i]) - p.b[h * D + i];
                },
                h, weight[0], at, [] { sync_block(); });
            each_element<L>(dw, at, [&](float &x, int in, int out) {
                if (in <= D)
                    x += shared.probe[in] * probe_dz[out];
            });
            if (at.thread < D) {
                const float dtarget = probe_dtarget[at.thread];
                const float *rest = last_rows_at(batch) + at.thread;
                store(static_cast<E *>(p.dk) + row + at.thread,
                      rest[0] + probe_dkey[at.thread] - dtarget);
                store(static_cast<E *>(p.dv) + row + at.thread, rest[D] + dtarget);
            }
            sync_block();
        }
    }

    each_element<L>(dw, at, [&](float &x, int in, int out) {
        if (in < D)
            p.dw[(int64_t(head) * D + in) * D + out] = x;
        else if (in == D)
            p.db1[int64_t(head) * D + out] = x;
    });
    float *part = p.part + int64_t(head) * (2 * D + M);
    sync_block();
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
                part[dim] = x + probe_dg[dim];
                part[D + dim] = y + probe_db[dim];
            }
        }
    float *rates = shared.parts; // [warps][M]
#pragma unroll
    for (int m = 0; m < mt; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x = da[m][half];
            x += from_lane_xor(x, 1);
            x += from_lane_xor(x, 2);
            if (at.t == 0)
                rates[at.warp * M + 16 * m + at.g + 8 * half] = x;
        }
    float last[8] = {da_last, da_short};
    block_sums<L>(last, shared.block, at, [] { sync_block(); });
    if (p.by_key) {
        if (at.warp == 0 && at.t < 2)
#pragma unroll
            for (int m = 0; m < mt; ++m)
                part[2 * D + 16 * m + at.g + 8 * at.t] = dtoken[m];
    } else if (at.thread < M) {
        float x = at.thread == M - 1 ? last[0] : 0.0f;
        if (at.thread == short_n - 1 && short_n < M)
            x += last[1];
        for (int i = 0; i < L::warps; ++i)
            x += rates[i * M + at.thread];
        part[2 * D + at.thread] = p.scale * x;
    }
}

template <class L> constexpr int reverse_stages() {
    constexpr int fixed = 2 * L::tile_bytes + 2 * L::D * L::ld * int(sizeof(typename L::E)) +
                          2 * L::mt * L::warps * 512;
    return fixed + 10 * L::tile_bytes <= 150 * 1024 ? 2 : 1;
}
// Blocks of one multiprocessor that registers are kept low for.
template <class L> constexpr int reverse_resident() {
    return L::threads <= 128 && L::M == 16 && sizeof(typename L::E) == 2 ? 3 : 1;
}
template <class L> constexpr bool reverse_has_roles() {
    return L::M == 16 && L::D <= 64 && sizeof(typename L::E) == 2;
}
template <class L> size_t reverse_shared() {
    return size_t(ReverseShared<L, reverse_stages<L>()>(nullptr).size);
}
template <class L> size_t reverse_roles_shared() {
    return size_t(ReverseRolesShared<L>(nullptr).size);
}

template <class E, int M>
cudaError_t LinearReverse<E, M>::run(const TttLinearShape &shape, const LinearParams &p,
                                     cudaStream_t stream) {
    return visit_dim<E, M>(shape, [&](auto l) {
        using L = decltype(l);
        const unsigned heads = unsigned(p.streams * p.heads);
        if constexpr (reverse_has_roles<L>())
            if (shape.kernel != 1 && reverse_roles_shared<L>() <= size_t(DeviceLimits().shared))
                return launch(linear_reverse_roles<L>, heads, reverse_roles_threads<L>(),
                              reverse_roles_shared<L>(), stream, p);
        return launch(linear_reverse<L, reverse_stages<L>(), reverse_resident<L>()>, heads,
                      L::threads, reverse_shared<L>(), stream, p);
    });
}

template <class E, int M> const char *LinearReverse<E, M>::misses(const TttLinearShape &shape) {
    return visit_dim<E, M>(shape, [](auto l) {
        using L = decltype(l);
        return shared_misses(reverse_shared<L>());
    });
}

} // namespace ponder::cuda
