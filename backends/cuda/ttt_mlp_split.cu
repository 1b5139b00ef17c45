#include "ttt_mlp_split.cuh"

namespace ponder::cuda {

template <class X> static cudaError_t run(const MlpParams &p, cudaStream_t stream) {
    return launch(p.trace_w ? mlp_split_scan<X, true> : mlp_split_scan<X, false>,
                  unsigned(p.streams * p.heads * X::split) * (p.loss ? 2 : 1), X::threads,
                  mlp_split_shared<X>(), stream, p, X::split);
}

cudaError_t ttt_mlp_split(const TttMlpShape &s, const MlpParams &p, cudaStream_t stream) {
    constexpr int split = mlp_most_split, tiles = mlp_wide_batch / mlp_batch;
    if (s.mini_batch == mlp_wide_batch)
        return s.type == TttType::bf16 ? run<MlpSplit<Bf16, split, tiles>>(p, stream)
                                       : run<MlpSplit<float, split, tiles>>(p, stream);
    return s.type == TttType::bf16 ? run<MlpSplit<Bf16, split>>(p, stream)
                                   : run<MlpSplit<float, split>>(p, stream);
}

} // namespace ponder::cuda
