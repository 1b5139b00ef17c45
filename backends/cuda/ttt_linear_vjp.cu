// ttt_linear_vjp as the module calls it, and the sums over streams at its end. The reverse scan is
// in ttt_linear_reverse.cuh, that on clusters in ttt_linear_wide_reverse.cuh.
#include "ttt_linear_host.hpp"

namespace ponder::cuda {
namespace {

// A warp for each sum.
__global__ void __launch_bounds__(256) linear_sums(SumParams p) {
    const Place at;
    const int size = 2 * p.d + p.m, of_norm = p.heads * p.d;
    const int i = int(blockIdx.x) * 8 + at.warp;
    if (i >= 2 * of_norm + p.m)
        return;
    const bool is_rate = i >= 2 * of_norm;
    const int h = i % of_norm / p.d;
    const int column = is_rate ? 2 * p.d + i - 2 * of_norm : i / of_norm * p.d + i % p.d;
    const int count = is_rate ? p.streams * p.heads : p.streams;
    double sum = 0;
    for (int j = at.lane; j < count; j += 32)
        sum += p.part[int64_t(is_rate ? j : j * p.heads + h) * size + column];
    float high = float(sum), low = float(sum - double(high));
    for (int l = 16; l > 0; l /= 2) {
        sum = double(high) + low + (double(from_lane_xor(high, l)) + from_lane_xor(low, l));
        high = float(sum);
        low = float(sum - double(high));
    }
    if (at.lane != 0)
        return;
    if (is_rate) {
        const int token = i - 2 * of_norm;
        p.dindex[token] = 1.0f / float(token + 1) + p.index[token] > 0
                              ? high * expf(p.decay * float(token - (p.m - 1)))
                              : 0.0f;
    } else
        (i < of_norm ? p.dg : p.db)[i % of_norm] = high;
}

size_t last_rows_size(const TttLinearShape &s) {
    const int64_t batches = (s.tokens + s.mini_batch - 1) / s.mini_batch;
    return (size_t(s.streams * s.heads * batches * 2 * s.head_dim) * sizeof(float) + 255) / 256 *
           256;
}
size_t part_size(const TttLinearShape &s) {
    return (size_t(s.streams * s.heads * (2 * s.head_dim + s.mini_batch)) * sizeof(float) + 255) /
           256 * 256;
}

} // namespace

cudaError_t linear_sum_parts(const SumParams &sums, cudaStream_t stream) {
    const unsigned outputs = unsigned(2 * sums.heads * sums.d + sums.m);
    return launch(linear_sums, (outputs + 7) / 8, 256, 0, stream, sums);
}

size_t ttt_linear_vjp_workspace(const TttLinearShape &shape, bool has_trace) {
    return part_size(shape) + last_rows_size(shape) + (has_trace ? 0 : ttt_linear_trace(shape));
}

const char *ttt_linear_vjp_misses(const TttLinearShape &shape) {
    if (const char *what = linear_misses(shape))
        return what;
    if (is_wide(shape))
        return visit_linear<LinearWideReverse>(shape,
                                               [](auto kernels) { return kernels.misses(); });
    return visit_linear<LinearReverse>(shape, [&](auto kernels) { return kernels.misses(shape); });
}

cudaError_t ttt_linear_vjp(const TttLinearShape &shape, const TttLinearBackward &t, void *workspace,
                           cudaStream_t stream) {
    LinearParams p = linear_params(shape);
    p.q = t.q, p.k = t.k, p.v = t.v, p.lr = t.lr;
    p.index = t.index, p.g = t.g, p.b = t.b, p.w1 = t.w1, p.b1 = t.b1;
    p.dy = t.dy, p.dw_next = t.dw1_out, p.db_next = t.db1_out, p.dloss = t.dloss;
    p.dq = t.dq, p.dk = t.dk, p.dv = t.dv, p.dlr = t.dlr;
    p.dw = t.dw1, p.db1 = t.db1;
    unsigned char *rest = static_cast<unsigned char *>(workspace);
    p.part = reinterpret_cast<float *>(rest);
    rest += part_size(shape);
    p.last_rows = reinterpret_cast<float *>(rest);
    rest += last_rows_size(shape);
    if (t.trace)
        set_trace(p, shape, const_cast<void *>(t.trace));
    else {
        set_trace(p, shape, rest);
        if (const cudaError_t e = ttt_linear_states(shape, p, stream); e != cudaSuccess)
            return e;
    }
    const cudaError_t e = is_wide(shape)
                              ? visit_linear<LinearWideReverse>(
                                    shape, [&](auto kernels) { return kernels.run(p, stream); })
                              : visit_linear<LinearReverse>(shape, [&](auto kernels) {
                                    return kernels.run(shape, p, stream);
                                });
    if (e != cudaSuccess)
        return e;
    return linear_sum_parts({p.part, t.index, t.dg, t.db, t.dindex, p.streams, p.heads,
                             int(shape.head_dim), int(shape.mini_batch), p.decay},
                            stream);
}

} // namespace ponder::cuda
