// The fused TTT scans, as the module's ops call them: plain C++, no types of the module.
//
// They compute ops ttt_linear, ttt_mlp and their vjp of src/tensor/ops.hpp; names and shapes are
// those of the list. S streams, T tokens, C = H D width, H heads, M mini-batch. Rows are dense.
// `type` is that of q, k, v, y and their gradients, `rate_type` that of lr and dlr; everything else
// is f32. Pointers are the device's and 16-byte aligned, but for dindex, dg and db, which may lie at
// any number; outputs must not overlap inputs.
//
// `workspace` has at least ..._workspace bytes, 256-byte aligned, with any content. `tickets` is
// S zeros, one array for calls that never overlap in time; each call leaves zeros behind.
// Nothing is allocated and nothing waits, so that a call can be captured in a graph. Results do
// not depend on the order in which blocks run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace ponder::cuda {

enum class TttType : int32_t { f32, bf16 };

// Shapes and attributes of a scan of TTT-Linear.
struct TttLinearShape {
    int64_t streams, tokens, heads, head_dim, mini_batch;
    TttType type, rate_type;
    bool ponder; // form 1: the rate follows the key
    double scale, decay, eps, max_grad_norm;
    int64_t causal_k;
    // 0: the kernels are chosen by the shape. For tests, 1: all warps alike; 2: warps with roles,
    // where there are such; 3: roles in the backward pass only. Roles are in lockstep in the
    // forward pass in bf16 with head dim 64 and mini-batches of 16, with so many warps for the
    // state + ahead: 4: 2 + 1, 5: 4 + 4.
    int32_t kernel = 0;
};

// What a scan keeps for its backward pass, where asked: the scaled gradient of each token and the
// state before every few mini-batches.
struct TttLinearForward {
    const void *q, *k, *v, *lr; // [S,T,C] x 3, [S,T,H]
    const float *index, *g, *b; // [M], [H,D] x 2
    const float *w1, *b1;       // [S,H,D,D], [S,H,D]
    void *y;                    // [S,T,C]
    float *w1_out, *b1_out;     // as w1, b1; both may be null
    float *loss;                // [S,3]; may be null
    void *trace;                // may be null; ttt_linear_trace bytes, 256-byte aligned
};

struct TttLinearBackward {
    const void *q, *k, *v, *lr;
    const float *index, *g, *b, *w1, *b1;
    const void *dy; // [S,T,C]; may be null, as the next three: zero
    const float *dw1_out, *db1_out;
    const float *dloss;       // [S,3]
    const void *trace;        // of the forward scan; null: it is computed again
    void *dq, *dk, *dv, *dlr; // as q, k, v, lr
    float *dindex, *dg, *db, *dw1, *db1;
};

// Nullptr where the kernels take this shape on this device's compute capability (80, 90, ...) and
// shared memory per block, else what they miss.
const char *ttt_linear_misses(const TttLinearShape &);
const char *ttt_linear_vjp_misses(const TttLinearShape &);

size_t ttt_linear_trace(const TttLinearShape &);
size_t ttt_linear_workspace(const TttLinearShape &);
size_t ttt_linear_vjp_workspace(const TttLinearShape &, bool has_trace);

// One launch. tickets: [S].
cudaError_t ttt_linear(const TttLinearShape &, const TttLinearForward &, void *workspace,
                       unsigned *tickets, cudaStream_t);
// Two launches: the scan in reverse and the sums over streams; a third before them without a trace.
cudaError_t ttt_linear_vjp(const TttLinearShape &, const TttLinearBackward &, void *workspace,
                           cudaStream_t);

struct TttMlpShape {
    int64_t streams, tokens, heads, head_dim, mini_batch;
    TttType type, rate_type;
    double scale, eps;
    // Blocks that share a head; 0: chosen by the device, the head dim and the number of heads. For
    // tests 1, and 4 or 8 with head dim 64 or 128.
    int32_t split = 0;
};

struct TttMlpForward {
    const void *q, *k, *v, *lr;
    const float *index, *g, *b;
    const float *w1, *b1, *w2, *b2; // [S,H,D,4D], [S,H,4D], [S,H,4D,D], [S,H,D]
    void *y;
    float *w1_out, *b1_out, *w2_out, *b2_out;
    float *loss; // [S,3]; may be null
    void *trace; // as in TttLinearForward
};

struct TttMlpBackward {
    const void *q, *k, *v, *lr;
    const float *index, *g, *b, *w1, *b1, *w2, *b2;
    const void *dy; // may be null, as the next five: zero
    const float *dw1_out, *db1_out, *dw2_out, *db2_out;
    const float *dloss;
    const void *trace;        // of the forward scan; null: it is computed again
    void *dq, *dk, *dv, *dlr; // as q, k, v, lr
    float *dindex, *dg, *db, *dw1, *db1, *dw2, *db2;
};

const char *ttt_mlp_misses(const TttMlpShape &);
const char *ttt_mlp_vjp_misses(const TttMlpShape &);

size_t ttt_mlp_trace(const TttMlpShape &);
size_t ttt_mlp_workspace(const TttMlpShape &);
size_t ttt_mlp_vjp_workspace(const TttMlpShape &, bool has_trace);

cudaError_t ttt_mlp(const TttMlpShape &, const TttMlpForward &, void *workspace, unsigned *tickets,
                    cudaStream_t);
// As ttt_linear_vjp.
cudaError_t ttt_mlp_vjp(const TttMlpShape &, const TttMlpBackward &, void *workspace, cudaStream_t);

} // namespace ponder::cuda
