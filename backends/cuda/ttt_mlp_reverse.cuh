// ttt_mlp_vjp: the mini-batches read backwards. Notation as in ttt_mlp.cuh and ttt_linear_vjp; XQ
// and U are the queries' hidden units and outputs, S and S'' gelu's slope and curve at Z1.
//
//   W1, W2 before the mini-batch by subtraction of its step, whose P1 and P2 are in the trace, and
//   exactly every few mini-batches, where the trace has them whole
//   dU from dy through the output norm
//   dZQ1 = (dU W2^T + B2 X) gelu'(ZQ1),   B2_ij = a_i / f (dU_i P2_j), j <= i
//   dP1 = K dW1' + db1' + A1^T dZQ1,      dY = dP1 S (of Y = P2 W2^T), dZ1 = dP1 Y S''
//   dP2 = X dW2' + db2' + A2^T dU + dY W2
//   dZ2 from dG2 = -f c dP2 through the gradient of the reconstruction loss
//   dZ1 += (P2 dW2'^T + B2^T XQ + dZ2 W2^T) S
//   dk = P1 dW1'^T + dZ1 W1^T + B1^T Q - dtarget, dq = dy + dZQ1 W1^T + B1 K,   B1 as B2
//   dW1 = dW1' + K^T dZ1 + Q^T dZQ1,  dW2 = dW2' + X^T dZ2 + XQ^T dU + dY^T P2
//
// State and gradient, 256 KiB for a head of 64, are a multiprocessor's whole register file: on
// sm_90 blocks of a cluster share a head (ttt_mlp_units.cuh), 128 registers a thread for W1, W2 and
// their gradients. Tests have it on one block too: there the compiler spills what does not fit, and
// in bf16 it wants 171 KiB of shared memory, more than 8.0 has. Of heads of 128, on eight blocks,
// W1 and W2 alone are 128 registers a thread; the gradients lie in shared memory, of each warp its
// own units. In f32 that leaves no room to fetch a tile ahead.
//
// Sums are exchanged three times a mini-batch: for Z2 and U, for dP2, and for dq and dk, which are
// read in the next mini-batch; dU and dZ2 are handed out. So four waits.
//
// A mini-batch of 64 is four tiles of 16 under one state, read backwards: C = sum K^T P and c = sum
// P of each layer over the tiles before, which the queries of a tile see times their rates. C and c
// of all tiles come from the trace when the mini-batch begins, a tile's part is taken off when its
// turn comes. The gradient after a tile is then that of C, dC: dW' and what the queries behind add,
//
//   dU C2^T and dZQ1 C1^T beside dU W2^T and dZQ1 W1^T, times the rate,
//   dC1 += (a / f Q)^T dZQ1, dC2 += (a / f XQ)^T dU, dc1 and dc2 alike
//
// and that of the state, which nobody reads before the next mini-batch, is added up beside it. That
// and C lie in shared memory, of each warp its own units, as registers are full.
//
// Counted, a mini-batch of a head of 64: 21 products of 16 x 64 x 256 and small ones, 11 MFLOP, 240
// matrix instructions a warp (7,100 in the whole code); measured on an H200, one warp on a
// scheduler: 15,000 cycles, two: hardly more. Latency is what limits, not the multiprocessor.
#pragma once

#include "ttt_mlp_units.cuh"

#include <type_traits>

