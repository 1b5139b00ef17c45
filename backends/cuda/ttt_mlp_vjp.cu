// ttt_mlp_vjp as the module calls it. The reverse scan is in ttt_mlp_reverse.cuh.
#include "ttt_mlp.cuh"

namespace ponder::cuda {
namespace {

size_t aligned(int64_t floats) { return (size_t(floats) * sizeof(float) + 255) / 256 * 256; }

size_t last_rows_size(const TttMlpShape &s) {
    const int64_t batches = (s.tokens + s.mini_batch - 1) / s.mini_batch;
    return aligned(s.streams * s.heads * batches * 2 * s.head_dim);
}
size_t part_size(const TttMlpShape &s) {
    return aligned(s.streams * mlp_most_split(s.head_dim) * s.heads *
                   (2 * s.head_dim + s.mini_batch));
}

template <class Visit> auto visit_kernels(const TttMlpShape &s, Visit visit) {
    if (s.type == TttType::bf16)
        return s.head_dim == 64 ? visit(MlpReverseOf<Bf16, 64>())
                                : visit(MlpReverseOf<Bf16, 128>());
    return s.head_dim == 64 ? visit(MlpReverseOf<float, 64>()) : visit(MlpReverseOf<float, 128>());
}

} // namespace

size_t ttt_mlp_vjp_workspace(const TttMlpShape &shape, bool has_trace) {
    return part_size(shape) + last_rows_size(shape) + (has_trace ? 0 : ttt_mlp_trace(shape));
}

const char *ttt_mlp_vjp_misses(const TttMlpShape &shape) {
    if (const char *what = ttt_mlp_misses(shape))
        return what;
    return visit_kernels(shape, [&](auto kernels) { return kernels.misses(shape); });
}

cudaError_t ttt_mlp_vjp(const TttMlpShape &shape, const TttMlpBackward &t, void *workspace,
                        cudaStream_t stream) {
    MlpParams p = mlp_params(shape);
    p.q = t.q, p.k = t.k, p.v = t.v, p.lr = t.lr;
    p.index = t.index, p.g = t.g, p.b = t.b;
    p.w1 = t.w1, p.b1 = t.b1, p.w2 = t.w2, p.b2 = t.b2;
    p.dy = t.dy, p.dloss = t.dloss;
    p.dw_next = t.dw1_out, p.db_next = t.db1_out;
    p.dw2_next = t.dw2_out, p.db2_next = t.db2_out;
    p.dq = t.dq, p.dk = t.dk, p.dv = t.dv, p.dlr = t.dlr;
    p.dw = t.dw1, p.db1 = t.db1, p.dw2 = t.dw2, p.db2 = t.db2;
    const int split = mlp_split(shape);
    auto *rest = static_cast<unsigned char *>(workspace);
    p.part = reinterpret_cast<float *>(rest);
    rest += part_size(shape);
    p.last_rows = reinterpret_cast<float *>(rest);
    rest += last_rows_size(shape);
    MlpTrace(shape).set(p, t.trace ? const_cast<void *>(t.trace) : rest);
    if (!t.trace)
        if (const cudaError_t e = ttt_mlp_states(shape, p, stream); e != cudaSuccess)
            return e;
    const cudaError_t e =
        visit_kernels(shape, [&](auto kernels) { return kernels.run(shape, p, stream); });
    if (e != cudaSuccess)
        return e;
    return linear_sum_parts({p.part, t.index, t.dg, t.db, t.dindex, p.streams * split, p.heads,
                             int(shape.head_dim), int(shape.mini_batch), 0},
                            stream);
}

} // namespace ponder::cuda
