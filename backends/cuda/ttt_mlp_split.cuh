// ttt_mlp with a head on a cluster of blocks (ttt_mlp_units.cuh), sm_90. A mini-batch:
//
//   Z1 = K W1 + b1, X = gelu(Z1); of Z2 = X W2 + b2 the sums over hidden units come together at the
//   tokens, which hand out P2 = -f c G2
//   P1 = (P2 W2^T) gelu'(Z1), XQ = gelu(Q W1 + b1 + A1 P1); of U = XQ W2 + b2 + A2 P2 the sums go
//   to the tokens too, and are read in the next mini-batch, which has to wait anyway W1, b1 += K^T
//   P1, sum P1, W2, b2 += X^T P2, sum P2
//
// so two waits a mini-batch. The error after a step is that of one more row, the last key, under
// the state of the next; the error under the initial state has clusters of its own.
//
// A mini-batch of 64 is four tiles of 16 under one state W, b. What the tiles before have added up,
// S = sum K^T P and s = sum P of each layer, is kept beside it: queries see W + a S and b + a s, a
// being the rate of their token, and their own tile's part of the sums as above; behind the last
// tile W += S.
#pragma once

#include "ttt_linear_loss.cuh"
#include "ttt_mlp_units.cuh"

namespace ponder::cuda {

template <class X> struct MlpSplitShared {
    using E = typename X::E;
    static constexpr int stages = 3;
    E *tiles, *p2;
    float *last; // parts of the last key's sums
    MlpExchange<X, 1> exchange;
    Rates<X::batch> rates;
    int size;
    __host__ __device__ explicit MlpSplitShared(unsigned char *base)
        : MlpSplitShared(SharedLayout(base)) {}
    __host__ __device__ explicit MlpSplitShared(SharedLayout s) : exchange(s) {
        tiles = s.take<E>(stages * 2 * X::M * X::ld);
        p2 = s.take<E>(X::M * X::ld);
        last = s.take<float>((X::warps + 2 * X::split) * X::D);
        rates = {s.take<float>(3 * X::batch + 4)};
        size = s.size();
    }
    __device__ E *tile(int number, int input) const { // k, q
        return tiles + (number % stages * 2 + input) * X::M * X::ld;
    }
};

template <class X, bool traced> class MlpSplitScan : MlpUnits<X, 1> {
    using Units = MlpUnits<X, 1>;
    using typename Units::E, typename Units::L, typename Units::Result, typename Units::Weight,
        typename Units::Dims, typename Units::Norm, typename Units::Loss;
    using Units::D, Units::M, Units::F, Units::ld, Units::split, Units::per;
    using Units::each, Units::read, Units::fetch_rows, Units::gather_last_keys, Units::trace_at,
        Units::output, Units::tokens_of, Units::ends_batch, Units::last_token;
    using Units::goal_of, Units::goal_at, Units::row_of;
    using Units::meet, Units::await, Units::put, Units::reduce, Units::collect, Units::hand_out,
        Units::leads;
    using Units::over_dims, Units::over_rows, Units::small, Units::over_units, Units::put_product,
        Units::add, Units::add_bias, Units::sum_rows, Units::scale_rows, Units::multiply,
        Units::causal, Units::activate, Units::start;
    using Units::p, Units::exchange, Units::at, Units::rank, Units::head, Units::stream, Units::h,
        Units::width, Units::short_n, Units::tiles, Units::last_n, Units::row, Units::unit,
        Units::offset, Units::g, Units::b;

public:
    __device__ explicit MlpSplitScan(const MlpParams &p)
        : MlpSplitScan(p, MlpSplitShared<X>(kept_shared_memory())) {}

    __device__ void run() {
        if (!is_probe)
            fetch_tile(0), fetch_tile(1);
        read(w1, bias1, w2, bias2, p.w1 + int64_t(head) * D * F, p.b1 + int64_t(head) * F,
             p.w2 + int64_t(head) * F * D, p.b2 + int64_t(head) * D);
        shared.rates.fill(p, at.thread, short_n);
        if (at.thread < 2)
            exchange.block[at.thread] = 0;
        meet(); // the cluster's blocks are there
        if (is_probe)
            probe_initial();
        else
            scan();
        meet(); // nothing is on its way to a block that has gone
        if (p.loss && rank == 0 && at.thread == 0) {
            float *part = p.loss_part + head * 3;
            if (is_probe) {
                part[0] = 0;
                for (int i = 0; i < 16; ++i)
                    part[0] += shared.last[i];
            } else {
                part[1] = exchange.block[0] + exchange.block[1];
                part[2] = exchange.block[2];
            }
            finish_loss(p, stream, float(D));
        }
    }

private:
    __device__ MlpSplitScan(const MlpParams &p, const MlpSplitShared<X> &shared)
        : Units(p, shared.exchange, int(blockIdx.x) / split % (p.streams * p.heads)),
          shared(shared), is_probe(int(blockIdx.x) / split >= p.streams * p.heads) {}

    __device__ __forceinline__ void fetch_tile(int number) {
        if (number < tiles) {
            fetch_rows(shared.tile(number, 0), static_cast<const E *>(p.k) + offset, width, number);
            if (p.y)
                fetch_rows(shared.tile(number, 1), static_cast<const E *>(p.q) + offset, width,
                           number);
        }
        commit_copies();
    }
    __device__ __forceinline__ void write(float *to_1, float *to_b1, float *to_2, float *to_b2) {
        each(w1, [&](float &x, int u, int dim) { to_1[dim * F + u] = x; });
        each(w2, [&](float &x, int u, int dim) { to_2[u * D + dim] = x; });
        if (at.g == 0)
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
                store_pair(to_b1 + unit + 8 * nt + 2 * at.t, bias1[nt][0], bias1[nt][1]);
        if (row == 0 && leads())
            store_dims(to_b2 + per * at.lane, bias2);
    }
    __device__ __forceinline__ void trace_state(int64_t i) {
        const MlpState<D> to(p.trace_w, head, p.batches, i);
        write(to.w1, to.b1, to.w2, to.b2);
    }

    // One key under the state that is in the registers now: this warp's part of its Z2, by way of
    // its hidden units as the first row of a factor, the others being 0.
    __device__ __forceinline__ void first_layer_of(FragA<E> &x, const E *key) {
        Result z;
        start(z, bias1);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            FragA<E> a;
            load_a_row(a, key + 16 * k, at.lane);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                FragB<E> y;
                b_of_transposed(y, w1[2 * k], w1[2 * k + 1], nt);
                mma(z[nt], a, y);
            }
        }
        activate(z);
        a_of(x, z[0], z[1]);
    }
    __device__ __forceinline__ void put_last(int j, const float (&c)[4]) {
        if (at.g == 0)
            store_pair(shared.last + at.warp * D + 8 * j + 2 * at.t, c[0], c[1]);
    }
    __device__ __forceinline__ float *last_sum(int batch, int from) {
        return shared.last + (X::warps + (batch & 1) * split + from) * D;
    }
    static constexpr unsigned last_bytes = split * D * sizeof(float);
    // The block's sum, after a barrier, to the warp that has the last token of full mini-batches
    __device__ __forceinline__ void reduce_last(int batch) {
        if (at.thread >= D / 4)
            return;
        float4 sum = {0, 0, 0, 0};
#pragma unroll
        for (int w = 0; w < X::warps; ++w) {
            const float4 x = *reinterpret_cast<const float4 *>(shared.last + w * D + 4 * at.thread);
            sum.x += x.x;
            sum.y += x.y;
            sum.z += x.z;
            sum.w += x.w;
        }
        deliver(last_sum(batch, rank) + 4 * at.thread, sum, exchange.deliveries, split - 1);
    }
    // By that warp, when the sums have come.
    __device__ __forceinline__ float last_error(int batch, const Dims &goal) {
        Dims z = bias2;
#pragma unroll
        for (int from = 0; from < split; ++from)
            z += dims_at<per>(last_sum(batch, from) + per * at.lane);
        const Dims error = g * Norm(z, p.eps).z - goal;
        return sum(error * error);
    }

    // The sums of the tile before, ahead of hand_out: who has all rows of P2 may send the next
    // ones.
    __device__ __forceinline__ void collect_pending() {
        if (pending < 0)
            return;
        if constexpr (split > 1)
            await(2);
        collect(1, outputs);
        outputs[0] += pending_b2;
    }
    __device__ __forceinline__ void flush() {
        if (pending < 0)
            return;
        if (row < tokens_of(pending) && leads()) {
            const Norm u(outputs[0], p.eps);
            output(p.y, int64_t(pending) * M + row, pending_q + g * u.z + b);
        }
        pending = -1;
    }

    __device__ __forceinline__ void scan() {
        if constexpr (parts)
            clear_sums();
        for (int number = 0; number < tiles; ++number)
            step(number);
        if (traced)
            trace_state(trace_states(p.batches) - 1);
        if (p.w_out)
            write(p.w_out + int64_t(head) * D * F, p.b_out + int64_t(head) * F,
                  p.w2_out + int64_t(head) * F * D, p.b2_out + int64_t(head) * D);
        if (p.loss) {
            sync_block();
            FragA<E> x;
            first_layer_of(x, shared.tile(tiles - 1, 0) + (last_n - 1) * ld);
            over_units(x, w2, [&](int j, const float(&c)[4]) { put_last(j, c); });
            sync_block();
            if (rank == split - 1 && at.thread == 0)
                announce(exchange.deliveries, last_bytes);
            reduce_last(p.batches);
            if (rank == split - 1)
                await(0);
        }
        collect_pending();
        flush();
        if (p.loss) {
            before = sum_of_lanes(before);
            if (row == M - 1) {
                after += last_error(p.batches, goal_at(p.tokens - 1));
                after = sum_of_lanes(after);
                if (at.lane == 0 && leads()) {
                    float *to = in_block(exchange.block, 0);
                    to[0] = before;
                    to[2] = after;
                }
            } else if (row == last_n - 1 && at.lane == 0 && leads())
                in_block(exchange.block, 0)[1] = before;
        }
    }

    __device__ __forceinline__ void step(int number) {
        const int batch = number / X::tiles, first = number % X::tiles * M; // of a mini-batch
        const bool is_short = batch == p.batches - 1, ends = ends_batch(number);
        const int n = tokens_of(number);
        const int64_t token = int64_t(number) * M + row;
        const bool queries = !traced || p.y;
        const bool learns = uniform(shared.rates.learns(is_short) != 0);
        const bool with_last = p.loss && batch > 0 && first == 0;

        wait_for_copies<1>();
        sync_block();
        const E *const k_tile = shared.tile(number, 0), *const q_tile = shared.tile(number, 1);
        Dims v = {};
        float lr = 0;
        if (row < n) {
            v = dims_at<per>(static_cast<const E *>(p.v) + offset + token * width + per * at.lane);
            lr = rate_at(p, (int64_t(stream) * p.tokens + token) * p.heads + h);
        }
        if (traced && first == 0 && batch % trace_every == 0)
            trace_state(batch / trace_every);

        Result z, slope;
        FragA<E> x, x_last;
        start(z, bias1);
        over_dims(z, k_tile, w1);
        activate(z, &slope);
        a_of(x, z[0], z[1]);
        if (with_last)
            first_layer_of(x_last, shared.tile(number - 1, 0) + (M - 1) * ld);
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            float c[4] = {};
            FragB<E> y;
            b_of(y, w2[j], at.lane);
            mma(c, x, y);
            put(0, j, c);
            if (with_last) {
                float c_last[4] = {};
                mma(c_last, x_last, y);
                put_last(j, c_last);
            }
        }
        Dims own[1];
        reduce(0, own, with_last && rank == split - 1 ? last_bytes : 0);
        if (with_last)
            reduce_last(batch);
        // What waits for no sums
        fetch_tile(number + 2); // in the place of the last key's tile
        FragA<E> x_t, a1;
        Result zq = {};
        transpose(x_t, x, at.lane);
        if (queries) {
            Result c = {};
            row_products<L>(c, q_tile, k_tile, at.lane);
            causal(c, 1);
            a_of(a1, c[0], c[1]);
        }
        collect_pending();
        await(0);
        collect(0, own);

        // G2, P2
        {
            const Dims goal = goal_of(row_of(k_tile, row, at.lane), v);
            const Loss loss(Norm(own[0] + bias2, p.eps), g, goal);
            const float c = -shared.rates.f(is_short) * lr * loss.r;
            const Dims p2 = c * loss.centred(g);
            hand_out(shared.p2, p2);
            if (traced && row < n && leads())
                store_dims(static_cast<E *>(p.trace_p) + (int64_t(head) * p.tokens + token) * D +
                               per * at.lane,
                           p2);
            if (with_last && row == M - 1)
                after += last_error(batch, goal_last);
            if (ends && row == n - 1)
                before += sum(loss.residual * loss.residual);
            goal_last = goal;
        }
        flush();
        if (queries)
            over_dims(zq, q_tile, w1);
        await(1);

        // P1, W1, XQ
        FragA<E> p1_t;
        {
            Result y = {};
            FragA<E> p1;
            over_dims(y, shared.p2, w2);
            multiply(y, slope);
            if (traced)
                store_rows(static_cast<E *>(p.trace_p1) + trace_at(number), y[0], y[1]);
            a_of(p1, y[0], y[1]);
            transpose(p1_t, p1, at.lane);
        }
        if (queries) {
            const float rate[2] = {shared.rates.a(is_short, first + at.g),
                                   shared.rates.a(is_short, first + at.g + 8)};
            FragA<E> xq, a, xq_of_sums;
            Result c = {}, a2 = {};
            if constexpr (parts) {
                start(c, sum1);
                over_dims(c, q_tile, s1);
            }
            small(c, a1, p1_t);
            scale_rows(c, rate);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    zq[nt][e] += c[nt][e] + bias1[nt][e & 1];
            activate(zq);
            a_of(xq, zq[0], zq[1]);
            small(a2, xq, x);
            causal(a2, rank == 0 && at.warp == 0 ? 1.0f : 0.0f);
            scale_rows(a2, rate);
            a_of(a, a2[0], a2[1]);
            if constexpr (parts) {
                scale_rows(zq, rate); // gelu's values now
                a_of(xq_of_sums, zq[0], zq[1]);
            }
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                Result to_u = {};
                over_rows(to_u, a, shared.p2, k);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    FragB<E> y;
                    b_of(y, w2[2 * k + i], at.lane);
                    mma(to_u[i], xq, y);
                    if constexpr (parts) {
                        b_of(y, s2[2 * k + i], at.lane);
                        mma(to_u[i], xq_of_sums, y);
                    }
                    put(0, 2 * k + i, to_u[i]);
                }
            }
            pending = number;
            pending_b2 = bias2;
            if constexpr (parts)
                pending_b2 += shared.rates.a(is_short, first + row) * sum2;
            pending_q = row_of(q_tile, row, at.lane);
        }
        if constexpr (parts) {
            learn(s1, sum1, s2, sum2, p1_t, x_t, k_tile);
            if (ends) {
                if (learns)
                    take_sums();
                clear_sums();
            }
        } else if (learns) {
            learn(w1, bias1, w2, bias2, p1_t, x_t, k_tile);
        }
        if (queries)
            reduce(1, outputs);
    }

    __device__ __forceinline__ void learn(Weight &to_1, float (&to_b1)[2][2], Weight &to_2,
                                          Dims &to_b2, const FragA<E> &p1_t, const FragA<E> &x_t,
                                          const E *k_tile) {
        add(to_1, p1_t, k_tile);
        add_bias(to_b1, p1_t, 1);
        add(to_2, x_t, shared.p2);
        to_b2 += sum_rows(shared.p2);
    }
    __device__ __forceinline__ void clear_sums() {
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                s1[j][e] = s2[j][e] = 0;
        sum1[0][0] = sum1[0][1] = sum1[1][0] = sum1[1][1] = 0;
        sum2 = {};
    }
    __device__ __forceinline__ void take_sums() {
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                w1[j][e] += s1[j][e];
                w2[j][e] += s2[j][e];
            }
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                bias1[nt][e] += sum1[nt][e];
        bias2 += sum2;
    }

    // The last tokens of 16 mini-batches at a time.
    __device__ __forceinline__ void probe_initial() {
        E *keys = shared.tile(0, 0);
        float error = 0;
        for (int first = 0; first < p.batches; first += M) {
            gather_last_keys(keys, first);
            Result z;
            FragA<E> x;
            start(z, bias1);
            over_dims(z, keys, w1);
            activate(z);
            a_of(x, z[0], z[1]);
            put_product(0, x, w2);
            Dims own[1];
            reduce(0, own);
            await(0);
            collect(0, own);
            const Norm norm(own[0] + bias2, p.eps);
            if (first + row < p.batches) {
                const Dims apart = g * norm.z - goal_at(last_token(first + row));
                error += sum(apart * apart);
            }
            meet(); // the sums have been read
        }
        error = sum_of_lanes(error);
        if (at.lane == 0 && leads())
            in_block(shared.last, 0)[row] = error;
    }

    static constexpr bool parts = X::tiles > 1;
    const MlpSplitShared<X> shared;
    const bool is_probe;
    Weight w1, w2, s1, s2; // s1, s2, sum1, sum2: where mini-batches have several tiles
    float sum1[2][2];
    Dims sum2;
    float bias1[2][2]; // at this thread's units of a result
    Dims bias2;
    float before = 0, after = 0;
    int pending = -1;
    Dims outputs[1], pending_q, pending_b2, goal_last = {};
};