namespace ponder::cuda {

template <class X> struct MlpReverseShared {
    using E = typename X::E;
    // tiles at a time: those of a mini-batch, else one ahead where there is room
    static constexpr int slots = X::tiles > 1 ? X::tiles : X::D == 128 && sizeof(E) == 4 ? 1 : 2;
    static constexpr int kept_weights = X::tiles > 1 ? 4 : X::D == 128 ? 2 : 0;
    E *tiles, *p1, *du, *dz;
    float4 *kept;
    float *da; // of each warp, as in linear_reverse
    MlpExchange<X, 2> exchange;
    Rates<X::batch> rates;
    int size;
    __host__ __device__ explicit MlpReverseShared(unsigned char *base)
        : MlpReverseShared(SharedLayout(base)) {}
    __host__ __device__ explicit MlpReverseShared(SharedLayout s) : exchange(s) {
        tiles = s.take<E>(slots * 3 * X::M * X::ld);
        p1 = s.take<E>(slots * X::threads * 8);
        kept = s.take<float4>(kept_weights * X::D / 8 * X::threads);
        da = s.take<float>(X::warps * X::batch);
        du = s.take<E>(X::M * X::ld);
        dz = s.take<E>(X::M * X::ld);
        rates = {s.take<float>(3 * X::batch + 4)};
        size = s.size();
    }
    __device__ E *tile(int number, int input) const { // k, q, P2
        return tiles + (number % slots * 3 + input) * X::M * X::ld;
    }
};

template <class X> class MlpReverseScan : MlpUnits<X, 2> {
    using Units = MlpUnits<X, 2>;
    using typename Units::E, typename Units::L, typename Units::Result, typename Units::Weight,
        typename Units::Dims, typename Units::Norm, typename Units::Loss;
    using Units::D, Units::M, Units::F, Units::ld, Units::split, Units::per;
    using Units::get, Units::copy_weight, Units::each, Units::read, Units::fetch_rows,
        Units::gather_last_keys, Units::trace_at, Units::output, Units::tokens_of,
        Units::ends_batch, Units::last_token;
    using Units::goal_of, Units::goal_at, Units::row_of;
    using Units::meet, Units::await, Units::put, Units::reduce, Units::collect, Units::hand_out,
        Units::leads;
    using Units::over_dims, Units::over_units, Units::over_rows, Units::small, Units::put_product,
        Units::add, Units::add_bias, Units::sum_rows, Units::scale_rows, Units::copy,
        Units::multiply, Units::causal, Units::add_along, Units::activate, Units::start,
        Units::add_start, Units::rows_of;
    using Units::p, Units::exchange, Units::at, Units::rank, Units::head, Units::stream, Units::h,
        Units::width, Units::short_n, Units::tiles, Units::row, Units::unit, Units::offset,
        Units::g, Units::b;

public:
    __device__ explicit MlpReverseScan(const MlpParams &p)
        : MlpReverseScan(p, MlpReverseShared<X>(kept_shared_memory())) {}

    __device__ __forceinline__ void run() {
        for (int number = tiles - 1; number > tiles - shared.slots; --number)
            fetch_tile(number);
        load_state(trace_states(p.batches) - 1);
        load_gradient();
        shared.rates.fill(p, at.thread, short_n);
        for (int i = at.lane; i < X::batch; i += 32)
            da_of(i) = 0;
        if (p.dloss)
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                weight[i] =
                    p.dloss[stream * 3 + i] * 2 / (float(D) * float(p.heads) * float(p.batches));
                if (uniform(weight[i] != 0))
                    wanted |= 1 << i;
            }
        meet(); // the cluster's blocks are there
        for (int number = tiles - 1; number >= 0; --number)
            reverse(number);
        flush();
        if (wanted & 1)
            probe_initial();
        write();
        if (split > 1)
            meet(); // nothing is on its way to a block that has gone
    }

private:
    // In registers, or in shared memory where these are full of the state
    static constexpr bool far_gradient = D == 128;
    using Gradient = std::conditional_t<far_gradient, KeptWeight<X>, Weight>;

    __device__ MlpReverseScan(const MlpParams &p, const MlpReverseShared<X> &shared)
        : Units(p, shared.exchange, int(blockIdx.x) / split), shared(shared) {
        if constexpr (far_gradient)
            dw1 = kept(gradient_1), dw2 = kept(gradient_2);
    }

    // ---- memory

    __device__ __forceinline__ void fetch_tile(int number) {
        if (number >= 0) {
            constexpr int per = 16 / int(sizeof(E));
            fetch_rows(shared.tile(number, 0), static_cast<const E *>(p.k) + offset, width, number);
            fetch_rows(shared.tile(number, 1), static_cast<const E *>(p.q) + offset, width, number);
            fetch_rows(shared.tile(number, 2),
                       static_cast<const E *>(p.trace_p) + int64_t(head) * p.tokens * D, D, number);
            const E *const p1 = static_cast<const E *>(p.trace_p1) + trace_at(number);
#pragma unroll
            for (int i = 0; i < 8 / per; ++i)
                copy_async(p1_place(number) + i * per, p1 + i * per, true);
        }
        commit_copies();
    }
    __device__ __forceinline__ E *p1_place(int number) {
        return shared.p1 + (number % shared.slots * X::threads + at.thread) * 8;
    }
    __device__ __forceinline__ float &da_of(int token) { // of a mini-batch
        return shared.da[at.warp * X::batch + token];
    }

