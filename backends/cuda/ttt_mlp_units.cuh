// TTT-MLP with a head's hidden units shared out to warps of the blocks of a cluster, for the scan
// and its reverse. Each of a head's D / 4 warps has 16 hidden units: their rows of W1 and W2 as
// [unit, dim] in the registers of results of products, and everything along them. Sums over hidden
// units, for [16 tokens, D], are exchanged: each warp puts its part in shared memory, its block's
// sum goes to the block that has the token, where one of the head's warps has it and does its norm.
// What follows of it for all is handed out, a row of a tile in every block.
//
// For D = 128 there are two warps for a token. Both do the same with it; what is sent or written is
// either shared out to them or left to the first.
#pragma once

#include "cluster.cuh"
#include "ttt_mlp_dims.cuh"

namespace ponder::cuda {

// split_: blocks of a head; tiles_: of 16 tokens, of a mini-batch
template <class E_, int D_, int split_, int tiles_ = 1> struct MlpSplit {
    using E = E_;
    using L = Linear<E, D_, mlp_batch>;
    static constexpr int D = D_, M = mlp_batch, F = 4 * D, ld = L::ld;
    static constexpr int split = split_, warps = F / 16 / split, threads = 32 * warps;
    static constexpr int rows = M / split, sharers = warps / rows; // tokens of a block, their warps
    static constexpr int tiles = tiles_, batch = M * tiles;        // tokens of a mini-batch
    static constexpr int row =
        split == 1 ? D + 4 : D + 8; // of parts; less memory, or no bank twice
};

// count: sums that are exchanged at a time
template <class X, int count> struct MlpExchange {
    float *parts, *sums, *block;
    Deliveries *deliveries; // of sums for a result, of rows of a tile, of sums for an output
    __host__ __device__ explicit MlpExchange(SharedLayout &s) {
        parts = s.take<float>(count * X::warps * X::M * X::row);
        sums = s.take<float>(X::split == 1 ? 0 : 2 * X::M * count * X::D);
        block = s.take<float>(X::warps > 4 ? X::warps : 4);
        deliveries = s.take<Deliveries>(3);
    }
};

// Of a factor a, the 16 rows or columns of which are in two halves: the same matrix as a factor b,
// summed over its columns, for 8 of its rows.
__device__ __forceinline__ void b_rows(FragB<Bf16> &b, const FragA<Bf16> &a, int half) {
    b.x[0] = a.x[half];
    b.x[1] = a.x[2 + half];
}
__device__ __forceinline__ void b_rows(FragB<float> &b, const FragA<float> &a, int half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = 4 * (i >> 1) + half + 2 * (i & 1);
        b.high[i] = a.high[at];
        b.low[i] = a.low[at];
    }
}
// Of 8 x 8 numbers, columns 2 t and 2 t + 1 of row g on lane 4 g + t: those of the transpose.
__device__ __forceinline__ float2 transposed(float x, float y, int lane) {
    const int g = lane >> 2, t = lane & 3;
    float2 r;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int from = 4 * (2 * t + i) + (g >> 1);
        const float even = from_lane(x, from), odd = from_lane(y, from);
        (i ? r.y : r.x) = g & 1 ? odd : even;
    }
    return r;
}
__device__ __forceinline__ void transpose(FragA<Bf16> &to, const FragA<Bf16> &a, int) {
    to.x[0] = turn_matrix(a.x[0]);
    to.x[1] = turn_matrix(a.x[2]);
    to.x[2] = turn_matrix(a.x[1]);
    to.x[3] = turn_matrix(a.x[3]);
}
__device__ __forceinline__ void transpose(FragA<float> &to, const FragA<float> &a, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) { // columns 8 (i / 2), rows 8 (i % 2)
        const int from = 4 * (i >> 1) + (i & 1), at = 4 * (i & 1) + (i >> 1);
        const float2 high = transposed(float_of_bits(a.high[from]), float_of_bits(a.high[from + 2]),
                                       lane),
                     low = transposed(float_of_bits(a.low[from]), float_of_bits(a.low[from + 2]),
                                      lane);
        to.high[at] = bits_of_float(high.x);
        to.high[at + 2] = bits_of_float(high.y);
        to.low[at] = bits_of_float(low.x);
        to.low[at + 2] = bits_of_float(low.y);
    }
}
// The result c[16,8] as a factor b[16,8]
__device__ __forceinline__ void b_of(FragB<Bf16> &b, const float (&c)[4], int) {
    b.x[0] = turn_matrix(pack_bf16(c[0], c[1]));
    b.x[1] = turn_matrix(pack_bf16(c[2], c[3]));
}
__device__ __forceinline__ void b_of(FragB<float> &b, const float (&c)[4], int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float2 x = transposed(c[2 * half], c[2 * half + 1], lane);
        set(b, 2 * half, x.x);
        set(b, 2 * half + 1, x.y);
    }
}
// a[m][k] = 1
__device__ __forceinline__ void a_of_ones(FragA<Bf16> &a) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        a.x[i] = 0x3f803f80u;
}
__device__ __forceinline__ void a_of_ones(FragA<float> &a) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        set(a, i, 1.0f);
}

