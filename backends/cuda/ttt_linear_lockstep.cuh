// The scan of TTT-Linear in bf16 for mini-batches of 16, as a pipeline of warps in lockstep: one
// barrier of the block a mini-batch, and between two of them each role works on another one.
//
//   ahead:  one warp, mini-batch i + 2: A, k_j k_i + 1 and g goal, which depend on no state
//   chain:  `chain` warps, i: P, the state, U; then Z and its norm's sums of i + 1
//   behind: one warp, i - 1: y, the losses, and q, k, v of i + 5 from memory
//
// The chain's warps hold the state as [D / chain, D] in the registers of matrix results, and what
// they make of it stays in registers. P in the form of a result is, each 8 x 8 turned, at once the
// first factor of P^T K and the second of A P. Sums over the lanes of a token are a product with
// ones, which leaves them in all four. b is held as the result of a product with ones, so that it
// is where Z starts from.
//
// Few instructions rather than few in a row: three heads of one multiprocessor share its
// schedulers. Notation as in ttt_linear.cuh.
#pragma once

#include "ttt_linear_loss.cuh"

#include <type_traits>

namespace ponder::cuda {

// helpers: the warps ahead, and as many behind. With one of each, three blocks share a
// multiprocessor, for which registers are kept low.
template <class L, int chain_, int helpers_, bool output_> struct Lockstep {
    using E = typename L::E;
    static constexpr int D = L::D, kt = L::kt, chain = chain_, helpers = helpers_, M = 16;
    static constexpr bool output = output_, many = helpers == 1;
    static constexpr int outs = D / chain, mo = outs / 16, no = outs / 8; // of a chain warp
    static constexpr int warps = chain + 2 * helpers, threads = 32 * warps;
    static constexpr int slots = 7, ready_slots = 3, u_ld = D + 8;
    // Of eight floats of u, which half comes first: so that neither the chain, whose writes have
    // two of them in four rows each, nor the warps behind, which read every eighth, meet a bank
    // twice.
    __device__ static constexpr int u_turn(int dim) { return dim >> 3 & 4; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    static constexpr int resident = many ? 2 : 1; // shared memory holds no more
#else
    static constexpr int resident = many ? 3 : 1;
#endif
    static_assert(L::M == 16 && sizeof(E) == 2 && outs % 16 == 0);

    struct Slot {
        E k[L::tile], q[L::tile], v[L::tile];
    };
    struct Ready {
        float4 goal[2 * kt][32];               // g goal as results lie
        uint4 a[32], keys[32];                 // A and k_i k_j + 1 as factors
        float rate[16], goal_sum[16][helpers]; // -f c_j; of g goal
    };
    struct Shared {
        Slot slot[slots];
        Ready ready[ready_slots];
        float u[2][16 * u_ld];
        float4 parts[2][chain][8][2];
        float z_last[2][D]; // the last key under the state after the step
        float mean[(chain + 1) * (D + 8)];
        float block[2 * warps], rates[3 * 16 + 4];
    };
};

// P of a chain warp, turned: x[n][h] has outputs 8 n + g of tokens 8 h + 2 t and the next.
template <int no> struct Turned {
    uint32_t x[no][2];
    __device__ __forceinline__ FragB<Bf16> second(int n) const { return {{x[n][0], x[n][1]}}; }
    __device__ __forceinline__ FragA<Bf16> first(int m) const {
        return {{x[2 * m][0], x[2 * m + 1][0], x[2 * m][1], x[2 * m + 1][1]}};
    }
};

template <class C, class L> class LockstepScan {
    using E = typename L::E;
    static constexpr int D = L::D, M = 16, kt = L::kt, mo = C::mo, no = C::no;

public:
    __device__ LockstepScan(const LinearParams &p)
        : p(p), shared(*reinterpret_cast<typename C::Shared *>(kept_shared_memory())),
          rates{shared.rates}, head(int(blockIdx.x)), stream(head / p.heads), width(p.heads * D),
          offset(int64_t(stream) * p.tokens * width + head % p.heads * D),
          short_n(p.tokens - (p.batches - 1) * M) {}

    __device__ void run() {
        Place at; // of this warp in its role
        rates.fill(p, at.thread, short_n);
        // Blocks that share a multiprocessor have different warps of theirs on one scheduler.
        at.warp = uniform(int(unsigned(at.warp) + blockIdx.x / 128u) % C::warps);
        float before = 0, after = 0;
        if (at.warp < C::chain)
            chain(at);
        else if (at.warp < C::chain + C::helpers)
            ahead(at, at.warp - C::chain);
        else
            behind(at, at.warp - C::chain - C::helpers, before, after);
        if (losses())
            finish(before, after, at);
    }

private:
    __device__ __forceinline__ bool losses() const { return C::output && p.loss; }
    __device__ __forceinline__ static void sync() { sync_warps(1, C::threads); }

    // c[16,8] = start + a b
    __device__ __forceinline__ static void mma_from(float (&c)[4], const FragA<E> &a,
                                                    const FragB<E> &b, const float (&start)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            c[e] = start[e];
        mma(c, a, b);
    }

    __device__ __forceinline__ static void put_factor(uint4 *to, const float (&c)[2][4],
                                                      const Place &at) {
        FragA<E> a;
        a_of(a, c[0], c[1]);
        to[at.lane] = {a.x[0], a.x[1], a.x[2], a.x[3]};
    }

    // Of several such warps, the first makes A, the last k_i k_j + 1, and each a share of the
    // goals.
    __device__ __forceinline__ void ahead(const Place &at, int which) {
        constexpr int share = kt / C::helpers;
        const bool first = which == 0, last = which == C::helpers - 1;
        const int col = 16 * share * which;
        float g[2 * share][2], gb[2 * share][2];
#pragma unroll
        for (int n = 0; n < 2 * share; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int dim = head % p.heads * D + col + 8 * n + 2 * at.t + e;
                g[n][e] = p.g[dim];
                gb[n][e] = p.g[dim] * p.b[dim];
            }
        const int64_t rate_offset = int64_t(stream) * p.tokens * p.heads + head % p.heads;
        // Bits as they come, so that nothing waits for them before the next mini-batch.
        const auto rate_of = [&](int batch) {
            const int token = batch * M + at.lane;
            const int64_t i = rate_offset + int64_t(token) * p.heads;
            uint32_t bits = 0;
            if (first && at.lane < M && token < p.tokens)
                bits = p.rate_bf16 ? static_cast<const uint16_t *>(p.lr)[i]
                                   : static_cast<const uint32_t *>(p.lr)[i];
            return bits;
        };
        uint32_t rate = rate_of(0);
        float by[2][2][2]; // what becomes of q_i k_j + 1
        const auto set_by = [&](bool is_short) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int row = at.g + 8 * half;
                        by[jj][half][e] = 8 * jj + 2 * at.t + e <= row + p.causal_k
                                              ? rates.a(is_short, row)
                                              : 0.0f;
                    }
        };
        int of_slot = 0, of_ready = 0;
        const auto prepare = [&](int batch) {
            const typename C::Slot &slot = shared.slot[of_slot];
            typename C::Ready &to = shared.ready[of_ready];
            of_slot = of_slot == C::slots - 1 ? 0 : of_slot + 1;
            of_ready = of_ready == C::ready_slots - 1 ? 0 : of_ready + 1;
            const bool is_short = batch == p.batches - 1;
            if (first && at.lane < M)
                to.rate[at.lane] = -rates.f(is_short) * rates.c(at.lane) *
                                   float_of_bits(p.rate_bf16 ? rate << 16 : rate);
            rate = rate_of(batch + 1);
            FragB<E> keys[kt][2]; // which lie as results do, too
            const auto load_keys = [&](int k) { load_b(keys[k], slot.k + 16 * k, L::ld, at.lane); };
            float sum[2] = {0, 0};
#pragma unroll
            for (int k = 0; k < share; ++k) {
                FragB<E> v[2];
                load_b(v, slot.v + col + 16 * k, L::ld, at.lane);
                if constexpr (C::many)
                    load_keys(k);
                else
                    load_b(keys[k], slot.k + col + 16 * k, L::ld, at.lane);
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
                    const int n = 2 * k + nt;
                    float x[4];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 vv = floats(Pair<E>{v[half].x[nt]}),
                                     kk = floats(Pair<E>{keys[k][half].x[nt]});
                        x[2 * half] = g[n][0] * (vv.x - kk.x) - gb[n][0];
                        x[2 * half + 1] = g[n][1] * (vv.y - kk.y) - gb[n][1];
                        sum[half] += x[2 * half] + x[2 * half + 1];
                    }
                    to.goal[2 * share * which + n][at.lane] = {x[0], x[1], x[2], x[3]};
                }
            }
            if (C::output) {
                if (!C::many && (first || (last && losses())))
#pragma unroll
                    for (int k = 0; k < kt; ++k)
                        load_keys(k);
                const auto with_keys = [&](float(&c)[2][4], const FragA<E> &x, int k) {
                    mma(c[0], x, keys[k][0]);
                    mma(c[1], x, keys[k][1]);
                };
                if (first) {
                    float c[2][4] = {};
#pragma unroll
                    for (int k = 0; k < kt; ++k) {
                        FragA<E> q;
                        load_a(q, slot.q + 16 * k, L::ld, at.lane);
                        with_keys(c, q, k);
                    }
                    if (is_short)
                        set_by(true);
#pragma unroll
                    for (int jj = 0; jj < 2; ++jj)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            c[jj][e] = c[jj][e] * by[jj][e >> 1][e & 1] + by[jj][e >> 1][e & 1];
                    put_factor(to.a, c, at);
                }
                if (last && losses()) {
                    float c[2][4];
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        c[0][e] = c[1][e] = 1;
#pragma unroll
                    for (int k = 0; k < kt; ++k) {
                        FragA<E> key;
                        load_a(key, slot.k + 16 * k, L::ld, at.lane);
                        with_keys(c, key, k);
                    }
                    put_factor(to.keys, c, at);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[half] += from_lane_xor(sum[half], 1);
                sum[half] += from_lane_xor(sum[half], 2);
                if (at.t == 0)
                    to.goal_sum[at.g + 8 * half][which] = sum[half];
            }
        };
        sync(); // the first two mini-batches are there, the rates, and sums of the initial state
        set_by(false);
        prepare(0);
        sync();
        for (int batch = 0; batch < p.batches; ++batch) {
            if (batch + 1 < p.batches)
                prepare(batch + 1);
            sync();
        }
        sync();
    }

    __device__ __forceinline__ void chain(const Place &at) {
        const int col = C::outs * at.warp;
        float w[mo][2 * kt][4], b[no][4], gg[no][2];
        start_state(w, b, col, at);
#pragma unroll
        for (int n = 0; n < no; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float g = p.g[head % p.heads * D + col + 8 * n + 2 * at.t + e];
                gg[n][e] = g * g;
            }
        // Where this lane reads and writes
        const int tile_at = (at.lane & 15) * L::ld + (at.lane >> 4) * 8;
        float *const u_at = shared.u[0] + at.g * C::u_ld + col + (2 * at.t ^ C::u_turn(col));
        float *const last_at = shared.z_last[0] + col + 2 * at.t;
        const bool writes = at.t == 0;
        float4 *const put_at = shared.parts[0][at.warp][at.g];
        const float4 *const get_at = shared.parts[0][C::chain == 2 ? 1 - at.warp : 0][at.g];
        E *trace = static_cast<E *>(p.trace_p);
        if (trace)
            trace += (int64_t(head) * p.tokens + at.g) * D + col + quad_column(at);
        const float eps = p.eps;
        const bool clips = p.max_norm > 0, with_losses = losses(),
                   always = rates.learns(false) != 0;
        int of_slot = 0, of_ready = 0;

        // Of the last mini-batch, or one before it.
        const auto step = [&](auto is_last, int batch) {
            constexpr bool is_short = decltype(is_last)::value;
            const int n_tokens = is_short ? short_n : M;
            const typename C::Slot &slot = shared.slot[of_slot];
            const typename C::Ready &ready = shared.ready[of_ready];
            const int odd = batch & 1;
            of_slot = of_slot == C::slots - 1 ? 0 : of_slot + 1;
            of_ready = of_ready == C::ready_slots - 1 ? 0 : of_ready + 1;
            if (p.trace_w && batch % trace_every == 0)
                keep_state(batch / trace_every, w, b, at);

            // Z = K W + b, U = Q W + b: the products of one leave room between them for the
            // other's.
            float z[no][4], u[no][4];
#pragma unroll
            for (int k = 0; k < kt; ++k) {
                FragA<E> x;
                [[maybe_unused]] FragA<E> q;
                load_matrices(x.x, slot.k + tile_at + 16 * k);
                if constexpr (C::output)
                    load_matrices(q.x, slot.q + tile_at + 16 * k);
#pragma unroll
                for (int n = 0; n < no; ++n) {
                    FragB<E> f;
                    b_of_transposed(f, w[n / 2][2 * k], w[n / 2][2 * k + 1], n & 1);
                    if (k == 0)
                        mma_from(z[n], x, f, b[n]);
                    else
                        mma(z[n], x, f);
                    if constexpr (C::output) {
                        if (k == 0)
                            mma_from(u[n], q, f, b[n]);
                        else
                            mma(u[n], q, f);
                    }
                }
            }
            // sums of z^2, g^2 z, g^2 z^2, g goal z; of tokens g and g + 8
            float sums[2][4];
            {
                float s[2][4] = {};
#pragma unroll
                for (int n = 0; n < no; ++n) {
                    const float4 goal4 = ready.goal[no * at.warp + n][at.lane];
                    const float goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float(&to)[4] = s[e >> 1];
                        const float ggz = gg[n][e & 1] * z[n][e];
                        to[0] += z[n][e] * z[n][e];
                        to[1] += ggz;
                        to[2] += ggz * z[n][e];
                        to[3] += goal[e] * z[n][e];
                    }
                }
                RowSums::of_lanes(sums[0], s[0][0], s[1][0], s[0][1], s[1][1], at);
                RowSums::of_lanes(sums[1], s[0][2], s[1][2], s[0][3], s[1][3], at);
            }
            if (writes) {
                float4 *to = put_at + odd * C::chain * 16;
                to[0] = {sums[0][0], sums[0][1], sums[0][2], sums[0][3]};
                to[1] = {sums[1][0], sums[1][1], sums[1][2], sums[1][3]};
            }
            sync();
            {
                const float4 *from = get_at + odd * C::chain * 16;
                if constexpr (C::chain > 2) {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        sums[0][e] = sums[1][e] = 0;
                }
#pragma unroll
                for (int i = 0; i < (C::chain > 2 ? C::chain : 1); ++i)
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const float4 x = from[16 * i + j];
                        sums[j][0] += x.x, sums[j][1] += x.y, sums[j][2] += x.z, sums[j][3] += x.w;
                    }
            }
            FragB<E> keys[kt][2]; // of K^T P
            uint4 factor_a{}, factor_keys{};
            const auto load_keys = [&](int k) {
                load_b_transposed(keys[k], slot.k + 16 * k, L::ld, at.lane);
            };
            const auto load_factors = [&] {
                if (C::output)
                    factor_a = ready.a[at.lane];
                if (with_losses)
                    factor_keys = ready.keys[at.lane];
            };
            if constexpr (!C::many) { // where registers allow
#pragma unroll
                for (int k = 0; k < kt; ++k)
                    load_keys(k);
                load_factors();
            }
            float r[2], mean_u[2], r_mean_uh[2], by[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float goal_sum = 0;
#pragma unroll
                for (int i = 0; i < C::helpers; ++i)
                    goal_sum += ready.goal_sum[at.g + 8 * half][i];
                by[half] = ready.rate[at.g + 8 * half];
                r[half] = quick_inverse_root(sums[0][2 * half] * (1.0f / D) + eps);
                mean_u[half] = (r[half] * sums[0][2 * half + 1] - goal_sum) * (1.0f / D);
                r_mean_uh[half] = (r[half] * r[half]) *
                                  (r[half] * sums[1][2 * half] - sums[1][2 * half + 1]) *
                                  (1.0f / D);
                by[half] *= r[half];
            }
            if (clips) {
                const float factor_of = clip(z, r, mean_u, r_mean_uh, gg, ready, n_tokens, at);
                by[0] *= factor_of;
                by[1] *= factor_of;
            }
            // P = -f c r (g^2 r z - g goal - mean_u - r mean_uh z)
            Turned<no> turned;
            {
                float by_r[2], by_uh[2], by_u[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    by_r[half] = by[half] * r[half];
                    by_uh[half] = by[half] * r_mean_uh[half];
                    by_u[half] = by[half] * mean_u[half];
                }
#pragma unroll
                for (int n = 0; n < no; ++n) {
                    const float4 goal4 = ready.goal[no * at.warp + n][at.lane];
                    const float goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float x[2];
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            x[e] = (by_r[half] * gg[n][e] - by_uh[half]) * z[n][2 * half + e] -
                                   by_u[half] - by[half] * goal[2 * half + e];
                        turned.x[n][half] = pack_bf16(x[0], x[1]);
                    }
                }
            }
            if (trace) {
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int m = 0; m < mo; ++m) {
                        const uint2 x =
                            quad_of(turned.x[2 * m][half], turned.x[2 * m + 1][half], at);
                        if (at.g + 8 * half < n_tokens)
                            *reinterpret_cast<uint2 *>(trace + 8 * half * D + 16 * m) = x;
                    }
                trace += M * D;
            }
