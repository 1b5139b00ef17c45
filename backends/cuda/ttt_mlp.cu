// ttt_mlp: see src/tensor/ops.hpp. One block of 16 warps has one head of one stream; its state, 128
// KiB for D = 64, lies in the registers: warp w has hidden units 16 w to 16 w + 15 of W1 (as
// inputs' transpose with b1, like ttt_linear's state), and of W2 outputs 16 (w % 4) by hidden units
// 64 (w / 4). A copy of W2 in shared memory is the factor of G2 W2^T. Rates and P are as in
// ttt_linear.cuh:
//
//   1. Z1 = K W1 + b1, X = gelu(Z1); Q W1 + b1
//   2. Z2 = X W2 + b2, a quarter of the hidden units a warp
//   3. G2 from the norm of Z2, a token a warp; P2 = -f c G2
//   4. P1 = (P2 W2^T) gelu'(Z1); Q W1 + b1 + A P1, X' = gelu of it; W1, b1 += K^T P1, sum P1
//   5. U = X' W2 + b2 + A' P2, A'_ij = a_i / f (x'_i x_j + 1); W2, b2 += X^T P2, sum P2
//   6. y = q + LN(U), a token a warp
//
// with a barrier after each but the last. The error after a step is that of one more row, the last
// key, in 1 to 3 of the next; the error under the initial state has blocks of its own.
#include "ttt_linear_loss.cuh"
#include "ttt_mlp.cuh"

