// What the scan of TTT-MLP and its reverse share. Rates, P and A are as in ttt_linear.cuh, for both
// layers: P2 = -f c G2, P1 = (P2 W2^T) gelu'(Z1).
//
// The trace holds P1 and P2 of every token and the state before every trace_every-th mini-batch and
// after the last. P1 lies as warps of 16 hidden units have it in results of products: 16 tokens by
// 16 units, eight elements a lane.
#pragma once

#include "ttt_linear_host.hpp"

namespace ponder::cuda {

constexpr int mlp_batch = 16, mlp_wide_batch = 64;
__host__ __device__ constexpr int64_t mlp_state(int64_t d) { return 8 * d * d + 5 * d; }

struct MlpParams : LinearParams {
    const float *w2, *b2;
    float *w2_out, *b2_out;
    void *trace_p1; // trace_p: P2 [S,H,T,D]; trace_w: [S,H,n,mlp_state(D)]
    // reverse
    const float *dw2_next, *db2_next;
    float *dw2, *db2;
};

// Where a state of the trace has its parts.
template <int D> struct MlpState {
    float *w1, *b1, *w2, *b2;
    __device__ explicit MlpState(float *at)
        : w1(at), b1(w1 + 4 * D * D), w2(b1 + 4 * D), b2(w2 + 4 * D * D) {}
    __device__ MlpState(float *trace, int head, int batches, int64_t i)
        : MlpState(trace + (head * trace_states(batches) + i) * mlp_state(D)) {}
};

// A result of 16 tokens by 16 units, for and from the trace.
__device__ __forceinline__ void store_rows(Bf16 *to, const float (&c0)[4], const float (&c1)[4]) {
    FragA<Bf16> a;
    a_of(a, c0, c1);
    *reinterpret_cast<uint4 *>(to) = {a.x[0], a.x[1], a.x[2], a.x[3]};
}
__device__ __forceinline__ void store_rows(float *to, const float (&c0)[4], const float (&c1)[4]) {
    *reinterpret_cast<float4 *>(to) = {c0[0], c0[1], c0[2], c0[3]};
    *reinterpret_cast<float4 *>(to + 4) = {c1[0], c1[1], c1[2], c1[3]};
}
__device__ __forceinline__ void load_rows(FragA<Bf16> &a, const Bf16 *from) {
    const uint4 x = *reinterpret_cast<const uint4 *>(from);
    a.x[0] = x.x, a.x[1] = x.y, a.x[2] = x.z, a.x[3] = x.w;
}
__device__ __forceinline__ void load_rows(FragA<float> &a, const float *from) {
    const float4 x = *reinterpret_cast<const float4 *>(from),
                 y = *reinterpret_cast<const float4 *>(from + 4);
    const float c0[4] = {x.x, x.y, x.z, x.w}, c1[4] = {y.x, y.y, y.z, y.w};
    a_of(a, c0, c1);
}

// gelu(x) = x (1 + t) / 2 with t = tanh(u), u = sqrt(2 / pi) (x + 0.044715 x^3), its slope, and
// where wanted its curve, the second derivative: t' = (1 - t^2) u', gelu'' = t' + x t'' / 2.
struct Gelu {
    float value, slope, curve;
    __device__ __forceinline__ explicit Gelu(float x) {
        constexpr float scale = 0.79788456080286536f, cube = 0.044715f;
        const float u = scale * (x + cube * x * x * x);
        const float t = 1 - quotient(2, 1 + exponential(2 * u)), p = 1 - t * t;
        const float u1 = scale * (1 + 3 * cube * x * x), u2 = 6 * scale * cube * x;
        value = 0.5f * x * (1 + t);
        slope = 0.5f * (1 + t) + 0.5f * x * p * u1;
        curve = p * (u1 + 0.5f * x * (u2 - 2 * t * u1 * u1));
    }
};

__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2)
        x += from_lane_xor(x, i);
    return x;
}

// c += a b; in f32 rounded, see add_outer
template <class E>
__device__ __forceinline__ void add_step(float (&c)[4], const FragA<E> &a, const FragB<E> &b) {
    if constexpr (sizeof(E) == 4) {
        float x[4] = {};
        mma(x, a, b);
#pragma unroll
        for (int e = 0; e < 4; ++e)
            c[e] += x[e];
    } else
        mma(c, a, b);
}

// Host side.
struct MlpTrace {
    size_t p1, states, total; // bytes: where they begin, of all
    explicit MlpTrace(const TttMlpShape &s) {
        const size_t heads = size_t(s.streams * s.heads), size = s.type == TttType::bf16 ? 2 : 4;
        const int64_t batches = (s.tokens + s.mini_batch - 1) / s.mini_batch;
        const auto aligned = [](size_t n) { return (n + 255) / 256 * 256; };
        p1 = aligned(heads * size_t(s.tokens * s.head_dim) * size);
        states = p1 + aligned(heads * size_t(batches * s.mini_batch * 4 * s.head_dim) * size);
        total =
            states + heads * size_t(trace_states(batches) * mlp_state(s.head_dim)) * sizeof(float);
    }
    void set(MlpParams &p, void *trace) const {
        auto *const at = static_cast<unsigned char *>(trace);
        p.trace_p = at;
        p.trace_p1 = at + p1;
        p.trace_w = reinterpret_cast<float *>(at + states);
    }
};

inline MlpParams mlp_params(const TttMlpShape &s) {
    MlpParams p{};
    p.tokens = int(s.tokens), p.heads = int(s.heads), p.streams = int(s.streams);
    p.batches = int((s.tokens + s.mini_batch - 1) / s.mini_batch);
    p.rate_bf16 = s.rate_type == TttType::bf16;
    p.scale = float(s.scale), p.eps = float(s.eps);
    return p;
}

// Blocks of a head where it is on a cluster
__host__ __device__ constexpr int mlp_most_split(int64_t d) { return int(d / 16); }
// Blocks of a head in the reverse scan: clusters are sm_90's.
inline int mlp_split(const TttMlpShape &s) {
    return s.split ? s.split : DeviceLimits().major >= 9 ? mlp_most_split(s.head_dim) : 1;
}
// The reverse scan of one type and head dim.
template <class E, int D> struct MlpReverseOf {
    static cudaError_t run(const TttMlpShape &, const MlpParams &, cudaStream_t);
    static const char *misses(const TttMlpShape &);
};

// The scan on clusters, of one head dim.
template <int D> struct MlpSplitOf {
    static cudaError_t run(const TttMlpShape &, const MlpParams &, cudaStream_t);
    static const char *misses(const TttMlpShape &);
};

// The scan for its trace: without queries and losses.
cudaError_t ttt_mlp_states(const TttMlpShape &, const MlpParams &, cudaStream_t);

} // namespace ponder::cuda