#pragma unroll
            for (int n = 0; n < no; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    turned.x[n][half] = turn_matrix(turned.x[n][half]);

            if (C::many)
                load_keys(0);
            // W += K^T P, b += sum P
            float next_b[no][4];
#pragma unroll
            for (int n = 0; n < no; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    next_b[n][e] = b[n][e];
            const bool learns = is_short ? rates.learns(true) != 0 : always;
            if (learns) {
                const FragA<E> ones{{0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u}};
#pragma unroll
                for (int k = 0; k < kt; ++k) {
                    if (C::many && k + 1 < kt)
                        load_keys(k + 1);
#pragma unroll
                    for (int m = 0; m < mo; ++m) {
                        mma(w[m][2 * k], turned.first(m), keys[k][0]);
                        mma(w[m][2 * k + 1], turned.first(m), keys[k][1]);
                    }
                }
#pragma unroll
                for (int n = 0; n < no; ++n)
                    mma(next_b[n], ones, turned.second(n));
            }
            if (C::many)
                load_factors();
            if (C::output) {
                const FragA<E> a{{factor_a.x, factor_a.y, factor_a.z, factor_a.w}};
                float *to = u_at + odd * 16 * C::u_ld;
#pragma unroll
                for (int n = 0; n < no; ++n) {
                    mma(u[n], a, turned.second(n));
                    *reinterpret_cast<float2 *>(to + 8 * n) = {u[n][0], u[n][1]};
                    *reinterpret_cast<float2 *>(to + 8 * C::u_ld + 8 * n) = {u[n][2], u[n][3]};
                }
            }
#pragma unroll
            for (int n = 0; n < no; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    b[n][e] = next_b[n][e];
            if (with_losses) { // the last key under the new state
                const FragA<E> a{{factor_keys.x, factor_keys.y, factor_keys.z, factor_keys.w}};
                const bool upper = n_tokens > 8, mine = at.g == ((n_tokens - 1) & 7);
                float *to = last_at + odd * D;
#pragma unroll
                for (int n = 0; n < no; ++n) {
                    if (learns)
                        mma(z[n], a, turned.second(n));
                    store_if(mine, to + 8 * n, upper ? z[n][2] : z[n][0],
                             upper ? z[n][3] : z[n][1]);
                }
            }
        };
        for (int batch = 0; batch < p.batches - 1; ++batch)
            step(std::false_type(), batch);
        step(std::true_type(), p.batches - 1);
        sync();
        if (p.trace_w)
            keep_state(int(trace_states(p.batches)) - 1, w, b, at);
        if (C::output && p.w_out) {
            each(w, col, at, [&](float &x, int in, int out) {
                p.w_out[(int64_t(head) * D + in) * D + out] = x + shared.mean[in];
            });
            if (at.g == 0)
#pragma unroll
                for (int n = 0; n < no; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        p.b_out[int64_t(head) * D + col + 8 * n + 2 * at.t + e] =
                            b[n][e] + shared.mean[D];
        }
    }

    // Several such warps have a share of the rows each, the first and the last the losses.
    __device__ __forceinline__ void behind(const Place &at, int which, float &before,
                                           float &after) {
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
                                                                           u_at + 4 -
                                                                               C::u_turn(c_0)};
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

    // The initial state without its means over outputs, which stay in shared.mean.
    __device__ __forceinline__ void start_state(float (&w)[mo][2 * kt][4], float (&b)[no][4],
                                                int col, const Place &at) {
        const float *weight = p.w1 + int64_t(head) * D * D, *bias = p.b1 + int64_t(head) * D;
        each(w, col, at, [&](float &x, int in, int out) { x = weight[in * D + out]; });
        float *part = shared.mean + (at.warp + 1) * (D + 8), sum = 0;
#pragma unroll
        for (int n = 0; n < no; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                b[n][e] = b[n][e + 2] = bias[col + 8 * n + 2 * at.t + e];
                sum += b[n][e];
            }
        sum += from_lane_xor(sum, 1);
        sum += from_lane_xor(sum, 2);
        if (at.lane == 0)
            part[D] = sum;
#pragma unroll
        for (int j = 0; j < 2 * kt; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float x = 0;
#pragma unroll
                for (int m = 0; m < mo; ++m)
                    x += w[m][j][e] + w[m][j][e + 2];
                x += from_lane_xor(x, 4);
                x += from_lane_xor(x, 8);
                x += from_lane_xor(x, 16);
                if (at.g == 0)
                    part[8 * j + 2 * at.t + e] = x;
            }
        sync();
        for (int c = 32 * at.warp + at.lane; c <= D; c += 32 * C::chain) {
            float x = 0;
            for (int i = 1; i <= C::chain; ++i)
                x += shared.mean[i * (D + 8) + c];
            shared.mean[c] = x / float(D);
        }
        sync();
        each(w, col, at, [&](float &x, int in, int) { x -= shared.mean[in]; });
#pragma unroll
        for (int n = 0; n < no; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                b[n][e] -= shared.mean[D];
    }

    // visit(element, input, output)
    template <class Visit>
    __device__ __forceinline__ void each(float (&w)[mo][2 * kt][4], int col, const Place &at,
                                         Visit visit) {
#pragma unroll
        for (int m = 0; m < mo; ++m)
#pragma unroll
            for (int j = 0; j < 2 * kt; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    visit(w[m][j][e], 8 * j + 2 * at.t + (e & 1),
                          col + 16 * m + at.g + 8 * (e >> 1));
    }

    // Into the trace, where linear_scan would put it: a warp has 16 outputs there.
    __device__ __forceinline__ void keep_state(int index, const float (&w)[mo][2 * kt][4],
                                               const float (&b)[no][4], const Place &at) {
        float *to = p.trace_w + (int64_t(head) * trace_states(p.batches) + index) * L::state_size;
#pragma unroll
        for (int m = 0; m < mo; ++m) {
            const int thread = (mo * at.warp + m) * 32 + at.lane;
            const auto put = [&](int j, float x, float y, float z, float v) {
                *reinterpret_cast<float4 *>(to + (j * L::threads + thread) * 4) = {x, y, z, v};
            };
#pragma unroll
            for (int j = 0; j < 2 * kt; ++j)
                put(j, w[m][j][0], w[m][j][1], w[m][j][2], w[m][j][3]);
            float of[2]; // b of outputs g and g + 8
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float even = from_lane(b[2 * m + half][0], at.g >> 1),
                            odd = from_lane(b[2 * m + half][1], at.g >> 1);
                of[half] = at.g & 1 ? odd : even;
            }
            put(2 * kt, at.t == 0 ? of[0] : 0.0f, 0.0f, at.t == 0 ? of[1] : 0.0f, 0.0f);
        }
    }

    // What the limit on the norm of G leaves of it.
    __device__ __forceinline__ float clip(const float (&z)[no][4], const float (&r)[2],
                                          const float (&mean_u)[2], const float (&r_mean_uh)[2],
                                          const float (&gg)[no][2], const typename C::Ready &ready,
                                          int n_tokens, const Place &at) {
        float square = 0;
#pragma unroll
        for (int n = 0; n < no; ++n) {
            const float4 goal4 = ready.goal[no * at.warp + n][at.lane];
            const float goal[4] = {goal4.x, goal4.y, goal4.z, goal4.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int half = e >> 1;
                const float x = r[half] * ((r[half] * gg[n][e & 1] - r_mean_uh[half]) * z[n][e] -
                                           goal[e] - mean_u[half]);
                if (at.g + 8 * half < n_tokens)
                    square += x * x;
            }
        }
#pragma unroll
        for (int i = 16; i > 0; i /= 2)
            square += from_lane_xor(square, i);
        if (at.lane == 0)
            shared.block[at.warp] = square;
        sync_warps(2, 32 * C::chain);
        square = 0;
        for (int i = 0; i < C::chain; ++i)
            square += shared.block[i];
        const float length = square * quick_inverse_root(square + 1e-30f);
        return fminf(1.0f, quotient(p.max_norm, length + 1e-6f));
    }

    __device__ __forceinline__ void finish(float before, float after, const Place &at) {
#pragma unroll
        for (int i = 16; i > 0; i /= 2) {
            before += from_lane_xor(before, i);
            after += from_lane_xor(after, i);
        }
        if (at.lane == 0 && at.warp == C::warps - 1)
            shared.block[C::chain] = before;
        if (C::helpers > 1)
            sync();
        if (at.lane == 0 && at.warp == C::chain + C::helpers) {
            p.loss_part[head * 3 + 1] = C::helpers > 1 ? before + shared.block[C::chain] : before;
            p.loss_part[head * 3 + 2] = after;
            finish_loss(p, stream, float(D));
        }
    }

    const LinearParams &p;
    typename C::Shared &shared;
    const Rates<16> rates;
    const int head, stream, width;
    const int64_t offset;
    const int short_n;
};

// initial_error with matrix products: a warp takes the last keys of sixteen mini-batches at a time.
template <class C, class L>
__device__ float lockstep_initial_error(const LinearParams &p, int head) {
    using E = typename L::E;
    constexpr int D = L::D, M = 16, kt = L::kt;
    const Place at;
    E *const w = reinterpret_cast<E *>(kept_shared_memory()); // [D, ld], input by output
    float *const sums = reinterpret_cast<float *>(w + D * L::ld);
    const int s = head / p.heads, h = head % p.heads, width = p.heads * D;
    const float *weight = p.w1 + int64_t(head) * D * D, *bias = p.b1 + int64_t(head) * D;
    for (int i = at.thread; i < D * D / 4; i += C::threads) {
        const float4 x = *reinterpret_cast<const float4 *>(weight + 4 * i);
        uint32_t *to = reinterpret_cast<uint32_t *>(w + 4 * i / D * L::ld + 4 * i % D);
        to[0] = pack_bf16(x.x, x.y);
        to[1] = pack_bf16(x.z, x.w);
    }
    sync_block();
    float error = 0;
    for (int first = 16 * at.warp; first < p.batches; first += 16 * C::warps) {
        int64_t from[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = min((first + at.g + 8 * half + 1) * M, p.tokens) - 1;
            from[half] = (int64_t(s) * p.tokens + token) * width + h * D + 2 * at.t;
        }
        const auto pair = [&](const void *x, int half, int dim) {
            return *reinterpret_cast<const uint32_t *>(static_cast<const E *>(x) + from[half] +
                                                       dim);
        };
        FragA<E> keys[kt]; // which lie as results do, too
        uint32_t v[kt][4];
        float z[2 * kt][4];
#pragma unroll
        for (int k = 0; k < kt; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                keys[k].x[i] = pair(p.k, i & 1, 16 * k + 8 * (i >> 1));
                v[k][i] = pair(p.v, i & 1, 16 * k + 8 * (i >> 1));
            }
#pragma unroll
        for (int n = 0; n < 2 * kt; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z[n][e] = bias[8 * n + 2 * at.t + (e & 1)];
#pragma unroll
        for (int k = 0; k < kt; ++k)
#pragma unroll
            for (int n = 0; n < kt; ++n) {
                FragB<E> b[2];
                load_b_transposed(b, w + 16 * k * L::ld + 16 * n, L::ld, at.lane);
                mma(z[2 * n], keys[k], b[0]);
                mma(z[2 * n + 1], keys[k], b[1]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float mean = 0, square = 0;
#pragma unroll
            for (int n = 0; n < 2 * kt; ++n)
                mean += z[n][2 * half] + z[n][2 * half + 1];
            mean += from_lane_xor(mean, 1);
            mean += from_lane_xor(mean, 2);
            mean *= 1.0f / D;
#pragma unroll
            for (int n = 0; n < 2 * kt; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    z[n][2 * half + e] -= mean;
                    square += z[n][2 * half + e] * z[n][2 * half + e];
                }
            square += from_lane_xor(square, 1);
            square += from_lane_xor(square, 2);
            const float r = quick_inverse_root(square * (1.0f / D) + p.eps);
            if (first + at.g + 8 * half < p.batches)
#pragma unroll
                for (int n = 0; n < 2 * kt; ++n) {
                    const float2 vv = floats(Pair<E>{v[n / 2][half + 2 * (n & 1)]}),
                                 kk = floats(Pair<E>{keys[n / 2].x[half + 2 * (n & 1)]});
                    const int dim = h * D + 8 * n + 2 * at.t;
                    const float x = p.g[dim] * z[n][2 * half] * r + p.b[dim] - (vv.x - kk.x),
                                y = p.g[dim + 1] * z[n][2 * half + 1] * r + p.b[dim + 1] -
                                    (vv.y - kk.y);
                    error += x * x + y * y;
                }
        }
    }
    return block_sum<C::warps>(error, sums, at);
}

template <class L, int chain, int helpers, bool output>
__global__ void __launch_bounds__(Lockstep<L, chain, helpers, output>::threads,
                                  Lockstep<L, chain, helpers, output>::resident)
    linear_lockstep(const __grid_constant__ LinearParams p) {
    using C = Lockstep<L, chain, helpers, output>;
    const int scans = p.streams * p.heads;
    if (output && int(blockIdx.x) >= scans) {
        const Place at;
        const int head = int(blockIdx.x) - scans;
        const float error = lockstep_initial_error<C, L>(p, head);
        if (at.thread == 0) {
            p.loss_part[head * 3] = error;
            finish_loss(p, head / p.heads, float(L::D));
        }
        return;
    }
    LockstepScan<C, L>(p).run();
}

} // namespace ponder::cuda