namespace ponder::cuda {
namespace {

template <class E> struct Mlp {
    using L = Linear<E, 64, 16>;
    static constexpr int D = 64, M = mlp_batch, F = 4 * D, ld = D + 8, wide = F + 8;
    static constexpr int warps = F / 16, threads = 32 * warps, quarters = warps / (D / 16);
    static constexpr int stages = 3;
    static constexpr int z_ld = D + 4;
};

template <class E> struct MlpShared {
    using X = Mlp<E>;
    E *tiles, *x, *x_q, *p1, *p2, *w2, *x_last;
    float *z, *z_last, *goal_last, *b2, *c, *block;
    Rates<16> rates;
    int size;
    __host__ __device__ explicit MlpShared(unsigned char *base) {
        SharedLayout s(base);
        tiles = s.take<E>(X::stages * 3 * X::M * X::ld);
        x = s.take<E>(X::M * X::wide);
        x_q = s.take<E>(X::M * X::wide);
        p1 = s.take<E>(X::M * X::wide);
        p2 = s.take<E>(X::M * X::ld);
        w2 = s.take<E>(X::D * X::wide); // [D, F + 8], transposed
        x_last = s.take<E>(X::wide);
        z = s.take<float>(X::quarters * X::M * X::z_ld);
        z_last = s.take<float>(X::quarters * X::D);
        goal_last = s.take<float>(2 * X::D);
        b2 = s.take<float>(2 * X::D);
        c = s.take<float>(4 * X::M);
        block = s.take<float>(X::warps);
        rates = {s.take<float>(3 * X::M + 4)};
        size = s.size();
    }
    __device__ E *tile(int batch, int input) const { // k, v, q
        return tiles + (batch % X::stages * 3 + input) * X::M * X::ld;
    }
};

template <class E, bool traced> class MlpScan {
    using X = Mlp<E>;
    using L = typename X::L;
    static constexpr int D = X::D, M = X::M, F = X::F, ld = X::ld, wide = X::wide;

public:
    __device__ MlpScan(const MlpParams &p)
        : p(p), shared(shared_memory()), width(p.heads * D),
          short_n(p.tokens - (p.batches - 1) * M) {
        scans = p.streams * p.heads;
        is_probe = int(blockIdx.x) >= scans;
        head = int(blockIdx.x) - (is_probe ? scans : 0);
        stream = head / p.heads;
        h = head % p.heads;
        offset = int64_t(stream) * p.tokens * width + h * D;
        at.col = 16 * at.warp;
        out = 16 * (at.warp % (D / 16));
        quarter = 64 * (at.warp / (D / 16));
    }

    __device__ void run() {
        read_states();
        if (is_probe)
            probe_initial();
        else
            scan();
    }

private:
    __device__ __forceinline__ void read_states() {
        const float *from_1 = p.w1 + int64_t(head) * D * F, *from_2 = p.w2 + int64_t(head) * F * D;
#pragma unroll
        for (int j = 0; j < 2 * L::kt + 1; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int in = 8 * j + 2 * at.t + (e & 1), unit = at.col + at.g + 8 * (e >> 1);
                w1[j][e] = in < D    ? from_1[in * F + unit]
                           : in == D ? p.b1[int64_t(head) * F + unit]
                                     : 0.0f;
            }
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                w2[j][e] =
                    from_2[(quarter + 8 * j + 2 * at.t + (e & 1)) * D + out + at.g + 8 * (e >> 1)];
        if (at.thread < D)
            shared.b2[at.thread] = p.b2[int64_t(head) * D + at.thread];
        copy_w2();
    }
    __device__ __forceinline__ void copy_w2() {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_pair(shared.w2 + (out + at.g + 8 * half) * wide + quarter + 8 * j + 2 * at.t,
                           w2[j][2 * half], w2[j][2 * half + 1]);
    }

    // x W1 + b1 for 16 rows
    __device__ __forceinline__ void first_layer(float (&z)[2][4], const E *x) {
        typename L::Rows rows;
        const E *const from[1] = {x};
        typename L::Rows *const to[1] = {&rows};
        products<L, 1>(to, from, w1, at);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[nt][e] = rows[0][nt][e];
    }
    // gelu of it to `to`; its slope
    __device__ __forceinline__ void activate(float (&slope)[2][4], const float (&z)[2][4], E *to) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Gelu a(z[nt][2 * half]), b(z[nt][2 * half + 1]);
                slope[nt][2 * half] = a.slope;
                slope[nt][2 * half + 1] = b.slope;
                store_pair(to + (at.g + 8 * half) * wide + at.col + 8 * nt + 2 * at.t, a.value,
                           b.value);
            }
    }
    // This warp's part of x W2
    __device__ __forceinline__ void second_layer(float (&z)[2][4], const E *x) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[nt][e] = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            FragA<E> a;
            load_a(a, x + quarter + 16 * k, wide, at.lane);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                FragB<E> b;
                b_of_transposed(b, w2[2 * k], w2[2 * k + 1], nt);
                mma(z[nt], a, b);
            }
        }
    }
    __device__ __forceinline__ void put_z(const float (&z)[2][4]) {
        float *to = shared.z + quarter / 64 * M * X::z_ld;
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_pair(to + (at.g + 8 * half) * X::z_ld + out + 8 * nt + 2 * at.t,
                           z[nt][2 * half], z[nt][2 * half + 1]);
    }
    // Dims 2 lane, 2 lane + 1 of the sum over quarters, plus b2.
    __device__ __forceinline__ float2 sum_z(const float *parts, int stride, const float *b2) {
        float2 z = *reinterpret_cast<const float2 *>(b2 + 2 * at.lane);
#pragma unroll
        for (int i = 0; i < X::quarters; ++i) {
            const float2 x = *reinterpret_cast<const float2 *>(parts + i * stride + 2 * at.lane);
            z.x += x.x;
            z.y += x.y;
        }
        return z;
    }
    // z becomes h; returns 1 / std.
    __device__ __forceinline__ float normalise(float2 &z) {
        const float mean = sum_of_lanes(z.x + z.y) * (1.0f / D);
        z.x -= mean;
        z.y -= mean;
        const float r = inverse_root(sum_of_lanes(z.x * z.x + z.y * z.y) * (1.0f / D) + p.eps);
        z.x *= r;
        z.y *= r;
        return r;
    }
    // One row, the last key before, under the state that is in the registers now.
    __device__ __forceinline__ void last_first_layer(const E *key) {
        float z[2][4], bias[2][2];
        bias_of<L>(bias, w1, at.t);
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[nt][e] = bias[nt][e & 1];
#pragma unroll
        for (int k = 0; k < L::kt; ++k) {
            FragA<E> a;
            load_a_row(a, key + 16 * k, at.lane);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                FragB<E> b;
                b_of_transposed(b, w1[2 * k], w1[2 * k + 1], nt);
                mma(z[nt], a, b);
            }
        }
        if (at.g == 0)
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
                store_pair(shared.x_last + at.col + 8 * nt + 2 * at.t, Gelu(z[nt][0]).value,
                           Gelu(z[nt][1]).value);
    }
    __device__ __forceinline__ void last_second_layer() {
        float z[2][4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            FragA<E> a;
            load_a_row(a, shared.x_last + quarter + 16 * k, at.lane);
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
                FragB<E> b;
                b_of_transposed(b, w2[2 * k], w2[2 * k + 1], nt);
                mma(z[nt], a, b);
            }
        }
        if (at.g == 0)
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
                store_pair(shared.z_last + quarter / 64 * D + out + 8 * nt + 2 * at.t, z[nt][0],
                           z[nt][1]);
    }
    __device__ __forceinline__ float last_error(const float *b2, const float *goal, float2 g) {
        float2 z = sum_z(shared.z_last, D, b2);
        normalise(z);
        const float a = g.x * z.x - goal[2 * at.lane], b = g.y * z.y - goal[2 * at.lane + 1];
        return a * a + b * b;
    }

    __device__ __forceinline__ void scan() {
        const auto fetch_batch = [&](int batch) {
            if (batch < p.batches) {
                const void *const from[3] = {p.k, p.v, p.q};
                constexpr int per = 16 / int(sizeof(E)), chunks = D / per;
#pragma unroll
                for (int i = 0; i < 3; ++i)
                    if (at.thread < M * chunks) {
                        const int row = at.thread / chunks, c = at.thread % chunks * per;
                        const int token = batch * M + row;
                        const bool valid = token < p.tokens;
                        copy_async(shared.tile(batch, i) + row * ld + c,
                                   static_cast<const E *>(from[i]) + offset +
                                       int64_t(valid ? token : 0) * width + c,
                                   valid);
                    }
            }
            commit_copies();
        };
        const int64_t rate_offset = int64_t(stream) * p.tokens * p.heads + h;
        const auto rate_of = [&](int batch) {
            const int token = batch * M + at.thread;
            return at.thread < M && token < p.tokens
                       ? rate_at(p, rate_offset + int64_t(token) * p.heads)
                       : 0.0f;
        };
        const auto set_rate = [&](int batch, float rate) {
            if (at.thread < M)
                shared.c[(batch & 3) * M + at.thread] =
                    -shared.rates.f(batch == p.batches - 1) * rate;
        };
        fetch_batch(0);
        fetch_batch(1);
        shared.rates.fill(p, at.thread, short_n);
        const float rate_0 = rate_of(0), rate_1 = rate_of(1);
        float rate_ahead = rate_of(2);
        const float2 g = *reinterpret_cast<const float2 *>(p.g + h * D + 2 * at.lane),
                     b = *reinterpret_cast<const float2 *>(p.b + h * D + 2 * at.lane);
        FragB<E> ones;
        b_of_ones(ones, at.lane);
        sync_block();
        set_rate(0, rate_0);
        set_rate(1, rate_1);
        wait_for_copies<1>();
        sync_block();

        float before = 0, after = 0;
        for (int batch = 0; batch < p.batches; ++batch) {
            const bool is_short = batch == p.batches - 1;
            const int n = is_short ? short_n : M;
            const E *k_tile = shared.tile(batch, 0), *v_tile = shared.tile(batch, 1),
                    *q_tile = shared.tile(batch, 2);
            const float *b2 = shared.b2 + (batch & 1) * D;
            const bool learns = shared.rates.learns(is_short) != 0;
            const bool queries = !traced || p.y;
            if (traced && batch % trace_every == 0)
                trace_state(batch / trace_every, b2);

            // 1
            float z[2][4], q1[2][4], slope[2][4];
            first_layer(z, k_tile);
            activate(slope, z, shared.x);
            FragA<E> a; // A
            if (queries) {
                first_layer(q1, q_tile);
                float c[2][4] = {};
                row_products<L>(c, q_tile, k_tile, at.lane);
                rate_rows(c, is_short, 1.0f);
                a_of(a, c[0], c[1]);
            }
            if (p.loss && batch > 0)
                last_first_layer(shared.tile(batch - 1, 0) + (M - 1) * ld);
            sync_block();
            fetch_batch(batch + 2);
            set_rate(batch + 2, rate_ahead);
            rate_ahead = rate_of(batch + 3);

            // 2
            second_layer(z, shared.x);
            put_z(z);
            if (p.loss && batch > 0)
                last_second_layer();
            sync_block();

            // 3
            {
                const int row = at.warp;
                float2 x = sum_z(shared.z + row * X::z_ld, M * X::z_ld, b2);
                const float r = normalise(x);
                const float2 kk = floats(pair_at(k_tile + row * ld + 2 * at.lane)),
                             vv = floats(pair_at(v_tile + row * ld + 2 * at.lane));
                const float goal[2] = {vv.x - kk.x - b.x, vv.y - kk.y - b.y};
                const float residual[2] = {g.x * x.x - goal[0], g.y * x.y - goal[1]};
                const float u[2] = {g.x * residual[0], g.y * residual[1]};
                const float mean_u = sum_of_lanes(u[0] + u[1]) * (1.0f / D),
                            mean_uh = sum_of_lanes(u[0] * x.x + u[1] * x.y) * (1.0f / D);
                const float c = shared.c[(batch & 3) * M + row] * r;
                const float p2[2] = {c * (u[0] - mean_u - x.x * mean_uh),
                                     c * (u[1] - mean_u - x.y * mean_uh)};
                store_pair(shared.p2 + row * ld + 2 * at.lane, p2[0], p2[1]);
                if (traced && row < n)
                    store_pair(static_cast<E *>(p.trace_p) +
                                   (int64_t(head) * p.tokens + batch * M + row) * D + 2 * at.lane,
                               p2[0], p2[1]);
                if (row == n - 1) {
                    before += residual[0] * residual[0] + residual[1] * residual[1];
                    store_pair(shared.goal_last + (batch & 1) * D + 2 * at.lane, goal[0], goal[1]);
                }
                if (p.loss && batch > 0 && at.warp == 0)
                    after += last_error(b2, shared.goal_last + (1 - (batch & 1)) * D, g);
            }
            sync_block();

            // 4
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    z[nt][e] = 0;
#pragma unroll
            for (int k = 0; k < L::kt; ++k) {
                FragA<E> x;
                FragB<E> y[2];
                load_a(x, shared.p2 + 16 * k, ld, at.lane);
                load_b_transposed(y, shared.w2 + 16 * k * wide + at.col, wide, at.lane);
                mma(z[0], x, y[0]);
                mma(z[1], x, y[1]);
            }
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    z[nt][2 * half] *= slope[nt][2 * half];
                    z[nt][2 * half + 1] *= slope[nt][2 * half + 1];
                    store_pair(shared.p1 + (at.g + 8 * half) * wide + at.col + 8 * nt + 2 * at.t,
                               z[nt][2 * half], z[nt][2 * half + 1]);
                }
            if constexpr (traced)
                store_rows(static_cast<E *>(p.trace_p1) +
                               (((int64_t(head) * p.batches + batch) * X::warps + at.warp) * 32 +
                                at.lane) *
                                   8,
                           z[0], z[1]);
            sync_warp(); // of P1, a warp reads its own units
            if (queries) {
                FragB<E> y[2];
                load_b_transposed(y, shared.p1 + at.col, wide, at.lane);
                mma(q1[0], a, y[0]);
                mma(q1[1], a, y[1]);
                activate(slope, q1, shared.x_q);
            }
            if (learns) {
                FragA<E> x;
                load_a_transposed(x, shared.p1 + at.col, wide, at.lane);
#pragma unroll
                for (int k = 0; k < L::kt; ++k) {
                    FragB<E> y[2];
                    load_b_transposed(y, k_tile + 16 * k, ld, at.lane);
                    add_step(w1[2 * k], x, y[0]);
                    add_step(w1[2 * k + 1], x, y[1]);
                }
                add_step(w1[2 * L::kt], x, ones);
            }
            if (at.thread < D) {
                float x = 0;
                for (int j = 0; j < M; ++j)
                    x += to_float(shared.p2[j * ld + at.thread]);
                shared.b2[(1 - (batch & 1)) * D + at.thread] = b2[at.thread] + (learns ? x : 0.0f);
            }
            sync_block();

            // 5
            FragA<E> x;
            FragB<E> y[2];
            if (queries) {
                second_layer(z, shared.x_q);
                float c[2][4] = {};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    load_a(x, shared.x_q + quarter + 16 * k, wide, at.lane);
                    load_b(y, shared.x + quarter + 16 * k, wide, at.lane);
                    mma(c[0], x, y[0]);
                    mma(c[1], x, y[1]);
                }
                rate_rows(c, is_short, quarter == 0 ? 1.0f : 0.0f);
                a_of(x, c[0], c[1]);
                load_b_transposed(y, shared.p2 + out, ld, at.lane);
                mma(z[0], x, y[0]);
                mma(z[1], x, y[1]);
                put_z(z);
            }
            if (learns) {
                load_a_transposed(x, shared.p2 + out, ld, at.lane);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    load_b_transposed(y, shared.x + quarter + 16 * k, wide, at.lane);
                    add_step(w2[2 * k], x, y[0]);
                    add_step(w2[2 * k + 1], x, y[1]);
                }
                copy_w2();
            }
            wait_for_copies<1>();
            sync_block();

            // 6
            if (queries) {
                const int row = at.warp;
                float2 x = sum_z(shared.z + row * X::z_ld, M * X::z_ld, b2);
                normalise(x);
                const float2 q = floats(pair_at(q_tile + row * ld + 2 * at.lane));
                if (row < n)
                    store_pair(static_cast<E *>(p.y) + offset + int64_t(batch * M + row) * width +
                                   2 * at.lane,
                               q.x + g.x * x.x + b.x, q.y + g.y * x.y + b.y);
            }
        }

        const float *b2_last = shared.b2 + (p.batches & 1) * D;
        if constexpr (traced)
            trace_state(trace_states(p.batches) - 1, b2_last);
        if (p.w_out)
            write_states(p.w_out + int64_t(head) * D * F, p.b_out + int64_t(head) * F,
                         p.w2_out + int64_t(head) * F * D, p.b2_out + int64_t(head) * D, b2_last);
        if (p.loss) {
            sync_block();
            last_first_layer(shared.tile(p.batches - 1, 0) + (short_n - 1) * ld);
            sync_block();
            last_second_layer();
            sync_block();
            if (at.warp == 0)
                after += last_error(b2_last, shared.goal_last + ((p.batches - 1) & 1) * D, g);
            after = sum_of_lanes(after);
            before = block_sum<X::warps>(before, shared.block, at);
            if (at.thread == 0) {
                p.loss_part[head * 3 + 1] = before;
                p.loss_part[head * 3 + 2] = after;
                finish_loss(p, stream, float(D));
            }
        }
    }

    // Causal, plus one, times a_i / f
    __device__ __forceinline__ void rate_rows(float (&c)[2][4], bool is_short, float one) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = at.g + 8 * half;
            const float rate = shared.rates.a(is_short, row);