// A weight's part of a thread in shared memory, in the order of registers
template <class X> struct KeptWeight { float4 *at; };

template <class X, int most> class MlpUnits {
protected:
    using E = typename X::E;
    using L = typename X::L;
    using Result = float[2][4];        // of 16 tokens by 16 units, or by 16 tokens
    using Weight = float[X::D / 8][4]; // 16 units by D
    using Dims = cuda::Dims<X::D / 32>;
    static constexpr int D = X::D, M = X::M, F = X::F, ld = X::ld, split = X::split;
    static constexpr int per = D / 32; // dims of a lane

    __device__ MlpUnits(const MlpParams &p, const MlpExchange<X, most> &exchange, int head)
        : p(p), exchange(exchange), rank(int(blockIdx.x) % split), head(head),
          stream(head / p.heads), h(head % p.heads), width(p.heads * D),
          short_n(p.tokens - (p.batches - 1) * X::batch), tiles((p.tokens + M - 1) / M),
          last_n(p.tokens - (tiles - 1) * M), warp_of_head(rank * X::warps + uniform(at.warp)),
          row(warp_of_head / X::sharers), unit(16 * warp_of_head),
          offset(int64_t(stream) * p.tokens * width + h * D) {
        g = dims_at<per>(p.g + h * D + per * at.lane);
        b = dims_at<per>(p.b + h * D + per * at.lane);
        if (split > 1 && at.thread == 0)
            for (int i = 0; i < 3; ++i)
                set_deliveries(exchange.deliveries + i);
    }

    // ---- memory

    // Dims 8 j to 8 j + 7 of a weight
    static __device__ __forceinline__ void get(float (&c)[4], const Weight &w, int j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            c[e] = w[j][e];
    }
    static __device__ __forceinline__ void set(Weight &w, int j, const float (&c)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            w[j][e] = c[e];
    }
    static __device__ __forceinline__ void get(float (&c)[4], const KeptWeight<X> &w, int j) {
        const float4 x = w.at[j * X::threads];
        c[0] = x.x, c[1] = x.y, c[2] = x.z, c[3] = x.w;
    }
    static __device__ __forceinline__ void set(const KeptWeight<X> &w, int j, const float (&c)[4]) {
        w.at[j * X::threads] = {c[0], c[1], c[2], c[3]};
    }
    template <class To, class From>
    static __device__ __forceinline__ void copy_weight(To &to, const From &from) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            float c[4];
            get(c, from, j);
            set(to, j, c);
        }
    }

    // visit(element of a weight, unit, dim)
    template <class W, class Visit> __device__ __forceinline__ void each(W &w, Visit visit) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            float c[4];
            get(c, w, j);
