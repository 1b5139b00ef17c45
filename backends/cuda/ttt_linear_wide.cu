#include "ttt_linear_wide_scan.cuh"

namespace ponder::cuda {

template <class E, int M> using WideScanLinear = Linear<E, 256, M, 4>;

template <class E, int M>
cudaError_t LinearWideScan<E, M>::run(const LinearParams &p, cudaStream_t stream) {
    using L = WideScanLinear<E, M>;
    return launch(linear_wide_scan<L>, unsigned(p.streams * p.heads * L::split) * (p.loss ? 2 : 1),
                  L::threads, wide_scan_shared<L>(), stream, p, L::split);
}
template <class E, int M> const char *LinearWideScan<E, M>::misses() {
    return cluster_misses(wide_scan_shared<WideScanLinear<E, M>>());
}

template struct LinearWideScan<Bf16, 16>;
template struct LinearWideScan<Bf16, 64>;
template struct LinearWideScan<float, 16>;

} // namespace ponder::cuda
