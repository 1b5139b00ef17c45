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
        uint4 a[32], sums[32];                 // A, and what b and the last key sum P with
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

    // The roles, a file each; which: of several such warps
    __device__ void ahead(const Place &, int which);
    __device__ void chain(const Place &);
    __device__ void behind(const Place &, int which, float &before, float &after);

    // A chain warp's part of the state, which begins at output `col`
    using W = float[mo][2 * kt][4];
    using B = float[no][4];
    __device__ void start_state(W &, B &, int col, const Place &);
    __device__ void keep_state(int index, const W &, const B &, const Place &);
    template <class Visit> __device__ void each(W &, int col, const Place &, Visit);

    __device__ static void mma_from(float (&c)[4], const FragA<E> &, const FragB<E> &,
                                    const float (&start)[4]);
    __device__ float clip(const float (&z)[no][4], const float (&r)[2], const float (&mean_u)[2],
                          const float (&r_mean_uh)[2], const float (&gg)[no][2],
                          const typename C::Ready &, int n_tokens, const Place &);

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

template <class L, int chain, int helpers, bool output>
__global__ void __launch_bounds__(Lockstep<L, chain, helpers, output>::threads,
                                  Lockstep<L, chain, helpers, output>::resident)
    linear_lockstep(const __grid_constant__ LinearParams p) {
    using C = Lockstep<L, chain, helpers, output>;
    const int scans = p.streams * p.heads;
    if (output && int(blockIdx.x) >= scans) {
        const Place at;
        const int head = int(blockIdx.x) - scans;
        const float error = tiled_initial_error<L, C::warps>(p, head);
        if (at.thread == 0) {
            p.loss_part[head * 3] = error;
            finish_loss(p, head / p.heads, float(L::D));
        }
        return;
    }
    LockstepScan<C, L>(p).run();
}

} // namespace ponder::cuda