#pragma unroll
            for (int e = 0; e < 4; ++e)
                visit(c[e], unit + at.g + 8 * (e >> 1), 8 * j + 2 * at.t + (e & 1));
            set(w, j, c);
        }
    }
    template <class W>
    __device__ __forceinline__ void read(W &to_1, float (&bias_1)[2][2], W &to_2, Dims &bias_2,
                                         const float *w1, const float *b1, const float *w2,
                                         const float *b2) {
        each(to_1, [&](float &x, int u, int dim) { x = w1 ? w1[dim * F + u] : 0.0f; });
        each(to_2, [&](float &x, int u, int dim) { x = w2 ? w2[u * D + dim] : 0.0f; });
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                bias_1[nt][e] = b1 ? b1[unit + 8 * nt + 2 * at.t + e] : 0.0f;
        bias_2 = each_dim<per>([&](int i) { return b2 ? b2[per * at.lane + i] : 0.0f; });
    }
    // Of a tile in the stream's order
    __device__ __forceinline__ int tokens_of(int number) const {
        return number == tiles - 1 ? last_n : M;
    }
    __device__ __forceinline__ bool ends_batch(int number) const {
        return number == tiles - 1 || (number + 1) % X::tiles == 0;
    }
    __device__ __forceinline__ int64_t last_token(int batch) const {
        return int64_t(min((batch + 1) * X::batch, p.tokens) - 1);
    }
    // The last keys of 16 mini-batches from `first` on, zeros where there are none, into a tile
    __device__ __forceinline__ void gather_last_keys(E *tile, int first) {
        const E *const k = static_cast<const E *>(p.k) + offset + per * at.lane;
        for (int i = at.warp; i < M; i += X::warps) {
            Dims key = {};
            if (first + i < p.batches)
                key = dims_at<per>(k + last_token(first + i) * width);
            store_dims(tile + i * ld + per * at.lane, key);
        }
        sync_block();
    }
    // Rows of tile `number` of the stream, `stride` apart
    __device__ __forceinline__ void fetch_rows(E *tile, const E *from, int stride, int number) {
        constexpr int per = 16 / int(sizeof(E)), chunks = D / per;
#pragma unroll
        for (int j = 0; j < (M * chunks + X::threads - 1) / X::threads; ++j) {
            const int chunk = j * X::threads + at.thread;
            if ((M * chunks) % X::threads != 0 && chunk >= M * chunks)
                break;
            const int r = chunk / chunks, c = chunk % chunks * per, token = number * M + r;
            const bool valid = token < p.tokens;
            copy_async(tile + r * ld + c, from + (valid ? int64_t(token) * stride : 0) + c, valid);
        }
    }
    // P1 of this warp's units in the trace, this thread's part
    __device__ __forceinline__ int64_t trace_at(int tile) const {
        return (((int64_t(head) * p.batches * X::tiles + tile) * (F / 16) + unit / 16) * 32 +
                at.lane) *
               8;
    }
    __device__ __forceinline__ void output(void *to, int64_t token, const Dims &x) const {
        store_dims(static_cast<E *>(to) + offset + token * width + per * at.lane, x);
    }

    // ---- products

    // z (+)= x W, summed over dims: x [16, D]
    template <class W>
    __device__ __forceinline__ void over_dims(Result &z, const E *x, const W &w) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            FragA<E> a;
            float c[2][4];
            load_a(a, x + 16 * k, ld, at.lane);
            get(c[0], w, 2 * k);
            get(c[1], w, 2 * k + 1);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                FragB<E> y;
                b_of_transposed(y, c[0], c[1], nt);
                mma(z[nt], a, y);
            }
        }
    }
    // z += x W for dims 8 j to 8 j + 7, summed over this warp's units
    template <class W>
    __device__ __forceinline__ void over_units(float (&z)[4], const FragA<E> &x, const W &w,
                                               int j) {
        float c[4];
        FragB<E> y;
        get(c, w, j);
        b_of(y, c, at.lane);
        mma(z, x, y);
    }
    // visit(j, this warp's part of dims 8 j to 8 j + 7 of x W, summed over its units)
    template <class Visit>
    __device__ __forceinline__ void over_units(const FragA<E> &x, const Weight &w, Visit visit) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            float c[4] = {};
            over_units(c, x, w, j);
            visit(j, c);
        }
    }
    __device__ __forceinline__ void put_product(int which, const FragA<E> &x, const Weight &w) {
        over_units(x, w, [&](int j, const float(&c)[4]) { put(which, j, c); });
    }
    // z += a y, y being columns 16 k to 16 k + 15 of a tile [16, ld], summed over its rows
    __device__ __forceinline__ void over_rows(float (&z)[2][4], const FragA<E> &a, const E *y,
                                              int k) {
        FragB<E> f[2];
        load_b_transposed(f, y + 16 * k, ld, at.lane);
        mma(z[0], a, f[0]);
        mma(z[1], a, f[1]);
    }
    // z += a y for 16 x 16 factors, y given by its transpose
    __device__ __forceinline__ void small(Result &z, const FragA<E> &a, const FragA<E> &y_t) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
            FragB<E> f;
            b_rows(f, y_t, nt);
            mma(z[nt], a, f);
        }
    }
    // Of a product x y over tokens: x [16 units, 16 tokens], y a tile of tokens
    struct Outer {
        const FragA<E> &x;
        const E *y;
    };
    // w += their sum, one after the other
    template <class W, int terms>
    __device__ __forceinline__ void add(W &w, const Outer (&outer)[terms]) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            FragB<E> f[terms][2];
