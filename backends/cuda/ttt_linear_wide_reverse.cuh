// ttt_linear_vjp on clusters: equations and notation as in ttt_linear_reverse.cuh, blocks as in
// ttt_linear_wide.cuh.
//
// W and dW of a block's outputs lie in shared memory, in f32. A product that sums over outputs is a
// sum over blocks: each finds its outputs' part of dk and dq for all inputs and sends it to the
// block that has these inputs as outputs, sixteen tokens at a time.
#pragma once

#include "ttt_linear_host.hpp"
#include "ttt_linear_wide.cuh"

namespace ponder::cuda {

template <class L> struct WideReverseShared {
    using E = typename L::E;
    using Own = OwnColumns<L>;
    E *k, *q, *v, *dy, *p, *du, *dz;
    E *products, *rated; // under the causal mask; with the queries' rates
    float *w, *dw;       // [own, D + 8], output by input, then the bias
    float *lr;
    float *key, *dkey;                     // of one token, see wide_probe: [D] and 1, [D]
    float *dz_key, *dtarget_key, *dg, *db; // [own]
    Exchange<L> exchange;
    Rates<L::M> rates;
    int size;
    __host__ __device__ constexpr explicit WideReverseShared(unsigned char *base) {
        SharedLayout s(base);
        k = s.take<E>(L::tile);
        q = s.take<E>(L::tile);
        v = s.take<E>(Own::tile);
        dy = s.take<E>(Own::tile);
        p = s.take<E>(Own::tile);
        du = s.take<E>(Own::tile);
        dz = s.take<E>(Own::tile);
        products = s.take<E>(L::M * causal_ld<L>);
        rated = s.take<E>(L::M * causal_ld<L>);
        w = s.take<float>(L::own * L::ld);
        dw = s.take<float>(L::own * L::ld);
        lr = s.take<float>(L::M);
        key = s.take<float>(L::D + 4);
        dkey = s.take<float>(L::D);
        dz_key = s.take<float>(L::own);
        dtarget_key = s.take<float>(L::own);
        dg = s.take<float>(L::own);
        db = s.take<float>(L::own);
        constexpr int inputs = 2 * 16 * L::D, rows = Exchange<L>::row_parts; // floats of dk and dq
        exchange = {s.take<float>(inputs > rows ? inputs : rows)};
        rates = {s.take<float>(3 * L::M + 4)};
        size = s.size();
    }
    // Where block `from` puts its part of dk (0) or dq (1) of 16 tokens and eight inputs in the box
    // of their block: a result's four elements for each lane.
    __device__ float4 *inputs_at(int from, int eight, int which, int lane) const {
        return reinterpret_cast<float4 *>(exchange.box) +
               ((from * (L::own / 8) + eight) * 2 + which) * 32 + lane;
    }
};

// A state of the trace; each warp its own outputs.
template <class L>
__device__ __forceinline__ void load_wide_state(float *to, const float *from,
                                                const ClusterPlace<L> &at) {
#pragma unroll 8
    for (int j = 0; j < 2 * L::kt + 1; ++j) {
        const float4 x =
            *reinterpret_cast<const float4 *>(from + (j * L::state_threads + at.head_thread) * 4);
        float *row = to + (16 * at.warp + at.g) * L::ld + 8 * j + 2 * at.t;
        store_pair(row, x.x, x.y);
        store_pair(row + 8 * L::ld, x.z, x.w);
    }
}

// z = x W + b for the rows of one tile or two.
template <class L, int count>
__device__ __forceinline__ void wide_products(typename L::Rows *const (&z)[count],
                                              const typename L::E *const (&x)[count],
                                              const float *w, const Place &at) {
    using E = typename L::E;
    const float *own = w + 16 * at.warp * L::ld;
#pragma unroll
    for (int nt = 0; nt < 2; ++nt)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float bias = own[(8 * nt + 2 * at.t + e) * L::ld + L::D];
#pragma unroll
            for (int i = 0; i < count; ++i)
#pragma unroll
                for (int m = 0; m < L::mt; ++m)
                    (*z[i])[m][nt][e] = (*z[i])[m][nt][2 + e] = bias;
        }
#pragma unroll 4
    for (int k = 0; k < L::kt; ++k) {
        FragB<E> b[2];
        load_b(b, own + 16 * k, L::ld, at.lane);
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
            for (int m = 0; m < L::mt; ++m) {
                FragA<E> a;
                load_a(a, x[i] + 16 * m * L::ld + 16 * k, L::ld, at.lane);
                mma((*z[i])[m][0], a, b[0]);
                mma((*z[i])[m][1], a, b[1]);
            }
    }
}