#pragma unroll
            for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float &x = c[jj][2 * half + e];
                    x = 8 * jj + 2 * at.t + e <= row ? (x + one) * rate : 0.0f;
                }
        }
    }
    __device__ __forceinline__ void write_states(float *to_1, float *to_b1, float *to_2,
                                                 float *to_b2, const float *b2) {
#pragma unroll
        for (int j = 0; j < 2 * L::kt + 1; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int in = 8 * j + 2 * at.t + (e & 1), unit = at.col + at.g + 8 * (e >> 1);
                if (in < D)
                    to_1[in * F + unit] = w1[j][e];
                else if (in == D)
                    to_b1[unit] = w1[j][e];
            }
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                to_2[(quarter + 8 * j + 2 * at.t + (e & 1)) * D + out + at.g + 8 * (e >> 1)] =
                    w2[j][e];
        if (at.thread < D)
            to_b2[at.thread] = b2[at.thread];
    }
    __device__ __forceinline__ void trace_state(int64_t i, const float *b2) {
        const MlpState<D> to(p.trace_w, head, p.batches, i);
        write_states(to.w1, to.b1, to.w2, to.b2, b2);
    }

    // The last tokens of 16 mini-batches at a time.
    __device__ __forceinline__ void probe_initial() {
        E *keys = shared.tile(0, 0);
        const E *k = static_cast<const E *>(p.k) + offset,
                *v = static_cast<const E *>(p.v) + offset;
        const float2 g = *reinterpret_cast<const float2 *>(p.g + h * D + 2 * at.lane),
                     b = *reinterpret_cast<const float2 *>(p.b + h * D + 2 * at.lane);
        float error = 0;
        for (int first = 0; first < p.batches; first += M) {
            const int batch = first + at.warp;
            const int64_t from = int64_t(min((batch + 1) * M, p.tokens) - 1) * width + 2 * at.lane;
            float2 kk = {0, 0};
            if (batch < p.batches)
                kk = floats(pair_at(k + from));
            store_pair(keys + at.warp * ld + 2 * at.lane, kk.x, kk.y);
            sync_block();
            float z[2][4], slope[2][4];
            first_layer(z, keys);
            activate(slope, z, shared.x);
            sync_block();
            second_layer(z, shared.x);
            put_z(z);
            sync_block();
            float2 x = sum_z(shared.z + at.warp * X::z_ld, M * X::z_ld, shared.b2);
            normalise(x);
            if (batch < p.batches) {
                const float2 vv = floats(pair_at(v + from));
                const float e0 = g.x * x.x + b.x - (vv.x - kk.x),
                            e1 = g.y * x.y + b.y - (vv.y - kk.y);
                error += e0 * e0 + e1 * e1;
            }
        }
        sync_block();
        error = block_sum<X::warps>(error, shared.block, at);
        if (at.thread == 0) {
            p.loss_part[head * 3] = error;
            finish_loss(p, stream, float(D));
        }
    }

    const MlpParams &p;
    const MlpShared<E> shared;
    Place at;
    const int width, short_n;
    int scans, head, stream, h, out, quarter;
    bool is_probe;
    int64_t offset;
    typename L::State w1;
    float w2[8][4];
};