    // What this warp keeps of weights in shared memory
    enum Kept { gradient_1, gradient_2, sums_1, sums_2 };
    __device__ __forceinline__ KeptWeight<X> kept(Kept which) {
        return {shared.kept + which * (D / 8) * X::threads + at.thread};
    }
    __device__ __forceinline__ void keep(Kept which, const Weight &w) {
        KeptWeight<X> to = kept(which);
        copy_weight(to, w);
    }
    __device__ __forceinline__ void recall(Weight &w, Kept which) { copy_weight(w, kept(which)); }
    // change(the gradient of the state before the mini-batch), which is dw where there is one tile
    template <class Change>
    __device__ __forceinline__ void to_gradient(Kept which, Gradient &dw, Change change) {
        if constexpr (parts) {
            Weight w;
            recall(w, which);
            change(w);
            keep(which, w);
        } else
            change(dw);
    }

    __device__ __forceinline__ void load_state(int64_t i) {
        const MlpState<D> from(p.trace_w, head, p.batches, i);
        read(w1, bias1, w2, bias2, from.w1, from.b1, from.w2, from.b2);
    }
    __device__ __forceinline__ void load_gradient() {
        const auto of_head = [&](const float *x, int64_t size) {
            return x ? x + head * size : nullptr;
        };
        read(dw1, dbias1, dw2, dbias2, of_head(p.dw_next, D * F), of_head(p.db_next, F),
             of_head(p.dw2_next, D * F), of_head(p.db2_next, D));
    }

    __device__ __forceinline__ float *last_row(int batch) const { // dk, dv
        return p.last_rows + (int64_t(head) * p.batches + batch) * 2 * D + per * at.lane;
    }
    // dq and dk of the mini-batch before, whose sums have come.
    __device__ __forceinline__ void flush() {
        if (pending < 0)
            return;
        if constexpr (split > 1)
            await(2);
        collect(1, outputs);
        const int n = tokens_of(pending);
        if (row < n && leads()) {
            const Dims dk = outputs[0] + pending_dk, dq = outputs[1] + pending_dy;
            output(p.dq, int64_t(pending) * M + row, dq);
            output(p.dk, int64_t(pending) * M + row, dk);
            if ((wanted & 1) && row == n - 1 && ends_batch(pending))
                store_dims(last_row(pending / X::tiles), dk);
        }
        pending = -1;
    }

    // ---- the loss of rows of keys under the state that is in the registers now

    // of_token: `weight` |LN(z) - target|^2 / 2 of this warp's row; its dtarget and dkey.
    __device__ __forceinline__ void probe(const E *keys, const Dims &goal, float of_token,
                                          Dims &dtarget, Dims &dkey) {
        Result z, slope, dz1 = {};
        FragA<E> x, x_t;
        start(z, bias1);
        over_dims(z, keys, w1);
        activate(z, &slope);
        a_of(x, z[0], z[1]);
        transpose(x_t, x, at.lane);
        put_product(0, x, w2);
        Dims sum[1];
        reduce(0, sum);
        await(0);
        flush();
        collect(0, sum);
        const Loss loss(Norm(sum[0] + bias2, p.eps), g, goal);
        hand_out(shared.dz, of_token * loss.r * loss.centred(g));
        const Dims residual = of_token * loss.residual;
        dtarget = -1.0f * residual;
        dg += residual * loss.h;
        db += residual;
        await(1);

        over_dims(dz1, shared.dz, w2);
        multiply(dz1, slope);
        FragA<E> d, d_t;
        a_of(d, dz1[0], dz1[1]);
        transpose(d_t, d, at.lane);
        put_product(0, d, w1);
        add(dw2, x_t, shared.dz);
        add(dw1, d_t, keys);
        add_bias(dbias1, d_t, 1);
        dbias2 += sum_rows(shared.dz);
        reduce(0, sum);
        await(0);
        collect(0, sum);
        dkey = sum[0];
        meet(); // the sums have been read
    }
    // The last tokens of 16 mini-batches at a time, under the initial state.
    __device__ __forceinline__ void probe_initial() {
        E *keys = shared.tile(0, 0);
        meet(); // what flush left in memory is seen by all
        for (int first = 0; first < p.batches; first += M) {
            gather_last_keys(keys, first);
            const int batch = first + row;
            const bool valid = batch < p.batches;
            Dims goal = {}, dtarget, dkey;
            if (valid)
                goal = goal_at(last_token(batch));
            probe(keys, goal, valid ? weight[0] : 0.0f, dtarget, dkey);
            if (valid && leads()) {
                const float *rest = last_row(batch);
                output(p.dk, last_token(batch), dims_at<per>(rest) + dkey - dtarget);
                output(p.dv, last_token(batch), dims_at<per>(rest + D) + dtarget);
            }
        }
    }