// W += x^T p, b += sum p, or -=, for tiles x and a warp's own columns of tiles p. Sums of the
// products are added apart, see add_outer.
template <class L, bool minus, int count>
__device__ __forceinline__ void add_wide_outer(float *w, const typename L::E *const (&x)[count],
                                               const typename L::E *const (&p)[count],
                                               const Place &at) {
    using E = typename L::E;
    constexpr int own_ld = OwnColumns<L>::ld;
    FragA<E> a[count][L::mt];
    FragB<E> ones;
    b_of_ones(ones, at.lane);
    float bias[4] = {};
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
        for (int m = 0; m < L::mt; ++m) {
            load_a_transposed(a[i][m], p[i] + 16 * m * own_ld + 16 * at.warp, own_ld, at.lane);
            if (minus)
                negate(a[i][m]);
            mma(bias, a[i][m], ones);
        }
    float *const own = w + (16 * at.warp + at.g) * L::ld;
    if (at.t == 0) {
        own[L::D] += bias[0];
        own[8 * L::ld + L::D] += bias[2];
    }
#pragma unroll 4
    for (int k = 0; k < L::kt; ++k) {
        float c[2][4] = {};
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
            for (int m = 0; m < L::mt; ++m) {
                FragB<E> b[2];
                load_b_transposed(b, x[i] + 16 * m * L::ld + 16 * k, L::ld, at.lane);
                mma(c[0], a[i][m], b[0]);
                mma(c[1], a[i][m], b[1]);
            }
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float *to = own + 8 * half * L::ld + 16 * k + 8 * j + 2 * at.t;
                const float2 before = floats(pair_at(to));
                store_pair(to, before.x + c[j][2 * half], before.y + c[j][2 * half + 1]);
            }
    }
}

// Gradient of `weight` |LN(z) - target|^2 / 2 for one key under W; goal_of(i) is target - b of the
// block's own dim i. Leaves in shared memory: the key and 1, dz and dtarget of the own dims, the
// own dims' part of dkey; adds to dW and to gradients of g and b.
template <class L, class Goal>
__device__ __forceinline__ void
wide_probe(const LinearParams &p, const WideReverseShared<L> &shared, const typename L::E *key,
           Goal goal_of, int h, float weight, const ClusterPlace<L> &at) {
    constexpr int D = L::D;
    for (int i = at.thread; i <= D; i += L::threads)
        shared.key[i] = i < D ? to_float(key[i]) : 1.0f;
    sync_block();
    const int dim = 16 * at.warp + at.lane; // of the first 16 lanes
    float z = 0, goal = 0, g = 0, s[8] = {};
    for (int o = 0; o < 16; ++o) {
        float x = 0;
        for (int c = at.lane; c <= D; c += 32)
            x += shared.key[c] * shared.w[(16 * at.warp + o) * L::ld + c];
        for (int l = 16; l > 0; l /= 2)
            x += from_lane_xor(x, l);
        if (at.lane == o)
            z = x;
    }
    if (at.lane < 16) {
        g = p.g[h * D + at.col + at.lane];
        goal = goal_of(dim);
        add_loss_sums(s, z, g, goal);
    }
    shared.exchange.total(s, at);
    if (at.lane < 16) {
        const LossStats stats(s, float(D), p.eps);
        const float residual = g * stats.r * z - goal;
        shared.dz_key[dim] =
            weight * loss_gradient(z, g, goal, stats.r, stats.mean_u, stats.mean_uh);
        shared.dtarget_key[dim] = -weight * residual;
        shared.dg[dim] += weight * residual * stats.r * z;
        shared.db[dim] += weight * residual;
    }
    sync_block();
    for (int i = at.thread; i < D; i += L::threads) {
        float sum = 0;
        for (int o = 0; o < L::own; ++o)
            sum += shared.dz_key[o] * shared.w[o * L::ld + i];
        shared.dkey[i] = sum;
    }
    for (int o = 16 * at.warp; o < 16 * at.warp + 16; ++o)
        for (int i = at.lane; i <= D; i += 32)
            shared.dw[o * L::ld + i] += shared.key[i] * shared.dz_key[o];
    sync_block();
}

