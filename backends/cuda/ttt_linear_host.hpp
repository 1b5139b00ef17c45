// Host side of the scans of TTT-Linear: which kernel takes a shape, and where the trace lies.
#pragma once

#include "ttt_linear.cuh"

namespace ponder::cuda {

inline LinearParams linear_params(const TttLinearShape &shape) {
    LinearParams p{};
    p.tokens = int(shape.tokens);
    p.heads = int(shape.heads);
    p.streams = int(shape.streams);
    p.batches = int((shape.tokens + shape.mini_batch - 1) / shape.mini_batch);
    p.by_key = shape.ponder;
    p.rate_bf16 = shape.rate_type == TttType::bf16;
    p.scale = float(shape.scale);
    p.decay = float(shape.decay);
    p.eps = float(shape.eps);
    p.max_norm = float(shape.max_grad_norm);
    p.causal_k = int(shape.causal_k);
    return p;
}

struct TraceSize {
    size_t states, total; // bytes: where the states begin, of all
};
inline TraceSize trace_size(const TttLinearShape &s, int64_t batches) {
    const size_t heads = size_t(s.streams * s.heads), d = size_t(s.head_dim);
    const size_t rows = heads * size_t(s.tokens) * d * (s.type == TttType::bf16 ? 2 : 4);
    const size_t at = (rows + 255) / 256 * 256;
    // of a state, see state_size: [D + 8, D]
    return {at, at + heads * size_t(trace_states(batches)) * (d + 8) * d * sizeof(float)};
}
inline void set_trace(LinearParams &p, const TttLinearShape &shape, void *trace) {
    if (!trace)
        return;
    p.trace_p = trace;
    p.trace_w = reinterpret_cast<float *>(static_cast<unsigned char *>(trace) +
                                          trace_size(shape, p.batches).states);
}

// Heads that are split over a cluster of blocks (ttt_linear_wide.cuh).
inline bool is_wide(const TttLinearShape &s) { return s.head_dim == 256; }

inline const char *linear_misses(const TttLinearShape &s) {
    if (s.head_dim != 32 && s.head_dim != 64 && s.head_dim != 128 && !is_wide(s))
        return "the fused scan has head dims 32, 64, 128 and 256";
    if (s.mini_batch != 16 && s.mini_batch != 64)
        return "the fused scan has mini-batches of 16 and 64";
    // The compiler takes five minutes for these kernels, and nobody is known to want them.
    if (s.mini_batch == 64 && s.type != TttType::bf16)
        return "in f32 the fused scan has mini-batches of 16 only";
    if (s.tokens < 1 || s.streams < 1 || s.tokens > (1 << 24) || s.streams * s.heads > (1 << 24))
        return "too few or too many tokens, streams or heads for the fused scan";
    return nullptr;
}

struct DeviceLimits {
    int shared = 0, processors = 0, major = 0; // bytes a block may have; 0 without a device
    DeviceLimits() {
        int device = 0;
        if (cudaGetDevice(&device) != cudaSuccess ||
            cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
                cudaSuccess ||
            cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) !=
                cudaSuccess ||
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) !=
                cudaSuccess)
            shared = processors = major = 0;
    }
};
inline const char *shared_misses(size_t bytes) {
    const DeviceLimits device;
    if (device.shared == 0)
        return "no device";
    return bytes <= size_t(device.shared) ? nullptr
                                          : "a block's shared memory is too small for this shape";
}
inline const char *cluster_misses(size_t bytes) {
    const char *what = shared_misses(bytes);
    return what ? what
           : DeviceLimits().major >= 9
               ? nullptr
               : "the fused scan needs clusters of blocks for this head dim";
}

// The kernels of one type and mini-batch: a file each, which the compiler takes long for.
template <class E, int M> struct LinearScan {
    static cudaError_t run(const TttLinearShape &, const LinearParams &, cudaStream_t);
    // without queries, for the trace
    static cudaError_t states(const TttLinearShape &, const LinearParams &, cudaStream_t);
    static const char *misses(const TttLinearShape &);
};
template <class E, int M> struct LinearReverse {
    static cudaError_t run(const TttLinearShape &, const LinearParams &, cudaStream_t);
    static const char *misses(const TttLinearShape &);
};

// Those with a head on a cluster.
template <class E, int M> struct LinearWideScan {
    static cudaError_t run(const LinearParams &, cudaStream_t); // for the trace alone: no y
    static const char *misses();
};
template <class E, int M> struct LinearWideReverse {
    static cudaError_t run(const LinearParams &, cudaStream_t);
    static const char *misses();
};

// visit(Linear<E, D, M>) for the shape's head dim
template <class E, int M, class Visit> auto visit_dim(const TttLinearShape &s, Visit visit) {
    return s.head_dim == 32   ? visit(Linear<E, 32, M>())
           : s.head_dim == 64 ? visit(Linear<E, 64, M>())
                              : visit(Linear<E, 128, M>());
}
// visit(Kernels<E, M>) for its type and mini-batch
template <template <class, int> class Kernels, class Visit>
auto visit_linear(const TttLinearShape &s, Visit visit) {
    if (s.type == TttType::bf16)
        return s.mini_batch == 16 ? visit(Kernels<Bf16, 16>()) : visit(Kernels<Bf16, 64>());
    return visit(Kernels<float, 16>());
}

// Sums of LinearParams' part: of dg and db over streams, of dindex over streams and heads.
struct SumParams {
    const float *part, *index;
    float *dg, *db, *dindex;
    int streams, heads, d, m;
    float decay;
};
cudaError_t linear_sum_parts(const SumParams &, cudaStream_t);

// The scan without queries, for its trace.
cudaError_t ttt_linear_states(const TttLinearShape &shape, const LinearParams &p,
                              cudaStream_t stream);

} // namespace ponder::cuda