    // ---- several tiles under one state

    // Before the tile `last` of a mini-batch: from the state after it to that before it and to the
    // sums over all its tiles; from the former's gradient to that of the sums.
    __device__ __forceinline__ void unwind(int last) {
        const int batch = last / X::tiles, first = batch * X::tiles;
        const bool is_short = batch == p.batches - 1, whole = batch % trace_every == 0;
        const bool learns = uniform(shared.rates.learns(is_short) != 0);
        Weight s;
        float along = 0; // the step times its gradient, but for the biases'
        clear(s, sum1);
        sum2 = {};
        for (int number = first; number <= last; ++number) {
            FragA<E> p1_t;
            load_rows(p1_t, p1_place(number));
            transpose(p1_t, FragA<E>(p1_t), at.lane);
            add(s, p1_t, shared.tile(number, 0));
            add_bias(sum1, p1_t, 1);
        }
        if (whole)
            load_state(batch / trace_every);
        else if (learns) {
            subtract(w1, s);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    bias1[nt][e] -= sum1[nt][e];
        }
        along += product(s, dw1);
        keep(sums_1, s);

        clear(s);
        for (int number = first; number <= last; ++number) {
            Result z;
            FragA<E> x_t;
            start(z, bias1);
            over_dims(z, shared.tile(number, 0), w1);
            activate(z);
            a_of(x_t, z[0], z[1]);
            transpose(x_t, FragA<E>(x_t), at.lane);
            add(s, x_t, shared.tile(number, 2));
            sum2 += sum_rows(shared.tile(number, 2));
        }
        if (learns && !whole) {
            subtract(w2, s);
            bias2 -= sum2;
        }
        along += product(s, dw2);
        keep(sums_2, s);

        if (at.g == 0)
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    along += sum1[nt][e] * dbias1[nt][e];
        if (row == 0)
            along += sum(sum2 * dbias2);
        (is_short && short_n < X::batch ? da_short : da_last) += along / shared.rates.f(is_short);

        keep(gradient_1, dw1);
        keep(gradient_2, dw2);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                gradient_b1[nt][e] = dbias1[nt][e];
        gradient_b2 = dbias2;
        if (!learns) {
            clear(dw1, dbias1);
            clear(dw2);
            dbias2 = {};
        }
    }
    static __device__ __forceinline__ void clear(Weight &w) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                w[j][e] = 0;
    }
    static __device__ __forceinline__ void clear(Weight &w, float (&bias)[2][2]) {
        clear(w);
        bias[0][0] = bias[0][1] = bias[1][0] = bias[1][1] = 0;
    }
    static __device__ __forceinline__ void subtract(Weight &w, const Weight &s) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                w[j][e] -= s[j][e];
    }
    static __device__ __forceinline__ float product(const Weight &w, const Weight &s) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                sum += w[j][e] * s[j][e];
        return sum;
    }
    // Behind the first tile of a mini-batch
    __device__ __forceinline__ void take_gradient() {
        recall(dw1, gradient_1);
        recall(dw2, gradient_2);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                dbias1[nt][e] = gradient_b1[nt][e];
        dbias2 = gradient_b2;
    }

    // ---- one tile

    __device__ __forceinline__ void reverse(int number) {
        const int batch = number / X::tiles, first = number % X::tiles * M; // of a mini-batch
        const bool is_short = batch == p.batches - 1, ends = ends_batch(number);
        const bool sums = parts && first > 0; // C and c are not 0
        const int n = tokens_of(number);
        const int64_t token = int64_t(number) * M + row;
        const E *const k_tile = shared.tile(number, 0), *const q_tile = shared.tile(number, 1),
                       *const p2_tile = shared.tile(number, 2);
        const float by = shared.rates.f(is_short);
        const bool learns = parts || uniform(shared.rates.learns(is_short) != 0);
        Dims own[2];

        if constexpr (shared.slots == 1) {
            sync_block(); // the tile before has been read
            fetch_tile(number);
        }
        wait_for_copies<0>();
        sync_block();
        if constexpr (shared.slots > 1)
            fetch_tile(number + 1 - shared.slots);
        const float rate[2] = {shared.rates.a(is_short, first + at.g),
                               shared.rates.a(is_short, first + at.g + 8)},
                    my_rate = shared.rates.a(is_short, first + row);
        Dims dy = {}, v = {};
        float lr = 0, da[2] = {0, 0};
        if (row < n) {
            const int64_t from = offset + token * width + per * at.lane;
            if (p.dy)
                dy = dims_at<per>(static_cast<const E *>(p.dy) + from);
            v = dims_at<per>(static_cast<const E *>(p.v) + from);
            lr = rate_at(p, (int64_t(stream) * p.tokens + token) * p.heads + h);
        }
        const Dims goal = goal_of(row_of(k_tile, row, at.lane), v);
        Dims dtarget = {}, dkey = {};
        if ((wanted & 4) && ends)
            probe(k_tile, goal, row == n - 1 ? weight[2] : 0.0f, dtarget, dkey);
        if constexpr (parts)
            if (ends) {
                wait_for_copies<0>();
                sync_block();
                unwind(number);
            }

        // The first layer's state, Z1, ZQ1
        FragA<E> p1, p1_t, a1;
        load_rows(p1, p1_place(number));
        transpose(p1_t, p1, at.lane);
        const bool whole = !parts && batch % trace_every == 0;
        Result z, zq = {}, slope, slope_q, curve, of_sums = {};
        if (sums) {
            Weight s;
            FragA<E> step = p1_t;
            negate(step);
            recall(s, sums_1);
            add(s, step, k_tile);
            add_bias(sum1, p1_t, -1);
            keep(sums_1, s);
            start(zq, sum1);
            over_dims(zq, q_tile, s);
        } else if (whole) {
            load_state(batch / trace_every);
        } else if (learns && !parts) {
            FragA<E> step = p1_t;
            negate(step);
            add(w1, step, k_tile);
            add_bias(bias1, p1_t, -1);
        }
        {
            Result c = {};
            row_products<L>(c, q_tile, k_tile, at.lane);
            causal(c, 1);
            a_of(a1, c[0], c[1]);
        }
        start(z, bias1);
        over_dims(z, k_tile, w1);
        activate(z, &slope, &curve);
        small(zq, a1, p1_t);
        if constexpr (parts)
            copy(of_sums, zq);
        scale_rows(zq, rate);
        add_start(zq, bias1);
        over_dims(zq, q_tile, w1);
        activate(zq, &slope_q);
        FragA<E> x, x_t, xq, xq_t;
        a_of(x, z[0], z[1]);
        a_of(xq, zq[0], zq[1]);
        transpose(x_t, x, at.lane);
        transpose(xq_t, xq, at.lane);

        // The second layer's, Z2 and U
        const float one = rank == 0 && at.warp == 0 ? 1.0f : 0.0f;
        FragA<E> xq_rated, xq_rated_t;
        Result a2 = {}; // this warp's part of A2 without its rates
        small(a2, xq, x);
        causal(a2, one);
        {
            Weight s;
            if (sums) {
                FragA<E> step = x_t;
                negate(step);
                recall(s, sums_2);
                add(s, step, p2_tile);
                keep(sums_2, s);
                sum2 -= sum_rows(p2_tile);
                scale_rows(zq, rate);
                a_of(xq_rated, zq[0], zq[1]);
                transpose(xq_rated_t, xq_rated, at.lane);
            } else if (learns && !parts && !whole) {
                FragA<E> step = x_t;
                negate(step);
                add(w2, step, p2_tile);
                bias2 -= sum_rows(p2_tile);
            }
            Result c;
            FragA<E> a;
            copy(c, a2);
            scale_rows(c, rate);
            a_of(a, c[0], c[1]);
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                Result to_z = {}, to_u = {};
                over_rows(to_u, a, p2_tile, k);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    FragB<E> y;
                    b_of(y, w2[2 * k + i], at.lane);
                    mma(to_z[i], x, y);
                    mma(to_u[i], xq, y);
                    if (sums) {
                        b_of(y, s[2 * k + i], at.lane);
                        mma(to_u[i], xq_rated, y);
                    }
                    put(0, 2 * k + i, to_z[i]);
                    put(1, 2 * k + i, to_u[i]);
                }
            }
        }
        reduce(0, own);
        // What waits for no sums: dP1 and dX but for the queries' and the loss's parts
        Result dp1 = {}, dx = {};
        {
            Result y = {};
            over_dims(y, p2_tile, w2);
            multiply(curve, y);
        }
        start(dp1, dbias1);
        over_dims(dp1, k_tile, dw1);
        over_dims(dx, p2_tile, dw2);
        if constexpr (!parts) {
            float to_last[2] = {0, 0};
            Result c;
            rows_of(c, p1);
            add_along(to_last, c, dp1, 1 / by);
            rows_of(c, x);
            add_along(to_last, c, dx, 1 / by);
            if (row < n && leads())
                to_last[0] += sum(row_of(p2_tile, row, at.lane) * dbias2) / by;
            (is_short && n < M ? da_short : da_last) += to_last[0] + to_last[1];
            if (!learns)
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        dp1[nt][e] = dx[nt][e] = 0;
        }
        await(0);
        flush();
        collect(0, own);

        // dU
        const Loss loss(Norm(own[0] + bias2, p.eps), g, goal);
        {
            Dims z = own[1] + bias2;
            if (sums)
                z += my_rate * sum2;
            const Norm u(z, p.eps);
            const Dims e = g * dy;
            const float mean_e = mean(e), mean_eh = mean(e * u.z);
            dg += dy * u.z;
            db += dy;
            const Dims du = u.r * (e - mean_e - mean_eh * u.z);
            hand_out(shared.du, du);
            if (sums) {
                const float along = sum_of_lanes(sum(du * sum2)) / by;
                da[0] += at.lane == 4 * row ? along : 0;
                da[1] += at.lane == 4 * (row - 8) ? along : 0;
            }
        }
        await(1);

        // dZQ1, dP1, dY
        FragA<E> dzq, dzq_t, dzq_rated, dzq_rated_t, dy1, dy1_t, b2_t;
        Result dz1;
        {
            Result c = {}, d = {};
            FragA<E> b2;
            row_products<L>(c, shared.du, p2_tile, at.lane);
            causal(c, 0);
            add_along(da, a2, c, 1 / by);
            scale_rows(c, rate);
            a_of(b2, c[0], c[1]);
            transpose(b2_t, b2, at.lane);
            if (sums) {
                Weight s;
                recall(s, sums_2);
                over_dims(d, shared.du, s);
                rows_of(c, xq);
                add_along(da, c, d, 1 / by);
                scale_rows(d, rate);
            }
            over_dims(d, shared.du, w2);
            small(d, b2, x_t);
            multiply(d, slope_q);
            a_of(dzq, d[0], d[1]);
            transpose(dzq_t, dzq, at.lane);
            if constexpr (!parts)
                small(of_sums, a1, p1_t);
            add_along(da, of_sums, d, 1 / by);
            scale_rows(d, rate);
            a_of(dzq_rated, d[0], d[1]);
            transpose(dzq_rated_t, dzq_rated, at.lane);
            FragA<E> a1_t;
            transpose(a1_t, a1, at.lane);
            small(dp1, a1_t, dzq_rated_t);
        }
        copy(dz1, dp1);
        multiply(dz1, curve);
        multiply(dp1, slope);
        a_of(dy1, dp1[0], dp1[1]);
        {
            FragA<E> a, a_t;
            scale_rows(a2, rate);
            a_of(a, a2[0], a2[1]);
            transpose(a_t, a, at.lane);
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                Result c = {};
                over_rows(c, a_t, shared.du, k);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (learns)
                        over_units(c[i], x, dw2, 2 * k + i);
                    over_units(c[i], dy1, w2, 2 * k + i);
                    put(0, 2 * k + i, c[i]);
                }
            }
        }
        Dims dp[1];
        reduce(0, dp);
        // What waits for no sums: dq, and of dX and dW2 the queries' parts
        FragA<E> b1_t;
        {
            Result c = {};
            FragA<E> b1;
            Weight s;
            if (sums)
                recall(s, sums_1);
            small(c, dzq, p1);
            causal(c, 0);
            scale_rows(c, rate);
            a_of(b1, c[0], c[1]);
            transpose(b1_t, b1, at.lane);
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                Result to_q = {};
                over_rows(to_q, b1, k_tile, k);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    over_units(to_q[i], dzq, w1, 2 * k + i);
                    if (sums)
                        over_units(to_q[i], dzq_rated, s, 2 * k + i);
                    put(1, 2 * k + i, to_q[i]);
                }
            }
        }
        small(dx, b2_t, xq_t);
        transpose(dy1_t, dy1, at.lane);
        to_gradient(gradient_2, dw2, [&](Gradient &w) {
            add(w, {{xq_t, shared.du}, {dy1_t, p2_tile}});
        });
        await(0);
        collect(0, dp);

        // dG2, dZ2, dtarget
        {
            if (learns)
                dp[0] += dbias2;
            const float c = -by * lr * loss.r;
            const Dims u = g * loss.residual, hat = loss.h, raw = loss.centred(g),
                       e = c * dp[0]; // r dG
            const float mean_e = mean(e), mean_eh = mean(e * hat),
                        along = sum_of_lanes(sum(dp[0] * raw));
            const Dims du = e - mean_e - mean_eh * hat;
            const Dims dh = g * g * du - loss.mean_uh * e - mean_eh * u;
            const float mean_dh = mean(dh),
                        mean_dhh =
                            mean(dh * hat) + c * along * (1.0f / D); // dr r / D, dr = sum dG raw
            const float before = ends && row == n - 1 ? weight[1] : 0.0f;
            hand_out(shared.dz, loss.r * (dh - mean_dh - mean_dhh * hat + before * raw));
            const Dims residual = before * loss.residual;
            dg += du * (loss.residual + g * hat) + residual * hat;
            db += du * g + residual;
            dtarget -= g * du + residual;
            if (row < n && leads()) {
                output(p.dv, token, dtarget);
                if ((wanted & 1) && ends && row == n - 1)
                    store_dims(last_row(batch) + D, dtarget);
                if (at.lane == 0) {
                    const float dlr = -by * loss.r * along;
                    const int64_t to = (int64_t(stream) * p.tokens + token) * p.heads + h;
                    if (p.rate_bf16)
                        store(static_cast<Bf16 *>(p.dlr) + to, dlr);
                    else
                        static_cast<float *>(p.dlr)[to] = dlr;
                }
            }
        }
        await(1);

        // dZ1, dk, the gradients before the mini-batch
        over_dims(dx, shared.dz, w2);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                dz1[nt][e] += dx[nt][e] * slope[nt][e];
        FragA<E> d, d_t;
        a_of(d, dz1[0], dz1[1]);
        transpose(d_t, d, at.lane);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            Result c = {};
            over_rows(c, b1_t, q_tile, k);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (learns)
                    over_units(c[i], p1, dw1, 2 * k + i);
                over_units(c[i], d, w1, 2 * k + i);
                put(0, 2 * k + i, c[i]);
            }
        }
        float(&to_b1)[2][2] = parts ? gradient_b1 : dbias1;
        Dims &to_b2 = parts ? gradient_b2 : dbias2;
        to_gradient(gradient_2, dw2, [&](Gradient &w) { add(w, x_t, shared.dz); });
        to_gradient(gradient_1, dw1, [&](Gradient &w) {
            add(w, {{d_t, k_tile}, {dzq_t, q_tile}});
        });
        add_bias(to_b1, d_t, 1);
        add_bias(to_b1, dzq_t, 1);
        to_b2 += sum_rows(shared.dz) + sum_rows(shared.du);
        if (sums) {
            add(dw1, dzq_rated_t, q_tile);
            add(dw2, xq_rated_t, shared.du);
            add_bias(dbias1, dzq_rated_t, 1);
            for (int i = 0; i < M; ++i)
                dbias2 += shared.rates.a(is_short, first + i) * row_of(shared.du, i, at.lane);
        } else if constexpr (parts)
            take_gradient();
        pending = number;
        pending_dy = dy;
        pending_dk = dkey - dtarget;
        reduce(1, outputs);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            da[half] += from_lane_xor(da[half], 1);
            da[half] += from_lane_xor(da[half], 2);
            if (at.t == 0)
                da_of(first + at.g + 8 * half) += da[half];
        }
    }

    // ---- what is left at the end

    __device__ __forceinline__ void write() {
        const int64_t to = int64_t(head) * D * F;
        each(dw1, [&](float &x, int u, int dim) { p.dw[to + dim * F + u] = x; });
        each(dw2, [&](float &x, int u, int dim) { p.dw2[to + u * D + dim] = x; });
        if (at.g == 0)
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    p.db1[int64_t(head) * F + unit + 8 * nt + 2 * at.t + e] = dbias1[nt][e];
        if (row == 0 && leads())
            store_dims(p.db2 + int64_t(head) * D + per * at.lane, dbias2);

        // The block's sums of dg, db and the rates' gradients
        float *norms = exchange.parts; // [rows][2 D]
        sync_block();
        if (leads()) {
            float *const to = norms + at.warp / X::sharers * 2 * D + per * at.lane;
            store_dims(to, dg);
            store_dims(to + D, db);
        }
        const float last = block_sum<X::warps>(da_last, exchange.block, at);
        sync_block();
        const float of_short = block_sum<X::warps>(da_short, exchange.block, at);
        float *part =
            p.part + ((int64_t(stream) * split + rank) * p.heads + h) * (2 * D + X::batch);
        for (int i = at.thread; i < 2 * D; i += X::threads) {
            float sum = 0;
#pragma unroll
            for (int r = 0; r < X::rows; ++r)
                sum += norms[r * 2 * D + i];
            part[i] = sum;
        }
        if (at.thread < X::batch) {
            float sum = at.thread == X::batch - 1 ? last : 0.0f;
            if (at.thread == short_n - 1 && short_n < X::batch)
                sum += of_short;
#pragma unroll
            for (int w = 0; w < X::warps; ++w)
                sum += shared.da[w * X::batch + at.thread];
            part[2 * D + at.thread] = p.scale * sum;
        }
    }

    static constexpr bool parts = X::tiles > 1;
    const MlpReverseShared<X> shared;
    Weight w1, w2;
    Gradient dw1, dw2;
    float bias1[2][2], dbias1[2][2]; // at this thread's units of a result
    Dims bias2, dbias2;
    Dims dg = {}, db = {};
    float weight[3] = {0, 0, 0};     // of the losses, as factors of |LN(z) - target|^2 / 2
    int wanted = 0;                  // bits: those that are not 0
    float da_last = 0, da_short = 0; // as in linear_reverse
    // Where mini-batches have several tiles: c, and the gradient of the state before, of which that
    // of W is in shared memory, as C is.
    float sum1[2][2], gradient_b1[2][2];
    Dims sum2, gradient_b2;
    int pending = -1;
    Dims outputs[2] /* dk, dq */, pending_dy, pending_dk;
};

