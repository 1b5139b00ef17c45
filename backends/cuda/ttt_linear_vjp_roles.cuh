// The reverse of TTT-Linear for mini-batches of 16, its warps in roles as in ttt_linear_roles.cuh
// and with the equations of ttt_linear_vjp.cu. Each of the last three has D / 16 warps:
//
//   ahead:  four warps: fetch k, v, q, dy, P; what depends on no state
//   states: W backwards, Z, U and their norms, du: depends on the trace alone, so it runs ahead
//   chain:  dP, dG, dz, dW: what one mini-batch has to wait for the other with, and nothing else
//   inputs: dq, dk, dv, dlr and the norm's gradients, from copies of W and dW; follows
//
// Order: whoever waits does so with all lanes. Chain and inputs wait for the states only, which
// have waited for the warps ahead.
#pragma once

#include "ttt_linear_roles.cuh"
#include "ttt_linear_vjp.cuh"

#include <type_traits>

namespace ponder::cuda {

constexpr int reverse_slots = 8, reverse_state_slots = 3, reverse_chain_slots = 2;

// Of one mini-batch: from the warps ahead,
template <class L> struct ReverseSlot {
    typename L::E k[L::tile], q[L::tile], dy[L::tile], p[L::tile];
    union {
        float4 goal[L::warps][2][32]; // target - b, as results lie
        typename L::E v[L::tile];     // what it is made of
    };
    uint4 a[sizeof(typename L::E) / 2][2][32];            // (q_i k_j + 1), queries by keys
    uint4 a_transposed[sizeof(typename L::E) / 2][2][32]; // times a_i / f, keys by queries
    float goal_sum[16], c[16], lr[16];                    // sum of g goal; -f c_j
    float last_goal[L::D];
};
// from the states,
template <class L> struct ReverseState {
    typename L::E du[L::tile], w[L::D * L::ld];
    float4 h[L::warps][2][32];
    float r[16], mean_u[16], mean_uh[16], ggh[16], gghh[16];
    float probe[4 * L::D + 4]; // of the loss after the step
};
// from the chain.
template <class L> struct ReverseChain {
    typename L::E dz[L::tile], dw[L::D * L::ld];
    float4 dx[L::warps][2][32]; // of the gradient at u = g (g h - goal)
    float dc[16];               // of c_j, without the factor -f
};

template <class L> struct ReverseRolesShared {
    using E = typename L::E;
    ReverseSlot<L> *slots;
    ReverseState<L> *states;
    ReverseChain<L> *chains;
    float *state_parts, *chain_parts, *state_sums, *chain_sums, *norms, *rates_parts, *norm_sums;
    float *norms_of_inputs, *token_sums;
    Arrivals *full, *empty, *state_full, *state_empty, *chain_full, *chain_empty;
    Rates<16> rates;
    int size;
    __host__ __device__ constexpr explicit ReverseRolesShared(unsigned char *base) {
        SharedLayout s(base);
        slots = s.take<ReverseSlot<L>>(reverse_slots);
        states = s.take<ReverseState<L>>(reverse_state_slots);
        chains = s.take<ReverseChain<L>>(reverse_chain_slots);
        state_parts = s.take<float>(2 * L::warps * 128);
        chain_parts = s.take<float>(2 * L::warps * 128);
        state_sums = s.take<float>(8 * L::warps);
        chain_sums = s.take<float>(8 * L::warps);
        norms = s.take<float>(2 * L::D);
        rates_parts = s.take<float>(L::warps * 16);
        norm_sums = s.take<float>(2 * L::D);
        norms_of_inputs = s.take<float>(2 * L::D);
        token_sums = s.take<float>(16);
        full = s.take<Arrivals>(reverse_slots);
        empty = s.take<Arrivals>(reverse_slots);
        state_full = s.take<Arrivals>(reverse_state_slots);
        state_empty = s.take<Arrivals>(reverse_state_slots);
        chain_full = s.take<Arrivals>(reverse_chain_slots);
        chain_empty = s.take<Arrivals>(reverse_chain_slots);
        rates = {s.take<float>(3 * 16 + 4)};
        size = s.size();
    }
};

template <class L> __host__ __device__ constexpr int reverse_roles_threads() {
    return 32 * (3 * L::warps + roles_ahead);
}

template <class L> class ReverseRoles {
    using E = typename L::E;
    static constexpr int D = L::D, M = 16;
    static_assert(L::M == 16);

public:
    __device__ ReverseRoles(const LinearParams &p)
        : p(p), shared(kept_shared_memory()), head(int(blockIdx.x)), stream(head / p.heads),
          h(head % p.heads), width(p.heads * D), offset(int64_t(stream) * p.tokens * width + h * D),
          rate_offset(int64_t(stream) * p.tokens * p.heads + h),
          short_n(p.tokens - (p.batches - 1) * M) {}

    __device__ void run() {
        Place at;
        at.warp = uniform(at.warp);
        if (at.thread == 0) {
            for (int i = 0; i < reverse_slots; ++i) {
                expect_warps(shared.full + i, 1);
                expect_warps(shared.empty + i, 3 * L::warps);
            }
            for (int i = 0; i < reverse_state_slots; ++i) {
                expect_warps(shared.state_full + i, L::warps);
                expect_warps(shared.state_empty + i, 2 * L::warps);
            }
            for (int i = 0; i < reverse_chain_slots; ++i) {
                expect_warps(shared.chain_full + i, L::warps);
                expect_warps(shared.chain_empty + i, L::warps);
            }
        }
        shared.rates.fill(p, at.thread, short_n);
        if (at.thread < 2 * D)
            shared.norms[at.thread] = 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const float x = p.dloss ? p.dloss[stream * 3 + i] * 2 /
                                          (float(D) * float(p.heads) * float(p.batches))
                                    : 0.0f;
            weight[i] = from_lane(x, 0); // so that all lanes are known to agree
        }

        const int role = at.warp / L::warps; // chain, states, inputs, ahead
        if (role < 3) {
            at.warp -= role * L::warps;
            at.thread -= role * L::threads;
        } else
            at.warp -= 3 * L::warps;
        at.col = 16 * at.warp;
        sync_block();
        if (role == 0)
            chain(at);
        else if (role == 1)
            states(at);
        else if (role == 2)
            inputs(at);
        else
            ahead(at);
    }

private:
    __device__ __forceinline__ int batch_of(int step) const { return p.batches - 1 - step; }
    __device__ __forceinline__ float *last_rows_at(int batch) const {
        return p.last_rows + (int64_t(head) * p.batches + batch) * 2 * D;
    }
    __device__ __forceinline__ int tokens_of(int step) const { return step == 0 ? short_n : M; }
    __device__ __forceinline__ void leave(Arrivals *a, const Place &at) const {
        sync_warp();
        arrive_warp(a, at.lane);
    }

