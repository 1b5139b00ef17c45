// lora_linear.cuh in clusters of four blocks: the sums of u meet in their shared memory, so one
// launch keeps many multiprocessors busy with few tokens.
#include "lora_linear.cuh"

namespace ponder::cuda {

namespace {

constexpr int split = 4;

template <bool back, class X, class Y>
__global__ __cluster_dims__(split, 1, 1) __launch_bounds__(prepare_threads)
void prepare_kernel(const __grid_constant__ Prepare<X, Y> p) {
    prepare<split, back>(p);
}

} // namespace

template <bool back, class X, class Y>
void prepare_clusters(const Run &run, const Prepare<X, Y> &p, int64_t streams) {
    launch(run, prepare_kernel<back, X, Y>,
           dim3(split * blocks_for(p.tokens, prepare_rows), unsigned(streams)), prepare_threads, 0,
           p);
}

template void prepare_clusters<false>(const Run &, const Prepare<bf16, bf16> &, int64_t);
template void prepare_clusters<false>(const Run &, const Prepare<bf16, float> &, int64_t);
template void prepare_clusters<true>(const Run &, const Prepare<bf16, bf16> &, int64_t);
template void prepare_clusters<true>(const Run &, const Prepare<float, bf16> &, int64_t);

} // namespace ponder::cuda