template <class L>
__global__ void __launch_bounds__(L::threads, 1)
    linear_wide_reverse(const __grid_constant__ LinearParams p) {
    if constexpr (!has_clusters)
        return;
    using E = typename L::E;
    using Shared = WideReverseShared<L>;
    using Own = OwnColumns<L>;
    constexpr int D = L::D, M = L::M, mt = L::mt;
    static_assert(Shared(nullptr).size <= 227 * 1024);
    const ClusterPlace<L> at;
    const Shared shared(kept_shared_memory());
    const Exchange<L> &exchange = shared.exchange;
    const int head = int(blockIdx.x) / L::split, s = head / p.heads, h = head % p.heads;
    const int width = p.heads * D;
    const int64_t offset = int64_t(s) * p.tokens * width + h * D;
    const int64_t rate_offset = int64_t(s) * p.tokens * p.heads + h;
    const int short_n = p.tokens - (p.batches - 1) * M;
    const int own = 16 * at.warp + 2 * at.t; // this thread's first dim of the block's own

    const auto last_rows_at = [&](int batch) {
        return p.last_rows + (int64_t(head) * p.batches + batch) * 2 * D;
    };
    const auto fetch_batch = [&](int batch) {
        if (batch >= 0) {
            const int64_t columns = offset + at.rank * L::own;
            const int first = batch * M;
            fetch<L>(shared.k, p.k, offset, width, first, p.tokens, at.thread);
            fetch<L>(shared.q, p.q, offset, width, first, p.tokens, at.thread);
            fetch<Own>(shared.v, p.v, columns, width, first, p.tokens, at.thread);
            fetch<Own>(shared.dy, p.dy ? p.dy : p.q, columns, width, first, p.dy ? p.tokens : 0,
                       at.thread);
            fetch<Own>(shared.p, p.trace_p, int64_t(head) * p.tokens * D + at.rank * L::own, D,
                       first, p.tokens, at.thread);
            if (at.thread < M)
                shared.lr[at.thread] =
                    first + at.thread < p.tokens
                        ? rate_at(p, rate_offset + int64_t(first + at.thread) * p.heads)
                        : 0.0f;
        }
        commit_copies();
    };
    exchange.close(); // nothing in the box: the first to open it waits for all blocks to be there
    fetch_batch(p.batches - 1);

    const float *states = p.trace_w + int64_t(head) * trace_states(p.batches) * L::state_size;
    load_wide_state<L>(shared.w, states + (trace_states(p.batches) - 1) * L::state_size, at);
    for (int i = at.thread; i < L::ld * L::own; i += L::threads) {
        const int in = i / L::own, o = i % L::own, out = at.rank * L::own + o;
        float x = 0;
        if (in < D)
            x = p.dw_next ? p.dw_next[(int64_t(head) * D + in) * D + out] : 0.0f;
        else if (in == D)
            x = p.db_next ? p.db_next[int64_t(head) * D + out] : 0.0f;
        shared.dw[o * L::ld + in] = x;
    }
    if (at.thread < L::own)
        shared.dg[at.thread] = shared.db[at.thread] = 0;
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

    // Sums over all tokens: gradients of g and b at this thread's dims; of a_i; of the last a_i
    // through the state, in full mini-batches and in a short last one; of token rates by key.
    float dg[2][2] = {}, db[2][2] = {}, da[mt][2] = {}, da_last[2] = {}, dtoken[mt] = {};

    for (int batch = p.batches - 1; batch >= 0; --batch) {
        const bool is_short = batch == p.batches - 1;
        const int n = is_short ? short_n : M;
        const int64_t first = int64_t(batch) * M;

        wait_for_copies<0>();
        sync_block(); // the tiles have come
        const float by = shared.rates.f(is_short);
        const bool learns = uniform(shared.rates.learns(is_short) != 0);

        if (weight[2] != 0)
            wide_probe<L>(
                p, shared, shared.k + (n - 1) * L::ld,
                [&](int i) {
                    return to_float(shared.v[(n - 1) * Own::ld + i]) -
                           to_float(shared.k[(n - 1) * L::ld + at.rank * L::own + i]) -
                           p.b[h * D + at.rank * L::own + i];
                },
                h, weight[2], at);
        if (learns) {
            const E *const x[1] = {shared.k}, *const y[1] = {shared.p};
            add_wide_outer<L, true, 1>(shared.w, x, y, at);
        }
        sync_warp();
        if (batch % trace_every == 0)
            load_wide_state<L>(shared.w, states + batch / trace_every * L::state_size, at);
        sync_warp(); // a warp reads its own outputs until the next barrier

        // Z, U and their norms' sums
        typename L::Rows z, u, products_p, d; // products_p: sum_j (q_i k_j + 1) P_j
        {
            const E *const from[2] = {shared.k, shared.q};
            typename L::Rows *const to[2] = {&z, &u};
            wide_products<L, 2>(to, from, shared.w, at);
        }
        causal_products<L>(shared.q, shared.k, 1, p.causal_k, at,
                           [&](int row, int key, float x, float y) {
                               const float a = shared.rates.a(is_short, row);
                               const int to = row * causal_ld<L> + key;
                               store_pair(shared.products + to, x, y);
                               store_pair(shared.rated + to, a * x, a * y);
                           });
        sync_block();
        exchange.open();
#pragma unroll
        for (int i = 0; i < mt; ++i) {
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    products_p[i][nt][e] = 0;
#pragma unroll
            for (int j = 0; j <= i; ++j) {
                FragA<E> a;
                FragB<E> b[2];
                load_a(a, shared.products + 16 * i * causal_ld<L> + 16 * j, causal_ld<L>, at.lane);
                load_b_transposed(b, shared.p + 16 * j * Own::ld + 16 * at.warp, Own::ld, at.lane);
                mma(products_p[i][0], a, b[0]);
                mma(products_p[i][1], a, b[1]);
            }
            float goal[2][4], sum[2][8] = {};
            own_goals<L>(goal, shared.k + 16 * i * L::ld, shared.v + 16 * i * Own::ld, norm, at);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = 16 * i + at.g + 8 * half;
                    const float a = shared.rates.a(is_short, row);
                    const float2 dy = floats(pair_at(shared.dy + row * Own::ld + own + 8 * nt));
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
            exchange.put_rows(i, sum[0], sum[1], at);
        }
        exchange.send();

        // dP but for what comes by way of outputs
        {
            const E *const from[1] = {shared.k};
            typename L::Rows *const to[1] = {&d};
            wide_products<L, 1>(to, from, shared.dw, at);
        }
        if (!p.by_key) {
            float along = 0;
#pragma unroll
            for (int m = 0; m < mt; ++m)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 x = floats(pair_at(
                            shared.p + (16 * m + at.g + 8 * half) * Own::ld + own + 8 * nt));
                        along += x.x * d[m][nt][2 * half] + x.y * d[m][nt][2 * half + 1];
                    }
            const bool all = n == M;
            da_last[0] += all ? along / by : 0.0f;
            da_last[1] += all ? 0.0f : along / by;
        }
        if (!learns)
#pragma unroll
            for (int m = 0; m < mt; ++m)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        d[m][nt][e] = 0;
        exchange.receive();

        // du
        float r[mt][2], mean_u[mt][2], mean_uh[mt][2];
        float own_u[mt], own_uh[mt], own_ggh[mt], own_gghh[mt]; // of token g + 8 (t % 2)
        float squares[1] = {0};
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float sum[8], r_u[2], mean_e[2], mean_eh[2], goal[2][4];
            exchange.get_rows(sum, m, at);
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
                own_goals<L>(goal, shared.k + 16 * m * L::ld, shared.v + 16 * m * Own::ld, norm,
                             at);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + at.g + 8 * half;
                float along = 0;
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    const int at_tile = row * Own::ld + own + 8 * nt;
                    const float2 dy = floats(pair_at(shared.dy + at_tile));
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
                            squares[0] += raw * raw;
                        }
                    }
                    store_pair(shared.du + at_tile, du[0], du[1]);
                }
                da[m][half] += along / by;
            }
        }
        exchange.close();
        float factor = 1, length = 1;
        if (p.max_norm > 0) {
            exchange.total(squares, at);
            length = sqrtf(squares[0]);
            factor = fminf(1.0f, p.max_norm / (length + 1e-6f));
        }
        sync_warp(); // of du, a warp reads its own dims until the next barrier