    // The roles, a file each.
    __device__ void ahead(const Place &) const;
    __device__ void states(const Place &) const;
    __device__ void chain(const Place &) const;
    __device__ void inputs(const Place &) const;
    // n rows of a warp's dims
    __device__ void put_rows(E *to, const float (&x)[2][4], int n, const Place &at) const;

    // A warp's sums over tokens, its dims, and what is there besides.
    __device__ __forceinline__ void put_norms(float *to, const float (&dg)[2][2],
                                              const float (&db)[2][2], const float *besides,
                                              const Place &at) const {
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
                    to[dim] = x + (besides ? besides[dim] : 0.0f);
                    to[D + dim] = y + (besides ? besides[D + dim] : 0.0f);
                }
            }
    }

    const LinearParams &p;
    const ReverseRolesShared<L> shared;
    const int head, stream, h, width;
    const int64_t offset, rate_offset;
    const int short_n;
    float weight[3]; // of the losses, as factors of |LN(z) - target|^2 / 2
};

template <class L>
__global__ void __launch_bounds__(reverse_roles_threads<L>(), 1)
    linear_reverse_roles(const __grid_constant__ LinearParams p) {
    if constexpr (ReverseRolesShared<L>(nullptr).size <= most_shared_memory)
        ReverseRoles<L>(p).run();
}

} // namespace ponder::cuda