template <class E, bool traced>
__global__ void __launch_bounds__(Mlp<E>::threads, 1)
    mlp_scan(const __grid_constant__ MlpParams p) {
    MlpScan<E, traced>(p).run();
}

template <class E> size_t mlp_shared() { return size_t(MlpShared<E>(nullptr).size); }

template <class E>
cudaError_t run(const MlpParams &p, unsigned blocks_a_head, cudaStream_t stream) {
    return launch(p.trace_w ? mlp_scan<E, true> : mlp_scan<E, false>,
                  unsigned(p.streams * p.heads) * blocks_a_head, Mlp<E>::threads, mlp_shared<E>(),
                  stream, p);
}

bool needs_clusters(const TttMlpShape &s) {
    return s.mini_batch == mlp_wide_batch || s.head_dim == 128;
}
// Up to one and a half blocks a multiprocessor, as far as was measured; with 96 heads on 132 one
// block a head is faster.
bool on_clusters(const TttMlpShape &s) {
    if (needs_clusters(s))
        return true;
    if (s.split)
        return s.split > 1;
    const DeviceLimits device;
    return device.major >= 9 &&
           s.streams * s.heads * mlp_most_split(s.head_dim) * 2 <= device.processors * 3;
}
// visit(MlpSplitOf the shape's head dim)
template <class Visit> auto visit_dim(const TttMlpShape &s, Visit visit) {
    return s.head_dim == 64 ? visit(MlpSplitOf<64>()) : visit(MlpSplitOf<128>());
}

} // namespace