// Blocks of a multiprocessor that registers are kept few enough for
template <class X>
constexpr int mlp_split_blocks = X::D == 64 && sizeof(typename X::E) == 2 && X::tiles == 1 ? 3 : 1;

template <class X, bool traced>
__global__ void __launch_bounds__(X::threads, mlp_split_blocks<X>)
    mlp_split_scan(const __grid_constant__ MlpParams p) {
    if constexpr (has_clusters)
        MlpSplitScan<X, traced>(p).run();
}

template <class X> size_t mlp_split_shared() { return size_t(MlpSplitShared<X>(nullptr).size); }

// visit(MlpSplit of the shape); of heads of 128 there are mini-batches of 16
template <int D, class Visit> auto visit_split_scan(const TttMlpShape &s, Visit visit) {
    constexpr int split = mlp_most_split(D), tiles = mlp_wide_batch / mlp_batch;
    if constexpr (D == 64)
        if (s.mini_batch == mlp_wide_batch)
            return s.type == TttType::bf16 ? visit(MlpSplit<Bf16, D, split, tiles>())
                                           : visit(MlpSplit<float, D, split, tiles>());
    return s.type == TttType::bf16 ? visit(MlpSplit<Bf16, D, split>())
                                   : visit(MlpSplit<float, D, split>());
}

template <int D>
cudaError_t MlpSplitOf<D>::run(const TttMlpShape &s, const MlpParams &p, cudaStream_t stream) {
    return visit_split_scan<D>(s, [&](auto x) {
        using X = decltype(x);
        return launch(p.trace_w ? mlp_split_scan<X, true> : mlp_split_scan<X, false>,
                      unsigned(p.streams * p.heads * X::split) * (p.loss ? 2 : 1), X::threads,
                      mlp_split_shared<X>(), stream, p, X::split);
    });
}

template <int D> const char *MlpSplitOf<D>::misses(const TttMlpShape &s) {
    return visit_split_scan<D>(
        s, [](auto x) { return shared_misses(mlp_split_shared<decltype(x)>()); });
}

} // namespace ponder::cuda