#pragma unroll
        for (int j = 0; j < mt; ++j)
#pragma unroll
            for (int i = j; i < mt; ++i) {
                FragA<E> a;
                FragB<E> b[2];
                load_a_transposed(a, shared.rated + 16 * i * causal_ld<L> + 16 * j, causal_ld<L>,
                                  at.lane);
                load_b_transposed(b, shared.du + 16 * i * Own::ld + 16 * at.warp, Own::ld, at.lane);
                mma(d[j][0], a, b[0]);
                mma(d[j][1], a, b[1]);
            }

        // dG, through the clip, and the sums that dz needs
        float inward = 0;
        if (p.max_norm > 0) {
            float along[1] = {0};
#pragma unroll
            for (int m = 0; m < mt; ++m) {
                float goal[2][4];
                own_goals<L>(goal, shared.k + 16 * m * L::ld, shared.v + 16 * m * Own::ld, norm,
                             at);
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int half = e >> 1, row = 16 * m + at.g + 8 * half;
                        const float raw =
                            loss_gradient(z[m][nt][e], norm.g[nt][e & 1], goal[nt][e], r[m][half],
                                          mean_u[m][half], mean_uh[m][half]);
                        along[0] += -by * shared.rates.c(row) * shared.lr[row] * d[m][nt][e] * raw;
                    }
            }
            exchange.total(along, at);
            if (factor < 1)
                inward = along[0] * factor / ((length + 1e-6f) * length);
        }
        exchange.open();
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float goal[2][4], sum[2][8] = {};
            own_goals<L>(goal, shared.k + 16 * m * L::ld, shared.v + 16 * m * Own::ld, norm, at);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + at.g + 8 * half;
                const float c = -by * shared.rates.c(row) * shared.lr[row];
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
            exchange.put_rows(m, sum[0], sum[1], at);
        }
        exchange.send();
        // a_i / f (du_i P_j), the own outputs' part, in the place of products that nobody reads any
        // more. The cluster's barriers order what the block's own do here and below, but tools that
        // look for races know the latter alone, which cost nothing beside them.
        sync_block();
        causal_products<Own>(
            shared.du, shared.p, 0, p.causal_k, at, [&](int row, int key, float x, float y) {
                const float a = shared.rates.a(is_short, row);
                store_pair(shared.products + row * causal_ld<L> + key, a * x, a * y);
            });
        exchange.receive();

        // dz, dv and that part of dk; lr
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            float sum[8], mean_e[2], mean_eh[2], mean_dh[2], along_h[2], goal[2][4];
            exchange.get_rows(sum, m, at);
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
            own_goals<L>(goal, shared.k + 16 * m * L::ld, shared.v + 16 * m * Own::ld, norm, at);
            if (at.head_warp == 0 && at.t < 2) {
                const int row = 16 * m + at.g + 8 * at.t;
                const float dc = -by * sum[5];
                const int64_t to = rate_offset + (first + row) * p.heads;
                if (row < n) {
                    if (p.rate_bf16)
                        store(static_cast<Bf16 *>(p.dlr) + to, dc * shared.rates.c(row));
                    else
                        static_cast<float *>(p.dlr)[to] = dc * shared.rates.c(row);
                    dtoken[m] += p.scale * shared.lr[row] * dc;
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
                    store_pair(shared.dz + row * Own::ld + own + 8 * nt, dz[0], dz[1]);
                    if (row == n - 1 && weight[2] != 0) {
                        dtarget[0] += shared.dtarget_key[own + 8 * nt];
                        dtarget[1] += shared.dtarget_key[own + 8 * nt + 1];
                    }
                    const int dim = at.col + 8 * nt + 2 * at.t;
                    if (row == n - 1 && weight[0] != 0)
                        store_pair(last_rows_at(batch) + D + dim, dtarget[0], dtarget[1]);
                    if (row < n)
                        store_pair(static_cast<E *>(p.dv) + offset + (first + row) * width + dim,
                                   dtarget[0], dtarget[1]);
                    d[m][nt][2 * half] = -dtarget[0];
                    d[m][nt][2 * half + 1] = -dtarget[1];
                    const float2 dy = floats(pair_at(shared.dy + row * Own::ld + own + 8 * nt));
                    u[m][nt][2 * half] = dy.x;
                    u[m][nt][2 * half + 1] = dy.y;
                }
            }
        }
        exchange.close();
        sync_block();

        // dk and dq: d and u have what comes without the state
