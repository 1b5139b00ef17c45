// TTT-MLP with a head's hidden units shared out to warps of the blocks of a cluster, for the scan
// and its reverse. Each of a head's 16 warps has 16 hidden units: their rows of W1 and W2 as [unit,
// dim] in the registers of results of products, and everything along them. Sums over hidden units,
// for [16 tokens, D], are exchanged: each warp puts its part in shared memory, its block's sum goes
// to the block that has the token, where each of the head's warps has one token and does its norm.
// What follows of it for all is handed out, a row of a tile in every block.
#pragma once

#include "cluster.cuh"
#include "ttt_mlp.cuh"

namespace ponder::cuda {

// split_: blocks of a head; tiles_: of 16 tokens, of a mini-batch
template <class E_, int split_, int tiles_ = 1> struct MlpSplit {
    using E = E_;
    using L = Linear<E, mlp_dim, mlp_batch>;
    static constexpr int D = mlp_dim, M = mlp_batch, F = mlp_inner, ld = L::ld;
    static constexpr int split = split_, warps = 16 / split, threads = 32 * warps;
    static constexpr int tiles = tiles_, batch = M * tiles; // tokens of a mini-batch
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

template <class X, int most> class MlpUnits {
protected:
    using E = typename X::E;
    using L = typename X::L;
    using Result = float[2][4]; // of 16 tokens by 16 units, or by 16 tokens
    using Weight = float[8][4]; // 16 units by D
    static constexpr int D = X::D, M = X::M, F = X::F, ld = X::ld, split = X::split;

    __device__ MlpUnits(const MlpParams &p, const MlpExchange<X, most> &exchange, int head)
        : p(p), exchange(exchange), rank(int(blockIdx.x) % split), head(head),
          stream(head / p.heads), h(head % p.heads), width(p.heads * D),
          short_n(p.tokens - (p.batches - 1) * X::batch), tiles((p.tokens + M - 1) / M),
          last_n(p.tokens - (tiles - 1) * M), row(rank * X::warps + uniform(at.warp)),
          unit(16 * row), offset(int64_t(stream) * p.tokens * width + h * D) {
        g = *reinterpret_cast<const float2 *>(p.g + h * D + 2 * at.lane);
        b = *reinterpret_cast<const float2 *>(p.b + h * D + 2 * at.lane);
        if (split > 1 && at.thread == 0)
            for (int i = 0; i < 3; ++i)
                set_deliveries(exchange.deliveries + i);
    }

    // ---- memory

    // visit(element of a weight, of the bias; unit, dim)
    template <class Visit> __device__ __forceinline__ void each(Weight &w, Visit visit) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                visit(w[j][e], unit + at.g + 8 * (e >> 1), 8 * j + 2 * at.t + (e & 1));
    }
    __device__ __forceinline__ void read(Weight &to_1, float (&bias_1)[2][2], Weight &to_2,
                                         float2 &bias_2, const float *w1, const float *b1,
                                         const float *w2, const float *b2) {
        each(to_1, [&](float &x, int u, int dim) { x = w1 ? w1[dim * F + u] : 0.0f; });
        each(to_2, [&](float &x, int u, int dim) { x = w2 ? w2[u * D + dim] : 0.0f; });
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                bias_1[nt][e] = b1 ? b1[unit + 8 * nt + 2 * at.t + e] : 0.0f;
        bias_2 = {b2 ? b2[2 * at.lane] : 0.0f, b2 ? b2[2 * at.lane + 1] : 0.0f};
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
        const E *const k = static_cast<const E *>(p.k) + offset + 2 * at.lane;
        for (int i = at.warp; i < M; i += X::warps) {
            float2 key = {0, 0};
            if (first + i < p.batches)
                key = floats(pair_at(k + last_token(first + i) * width));
            store_pair(tile + i * ld + 2 * at.lane, key.x, key.y);
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
    __device__ __forceinline__ void output(const void *to, int64_t token, float2 x) const {
        store_pair(static_cast<E *>(const_cast<void *>(to)) + offset + token * width + 2 * at.lane,
                   x.x, x.y);
    }

    // ---- products

    // z (+)= x W, summed over dims: x [16, D]
    __device__ __forceinline__ void over_dims(Result &z, const E *x, const Weight &w) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            FragA<E> a;
            load_a(a, x + 16 * k, ld, at.lane);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                FragB<E> y;
                b_of_transposed(y, w[2 * k], w[2 * k + 1], nt);
                mma(z[nt], a, y);
            }
        }
    }
    // visit(j, this warp's part of dims 8 j to 8 j + 7 of x W, summed over its units)
    template <class Visit>
    __device__ __forceinline__ void over_units(const FragA<E> &x, const Weight &w, Visit visit) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float c[4] = {};
            FragB<E> y;
            b_of(y, w[j], at.lane);
            mma(c, x, y);
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
    // w += sign x y: x [16 units, 16 tokens], y a tile of tokens
    __device__ __forceinline__ void add(Weight &w, const FragA<E> &x, const E *y) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            FragB<E> f[2];
            load_b_transposed(f, y + 16 * k, ld, at.lane);
            add_step(w[2 * k], x, f[0]);
            add_step(w[2 * k + 1], x, f[1]);
        }
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
    __device__ __forceinline__ float2 sum_rows(const E *tile) {
        float2 sum = {0, 0};
#pragma unroll
        for (int i = 0; i < M; ++i) {
            const float2 x = floats(pair_at(tile + i * ld + 2 * at.lane));
            sum.x += x.x;
            sum.y += x.y;
        }
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
        return exchange.sums + (((buffer * X::warps + at.warp) * split + from) * most + which) * D;
    }
    // The block's sums of what was put go to the tokens' blocks, where `more` bytes are to come
    // beside them. `own` is this warp's token's where there is one block.
    template <int count>
    __device__ __forceinline__ void reduce(int buffer, float2 (&own)[count], unsigned more = 0) {
        sync_block();
        const auto part = [&](int which, int token, int w) {
            return exchange.parts + ((which * X::warps + w) * M + token) * X::row;
        };
        if constexpr (split == 1) {
#pragma unroll
            for (int which = 0; which < count; ++which) {
                own[which] = {0, 0};
#pragma unroll
                for (int w = 0; w < X::warps; ++w) {
                    const float2 x =
                        *reinterpret_cast<const float2 *>(part(which, row, w) + 2 * at.lane);
                    own[which].x += x.x;
                    own[which].y += x.y;
                }
            }
        } else {
            Deliveries *const to_all = exchange.deliveries + 2 * buffer;
            if (at.thread == 0)
                announce(to_all, X::warps * split * count * D * unsigned(sizeof(float)) + more);
#pragma unroll
            for (int i = 0; i < split * count / 2; ++i) { // two rows of 16 x 4 numbers at a time
                const int at_row = 2 * i + at.lane / 16, which = at_row % count,
                          to = at_row / count, dim = at.lane % 16 * 4;
                float4 sum = {0, 0, 0, 0};
#pragma unroll
                for (int w = 0; w < X::warps; ++w) {
                    const float4 x = *reinterpret_cast<const float4 *>(
                        part(which, to * X::warps + at.warp, w) + dim);
                    sum.x += x.x;
                    sum.y += x.y;
                    sum.z += x.z;
                    sum.w += x.w;
                }
                deliver(sum_at(buffer, rank, which) + dim, sum, to_all, to);
            }
        }
    }
    // When they have come
    template <int count> __device__ __forceinline__ void collect(int buffer, float2 (&own)[count]) {
        if constexpr (split > 1)
#pragma unroll
            for (int which = 0; which < count; ++which) {
                own[which] = {0, 0};
#pragma unroll
                for (int from = 0; from < split; ++from) {
                    const float2 x = *reinterpret_cast<const float2 *>(sum_at(buffer, from, which) +
                                                                       2 * at.lane);
                    own[which].x += x.x;
                    own[which].y += x.y;
                }
            }
    }
    // This warp's token's row of a tile of every block
    __device__ __forceinline__ void hand_out(E *tile, float2 x) {
        if constexpr (split == 1)
            store_pair(tile + row * ld + 2 * at.lane, x.x, x.y);
        else {
            if (at.thread == 0)
                announce(exchange.deliveries + 1, M * D * unsigned(sizeof(E)));
            // Lanes have 16 bytes of one block's row each.
            constexpr int chunks = D * int(sizeof(E)) / 16, at_once = 32 / chunks;
            const int chunk = at.lane % chunks;
            float4 words;
            if constexpr (sizeof(E) == 2) {
                const float both = float_of_bits(pack_bf16(x.x, x.y));
                words = {from_lane(both, 4 * chunk), from_lane(both, 4 * chunk + 1),
                         from_lane(both, 4 * chunk + 2), from_lane(both, 4 * chunk + 3)};
            } else
                words = {from_lane(x.x, 2 * chunk), from_lane(x.y, 2 * chunk),
                         from_lane(x.x, 2 * chunk + 1), from_lane(x.y, 2 * chunk + 1)};
#pragma unroll
            for (int i = 0; i < split / at_once; ++i)
                deliver(tile + row * ld + chunk * (16 / int(sizeof(E))), words,
                        exchange.deliveries + 1, i * at_once + at.lane / chunks);
        }
    }

    // ---- one token on a warp, dims 2 lane and 2 lane + 1

    struct Norm {
        float2 z; // normalised
        float r;  // 1 / std
        __device__ __forceinline__ Norm(float2 x, float eps) : z(x) {
            const float mean = sum_of_lanes(z.x + z.y) * (1.0f / D);
            z.x -= mean;
            z.y -= mean;
            r = inverse_root(sum_of_lanes(z.x * z.x + z.y * z.y) * (1.0f / D) + eps);
            z.x *= r;
            z.y *= r;
        }
    };
    static __device__ __forceinline__ float mean(float x) { return sum_of_lanes(x) * (1.0f / D); }
    // Of h = LN's result before g and b, with u = g (g h + b - target).
    struct Loss {
        float2 h, residual;
        float r, mean_u, mean_uh;
        __device__ __forceinline__ Loss(const Norm &norm, float2 g, float2 goal)
            : h(norm.z), r(norm.r) {
            residual = {g.x * h.x - goal.x, g.y * h.y - goal.y};
            const float2 u = {g.x * residual.x, g.y * residual.y};
            mean_u = mean(u.x + u.y);
            mean_uh = mean(u.x * h.x + u.y * h.y);
        }
        // u - mean(u) - h mean(u h): times r the loss's gradient
        __device__ __forceinline__ float2 centred(float2 g) const {
            return {g.x * residual.x - mean_u - h.x * mean_uh,
                    g.y * residual.y - mean_u - h.y * mean_uh};
        }
    };
    // target - b
    __device__ __forceinline__ float2 goal_of(float2 k, float2 v) const {
        return {v.x - k.x - b.x, v.y - k.y - b.y};
    }

    __device__ __forceinline__ float2 goal_at(int64_t token) const {
        const int64_t from = offset + token * width + 2 * at.lane;
        return goal_of(floats(pair_at(static_cast<const E *>(p.k) + from)),
                       floats(pair_at(static_cast<const E *>(p.v) + from)));
    }

    const MlpParams &p;
    const MlpExchange<X, most> exchange;
    const Place at;
    const int rank, head, stream, h, width;
    const int short_n;       // tokens of the last mini-batch
    const int tiles, last_n; // of the stream; tokens of the last one
    const int row, unit;     // this warp's token of a tile, its first hidden unit
    const int64_t offset;
    unsigned phases = 0; // bits: the parity of the next
    float2 g, b;         // at dims 2 lane and 2 lane + 1
};

} // namespace ponder::cuda
