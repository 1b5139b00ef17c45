// ttt_linear as the module calls it. The scan is in ttt_linear_scan.cuh, that on clusters in
// ttt_linear_wide_scan.cuh.
#include "ttt_linear_host.hpp"

namespace ponder::cuda {

size_t ttt_linear_trace(const TttLinearShape &shape) {
    const LinearParams p = linear_params(shape);
    return trace_size(shape, p.batches).total;
}

size_t ttt_linear_workspace(const TttLinearShape &shape) {
    return size_t(shape.streams * shape.heads * 3) * sizeof(float);
}

const char *ttt_linear_misses(const TttLinearShape &shape) {
    if (const char *what = linear_misses(shape))
        return what;
    if (is_wide(shape))
        return visit_linear<LinearWideScan>(shape, [](auto kernels) { return kernels.misses(); });
    return visit_linear<LinearScan>(shape, [&](auto kernels) { return kernels.misses(shape); });
}

cudaError_t ttt_linear(const TttLinearShape &shape, const TttLinearForward &t, void *workspace,
                       unsigned *tickets, cudaStream_t stream) {
    LinearParams p = linear_params(shape);
    p.q = t.q, p.k = t.k, p.v = t.v, p.lr = t.lr;
    p.index = t.index, p.g = t.g, p.b = t.b, p.w1 = t.w1, p.b1 = t.b1;
    p.y = t.y, p.w_out = t.w1_out, p.b_out = t.b1_out, p.loss = t.loss;
    p.loss_part = static_cast<float *>(workspace);
    p.tickets = tickets;
    set_trace(p, shape, t.trace);
    if (is_wide(shape))
        return visit_linear<LinearWideScan>(shape,
                                            [&](auto kernels) { return kernels.run(p, stream); });
    return visit_linear<LinearScan>(shape,
                                    [&](auto kernels) { return kernels.run(shape, p, stream); });
}

cudaError_t ttt_linear_states(const TttLinearShape &shape, const LinearParams &p,
                              cudaStream_t stream) {
    if (is_wide(shape))
        return visit_linear<LinearWideScan>(shape,
                                            [&](auto kernels) { return kernels.run(p, stream); });
    return visit_linear<LinearScan>(shape,
                                    [&](auto kernels) { return kernels.states(shape, p, stream); });
}

} // namespace ponder::cuda