#pragma unroll
        for (int m = 0; m < mt; ++m) {
            exchange.open();
#pragma unroll 1
            for (int in = 16 * at.warp; in < D; in += 16 * L::warps) {
                float dk[2][4] = {}, dq[2][4] = {};
                FragA<E> a;
                FragB<E> b[2];
                const int rows = 16 * m * Own::ld;
#pragma unroll
                for (int out = 0; out < L::own; out += 16) {
                    load_b_transposed(b, shared.w + out * L::ld + in, L::ld, at.lane);
                    load_a(a, shared.dz + rows + out, Own::ld, at.lane);
                    mma(dk[0], a, b[0]);
                    mma(dk[1], a, b[1]);
                    load_a(a, shared.du + rows + out, Own::ld, at.lane);
                    mma(dq[0], a, b[0]);
                    mma(dq[1], a, b[1]);
                    if (learns) {
                        load_b_transposed(b, shared.dw + out * L::ld + in, L::ld, at.lane);
                        load_a(a, shared.p + rows + out, Own::ld, at.lane);
                        mma(dk[0], a, b[0]);
                        mma(dk[1], a, b[1]);
                    }
                }
#pragma unroll
                for (int i = m; i < mt; ++i) {
                    load_a_transposed(a, shared.products + 16 * i * causal_ld<L> + 16 * m,
                                      causal_ld<L>, at.lane);
                    load_b_transposed(b, shared.q + 16 * i * L::ld + in, L::ld, at.lane);
                    mma(dk[0], a, b[0]);
                    mma(dk[1], a, b[1]);
                }
#pragma unroll
                for (int j = 0; j <= m; ++j) {
                    load_a(a, shared.products + 16 * m * causal_ld<L> + 16 * j, causal_ld<L>,
                           at.lane);
                    load_b_transposed(b, shared.k + 16 * j * L::ld + in, L::ld, at.lane);
                    mma(dq[0], a, b[0]);
                    mma(dq[1], a, b[1]);
                }
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    if (weight[2] != 0)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            if (16 * m + at.g + 8 * (e >> 1) == n - 1)
                                dk[nt][e] += shared.dkey[in + 8 * nt + 2 * at.t + (e & 1)];
                    const int eight = in % L::own / 8 + nt, to = in / L::own;
                    *in_block(shared.inputs_at(at.rank, eight, 0, at.lane),
                              to) = {dk[nt][0], dk[nt][1], dk[nt][2], dk[nt][3]};
                    *in_block(shared.inputs_at(at.rank, eight, 1, at.lane),
                              to) = {dq[nt][0], dq[nt][1], dq[nt][2], dq[nt][3]};
                }
            }
            exchange.send();
            exchange.receive();
            if (m == mt - 1) { // none reads dW', and behind this the tiles
                sync_block();
                const E *const x[2] = {shared.k, shared.q}, *const y[2] = {shared.dz, shared.du};
                add_wide_outer<L, false, 2>(shared.dw, x, y, at);
                sync_block();
                fetch_batch(batch - 1);
            }
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
#pragma unroll
                for (int from = 0; from < L::split; ++from) {
                    const float4 dk = *shared.inputs_at(from, 2 * at.warp + nt, 0, at.lane),
                                 dq = *shared.inputs_at(from, 2 * at.warp + nt, 1, at.lane);
                    d[m][nt][0] += dk.x;
                    d[m][nt][1] += dk.y;
                    d[m][nt][2] += dk.z;
                    d[m][nt][3] += dk.w;
                    u[m][nt][0] += dq.x;
                    u[m][nt][1] += dq.y;
                    u[m][nt][2] += dq.z;
                    u[m][nt][3] += dq.w;
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = 16 * m + at.g + 8 * half, dim = at.col + 8 * nt + 2 * at.t;
                    if (row >= n)
                        continue;
                    const float *dk = &d[m][nt][2 * half], *dq = &u[m][nt][2 * half];
                    const int64_t to = offset + (first + row) * width + dim;
                    if (row == n - 1 && weight[0] != 0)
                        store_pair(last_rows_at(batch) + dim, dk[0], dk[1]);
                    store_pair(static_cast<E *>(p.dk) + to, dk[0], dk[1]);
                    store_pair(static_cast<E *>(p.dq) + to, dq[0], dq[1]);
                }
            }
            exchange.close();
        }
    }

    if (weight[0] != 0) { // the error under the initial state, which W is now
        sync_block();
        for (int batch = 0; batch < p.batches; ++batch) {
            const int64_t row = offset + int64_t(min((batch + 1) * M, p.tokens) - 1) * width;
            const E *const key = static_cast<const E *>(p.k) + row;
            wide_probe<L>(
                p, shared, key,
                [&](int i) {
                    const int dim = at.rank * L::own + i;
                    return to_float(static_cast<const E *>(p.v)[row + dim]) - to_float(key[dim]) -
                           p.b[h * D + dim];
                },
                h, weight[0], at);
            float *const box = exchange.box;
            exchange.open();
            for (int i = at.thread; i < D; i += L::threads)
                in_block(box, i / L::own)[at.rank * L::own + i % L::own] = shared.dkey[i];
            exchange.send();
            exchange.receive();
            if (at.thread < L::own) {
                const int dim = at.rank * L::own + at.thread;
                const float dtarget = shared.dtarget_key[at.thread];
                const float *rest = last_rows_at(batch) + dim;
                float dkey = 0;
                for (int from = 0; from < L::split; ++from)
                    dkey += box[from * L::own + at.thread];
                store(static_cast<E *>(p.dk) + row + dim, rest[0] + dkey - dtarget);
                store(static_cast<E *>(p.dv) + row + dim, rest[D] + dtarget);
            }
            exchange.close();
        }
    }

    sync_block();
    for (int i = at.thread; i < (D + 1) * L::own; i += L::threads) {
        const int in = i / L::own, o = i % L::own, out = at.rank * L::own + o;
        const float x = shared.dw[o * L::ld + in];
        if (in < D)
            p.dw[(int64_t(head) * D + in) * D + out] = x;
        else
            p.db1[int64_t(head) * D + out] = x;
    }
    float *const part = p.part + int64_t(head) * (2 * D + M);
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
            if (at.g == 0) {
                const int dim = own + 8 * nt + e;
                part[at.rank * L::own + dim] = x + shared.dg[dim];
                part[D + at.rank * L::own + dim] = y + shared.db[dim];
            }
        }
    exchange.total(da_last, at);
    exchange.open();
    float *const rates = exchange.box; // [warps of the head][M], of the first block
#pragma unroll
    for (int m = 0; m < mt; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x = da[m][half];
            x += from_lane_xor(x, 1);
            x += from_lane_xor(x, 2);
            if (at.t == 0)
                in_block(rates, 0)[at.head_warp * M + 16 * m + at.g + 8 * half] = x;
        }
    exchange.send();
    exchange.receive();
    if (p.by_key) {
        if (at.head_warp == 0 && at.t < 2)
#pragma unroll
            for (int m = 0; m < mt; ++m)
                part[2 * D + 16 * m + at.g + 8 * at.t] = dtoken[m];
    } else if (at.rank == 0 && at.thread < M) {
        float x = at.thread == M - 1 ? da_last[0] : 0.0f;
        if (at.thread == short_n - 1 && short_n < M)
            x += da_last[1];
        for (int i = 0; i < Exchange<L>::head_warps; ++i)
            x += rates[i * M + at.thread];
        part[2 * D + at.thread] = p.scale * x;
    }
}

template <class L> size_t wide_reverse_shared() {
    return size_t(WideReverseShared<L>(nullptr).size);
}

} // namespace ponder::cuda