#pragma unroll
            for (int n = 0; n < terms; ++n)
                load_b_transposed(f[n], outer[n].y + 16 * k, ld, at.lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float c[4];
                get(c, w, 2 * k + i);
#pragma unroll
                for (int n = 0; n < terms; ++n)
                    add_step(c, outer[n].x, f[n][i]);
                set(w, 2 * k + i, c);
            }
        }
    }
    template <class W> __device__ __forceinline__ void add(W &w, const FragA<E> &x, const E *y) {
        add(w, {{x, y}});
    }
    // The sums over tokens of x, given by its transpose
    __device__ __forceinline__ void add_bias(float (&bias)[2][2], const FragA<E> &x_t, float sign) {
        FragA<E> ones;
        a_of_ones(ones);
        Result z = {};
        small(z, ones, x_t);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                bias[nt][e] += sign * z[nt][e];
    }
    // This lane's dims of a row
    static __device__ __forceinline__ Dims row_of(const E *tile, int row, int lane) {
        return dims_at<per>(tile + row * ld + per * lane);
    }
    __device__ __forceinline__ Dims sum_rows(const E *tile) {
        Dims sum = {};
#pragma unroll
        for (int i = 0; i < M; ++i)
            sum += row_of(tile, i, at.lane);
        return sum;
    }
    // gelu of z in its place, where wanted with its slope and curve
    __device__ __forceinline__ void activate(Result &z, Result *slope = nullptr,
                                             Result *curve = nullptr) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Gelu y(z[nt][e]);
                z[nt][e] = y.value;
                if (slope)
                    (*slope)[nt][e] = y.slope;
                if (curve)
                    (*curve)[nt][e] = y.curve;
            }
    }
    __device__ __forceinline__ void copy(Result &x, const Result &y) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                x[nt][e] = y[nt][e];
    }
    __device__ __forceinline__ void multiply(Result &x, const Result &y) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                x[nt][e] *= y[nt][e];
    }
    __device__ __forceinline__ void scale_rows(Result &c, const float (&a)[2]) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                c[nt][e] *= a[e >> 1];
    }
    // Rows are queries, columns keys.
    __device__ __forceinline__ void causal(Result &c, float one) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                c[nt][e] =
                    8 * nt + 2 * at.t + (e & 1) <= at.g + 8 * (e >> 1) ? c[nt][e] + one : 0.0f;
    }
    // to[row] += sum of x y over columns, for this thread's columns
    __device__ __forceinline__ void add_along(float (&to)[2], const Result &x, const Result &y,
                                              float by) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = 0;
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    sum += x[nt][2 * half + e] * y[nt][2 * half + e];
            to[half] += sum * by;
        }
    }

    // z += what start() makes of a bias
    __device__ __forceinline__ void add_start(Result &z, const float (&bias)[2][2]) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[nt][e] += bias[nt][e & 1];
    }
    __device__ __forceinline__ void start(Result &z, const float (&bias)[2][2]) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[nt][e] = bias[nt][e & 1];
    }

    // A factor's elements as those of a result
    static __device__ __forceinline__ void rows_of(Result &c, const FragA<Bf16> &a) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 x = floats(Pair<Bf16>{a.x[i]});
            c[i >> 1][2 * (i & 1)] = x.x;
            c[i >> 1][2 * (i & 1) + 1] = x.y;
        }
    }
    static __device__ __forceinline__ void rows_of(Result &c, const FragA<float> &a) {
#pragma unroll
        for (int i = 0; i < 8; ++i) // columns 8 (i / 4) + i / 2 % 2, rows 8 (i % 2)
            c[i >> 2][2 * (i & 1) + (i >> 1 & 1)] =
                float_of_bits(a.high[i]) + float_of_bits(a.low[i]);
    }

    // ---- exchange over the head's warps

    // All of them
    __device__ __forceinline__ void meet() {
        if constexpr (split > 1) {
            cluster_arrive();
            cluster_wait();
        } else
            sync_block();
    }
    __device__ __forceinline__ void await(int which) {
        if constexpr (split > 1) {
            wait_for_deliveries(exchange.deliveries + which, phases >> which & 1);
            phases ^= 1u << which;
            // Parts may be written again: each row has come after its warp had read its parts, but
            // that is hard to see, and a barrier where all wait anyway costs little.
            if (which == 1)
                sync_block();
        } else
            sync_block();
    }
    // This warp's part of dims 8 j to 8 j + 7
    __device__ __forceinline__ void put(int which, int j, const float (&c)[4]) {
        float *to = exchange.parts + (which * X::warps + at.warp) * M * X::row;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            store_pair(to + (at.g + 8 * half) * X::row + 8 * j + 2 * at.t, c[2 * half],
                       c[2 * half + 1]);
    }
    // Of this warp's token: what block `from` sends
    __device__ __forceinline__ float *sum_at(int buffer, int from, int which) {
        const int row = buffer * X::rows + at.warp / X::sharers;
        return exchange.sums + ((row * split + from) * most + which) * D;
    }
    // Whether what is this token's alone is written by this warp
    __device__ __forceinline__ bool leads() const { return at.warp % X::sharers == 0; }
    // The block's sums of what was put go to the tokens' blocks, where `more` bytes are to come
    // beside them. `own` is this warp's token's where there is one block.
    template <int count>
    __device__ __forceinline__ void reduce(int buffer, Dims (&own)[count], unsigned more = 0) {
        sync_block();
        const auto part = [&](int which, int token, int w) {
            return exchange.parts + ((which * X::warps + w) * M + token) * X::row;
        };
        if constexpr (split == 1) {
#pragma unroll
            for (int which = 0; which < count; ++which) {
                own[which] = {};
#pragma unroll
                for (int w = 0; w < X::warps; ++w)
                    own[which] += dims_at<per>(part(which, row, w) + per * at.lane);
            }
        } else {
            Deliveries *const to_all = exchange.deliveries + 2 * buffer;
            if (at.thread == 0)
                announce(to_all, X::rows * split * count * D * unsigned(sizeof(float)) + more);
            constexpr int lanes = D / 4, at_once = 32 / lanes; // rows of 4 numbers a lane
#pragma unroll
            for (int i = 0; i < split * count / X::sharers / at_once; ++i) {
                const int at_row = at_once * i + at.lane / lanes, which = at_row % count,
                          to = at_row / count * X::sharers + at.warp % X::sharers,
                          token = to * X::rows + at.warp / X::sharers, dim = at.lane % lanes * 4;
                cuda::Dims<4> sum = {};
#pragma unroll
                for (int w = 0; w < X::warps; ++w)
                    sum += dims_at<4>(part(which, token, w) + dim);
                deliver(sum_at(buffer, rank, which) + dim, {sum.x[0], sum.x[1], sum.x[2], sum.x[3]},
                        to_all, to);
            }
        }
    }
    // When they have come
    template <int count> __device__ __forceinline__ void collect(int buffer, Dims (&own)[count]) {
        if constexpr (split > 1)
#pragma unroll
            for (int which = 0; which < count; ++which) {
                own[which] = {};
#pragma unroll
                for (int from = 0; from < split; ++from)
                    own[which] += dims_at<per>(sum_at(buffer, from, which) + per * at.lane);
            }
    }
    // This token's row of a tile of every block
    __device__ __forceinline__ void hand_out(E *tile, const Dims &x) {
        if constexpr (split == 1)
            store_dims(tile + row * ld + per * at.lane, x);
        else {
            // Who has the row may send the next sums: all of the token's warps have read these.
            if constexpr (X::sharers > 1)
                sync_warps(1 + at.warp / X::sharers, 32 * X::sharers);
            if (at.thread == 0)
                announce(exchange.deliveries + 1, M * D * unsigned(sizeof(E)));
            // Lanes have 16 bytes of one block's row each.
            constexpr int chunks = D * int(sizeof(E)) / 16, at_once = 32 / chunks;
            const int chunk = at.lane % chunks;
            const float4 words = chunk_of_row<E>(x, chunk);
#pragma unroll
            for (int i = 0; i < split / at_once / X::sharers; ++i)
                deliver(tile + row * ld + chunk * (16 / int(sizeof(E))), words,
                        exchange.deliveries + 1,
                        (i * X::sharers + at.warp % X::sharers) * at_once + at.lane / chunks);
        }
    }

    // ---- one token on a warp

    struct Norm {
        Dims z;  // normalised
        float r; // 1 / std
        __device__ __forceinline__ Norm(const Dims &x, float eps) : z(x - mean(x)) {
            r = inverse_root(mean(z * z) + eps);
            z = r * z;
        }
    };
    // Of h = LN's result before g and b, with u = g (g h + b - target).
    struct Loss {
        Dims h, residual;
        float r, mean_u, mean_uh;
        __device__ __forceinline__ Loss(const Norm &norm, const Dims &g, const Dims &goal)
            : h(norm.z), residual(g * h - goal), r(norm.r) {
            const Dims u = g * residual;
            mean_u = mean(u);
            mean_uh = mean(u * h);
        }
        // u - mean(u) - h mean(u h): times r the loss's gradient
        __device__ __forceinline__ Dims centred(const Dims &g) const {
            return g * residual - mean_u - mean_uh * h;
        }
    };
    // target - b
    __device__ __forceinline__ Dims goal_of(const Dims &k, const Dims &v) const {
        return v - k - b;
    }

    __device__ __forceinline__ Dims goal_at(int64_t token) const {
        const int64_t from = offset + token * width + per * at.lane;
        return goal_of(dims_at<per>(static_cast<const E *>(p.k) + from),
                       dims_at<per>(static_cast<const E *>(p.v) + from));
    }

    const MlpParams &p;
    const MlpExchange<X, most> exchange;
    const Place at;
    const int rank, head, stream, h, width;
    const int short_n;                 // tokens of the last mini-batch
    const int tiles, last_n;           // of the stream; tokens of the last one
    const int warp_of_head, row, unit; // row: its token of a tile; unit: its first hidden unit
    const int64_t offset;
    unsigned phases = 0; // bits: the parity of the next
    Dims g, b;
};

} // namespace ponder::cuda