const char *ttt_mlp_misses(const TttMlpShape &s) {
    if (s.head_dim != 64 && s.head_dim != 128)
        return "the fused MLP scan has head dims 64 and 128";
    if (s.mini_batch != mlp_batch && s.mini_batch != mlp_wide_batch)
        return "the fused MLP scan has mini-batches of 16 and 64";
    if (s.mini_batch == mlp_wide_batch && s.head_dim == 128)
        return "for heads of 128 the fused MLP scan has mini-batches of 16 only";
    if (needs_clusters(s) && mlp_split(s) == 1)
        return "the fused MLP scan needs clusters of blocks for mini-batches of 64, heads of 128";
    if (s.tokens < 1 || s.streams < 1 || s.tokens > (1 << 24) || s.streams * s.heads > (1 << 24))
        return "too few or too many tokens, streams or heads for the fused scan";
    if (on_clusters(s))
        return visit_dim(s, [&](auto kernels) { return kernels.misses(s); });
    return shared_misses(s.type == TttType::bf16 ? mlp_shared<Bf16>() : mlp_shared<float>());
}

size_t ttt_mlp_workspace(const TttMlpShape &s) {
    return size_t(s.streams * s.heads * 3) * sizeof(float);
}

size_t ttt_mlp_trace(const TttMlpShape &s) { return MlpTrace(s).total; }