template <class X>
__global__ void __launch_bounds__(X::threads, 1) mlp_reverse(const __grid_constant__ MlpParams p) {
    if constexpr (X::split == 1 || has_clusters)
        MlpReverseScan<X>(p).run();
}

template <class X> size_t mlp_reverse_shared() { return size_t(MlpReverseShared<X>(nullptr).size); }
// visit(MlpSplit of the shape). On one block, heads of 64 in bf16: in f32 that has too little
// shared memory where there are no clusters.
template <class E, int D, class Visit> auto visit_reverse(const TttMlpShape &shape, Visit visit) {
    constexpr int split = mlp_most_split(D);
    if constexpr (D == 64) {
        if (shape.mini_batch == mlp_wide_batch)
            return visit(MlpSplit<E, D, split, mlp_wide_batch / mlp_batch>());
        if constexpr (sizeof(E) == 2)
            if (mlp_split(shape) == 1)
                return visit(MlpSplit<E, D, 1>());
    }
    return visit(MlpSplit<E, D, split>());
}

template <class E, int D>
cudaError_t MlpReverseOf<E, D>::run(const TttMlpShape &shape, const MlpParams &p,
                                    cudaStream_t stream) {
    return visit_reverse<E, D>(shape, [&](auto x) {
        using X = decltype(x);
        return launch(mlp_reverse<X>, unsigned(p.streams * p.heads * X::split), X::threads,
                      mlp_reverse_shared<X>(), stream, p, X::split);
    });
}

template <class E, int D> const char *MlpReverseOf<E, D>::misses(const TttMlpShape &shape) {
    if (sizeof(E) == 4 && mlp_split(shape) == 1)
        return "in f32 the fused gradient of the MLP scan needs clusters of blocks";
    return visit_reverse<E, D>(
        shape, [](auto x) { return shared_misses(mlp_reverse_shared<decltype(x)>()); });
}

} // namespace ponder::cuda