cudaError_t ttt_mlp(const TttMlpShape &s, const TttMlpForward &t, void *workspace,
                    unsigned *tickets, cudaStream_t stream) {
    MlpParams p = mlp_params(s);
    p.q = t.q, p.k = t.k, p.v = t.v, p.lr = t.lr;
    p.index = t.index, p.g = t.g, p.b = t.b;
    p.w1 = t.w1, p.b1 = t.b1, p.w2 = t.w2, p.b2 = t.b2;
    p.y = t.y, p.w_out = t.w1_out, p.b_out = t.b1_out, p.w2_out = t.w2_out, p.b2_out = t.b2_out;
    p.loss = t.loss, p.loss_part = static_cast<float *>(workspace), p.tickets = tickets;
    if (t.trace)
        MlpTrace(s).set(p, t.trace);
    if (on_clusters(s))
        return visit_dim(s, [&](auto kernels) { return kernels.run(s, p, stream); });
    const unsigned blocks = t.loss ? 2 : 1;
    return s.type == TttType::bf16 ? run<Bf16>(p, blocks, stream) : run<float>(p, blocks, stream);
}

cudaError_t ttt_mlp_states(const TttMlpShape &s, const MlpParams &reverse, cudaStream_t stream) {
    MlpParams p = reverse;
    p.y = nullptr;
    p.w_out = p.loss = nullptr;
    if (on_clusters(s))
        return visit_dim(s, [&](auto kernels) { return kernels.run(s, p, stream); });
    return s.type == TttType::bf16 ? run<Bf16>(p, 1, stream) : run<float>(p, 1, stream);
}

} // namespace ponder::cuda
