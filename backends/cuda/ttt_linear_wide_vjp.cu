#include "ttt_linear_wide_reverse.cuh"

namespace ponder::cuda {

// Four blocks a head, and where their shared memory does not suffice eight.
template <class E, int M> using WideReverseLinear = Linear<E, 256, M, M == 16 ? 4 : 8>;

template <class E, int M>
cudaError_t LinearWideReverse<E, M>::run(const LinearParams &p, cudaStream_t stream) {
    using L = WideReverseLinear<E, M>;
    return launch(linear_wide_reverse<L>, unsigned(p.streams * p.heads * L::split), L::threads,
                  wide_reverse_shared<L>(), stream, p, L::split);
}
template <class E, int M> const char *LinearWideReverse<E, M>::misses() {
    return cluster_misses(wide_reverse_shared<WideReverseLinear<E, M>>());
}

template struct LinearWideReverse<Bf16, 16>;
template struct LinearWideReverse<Bf16, 64>;
template struct LinearWideReverse<float, 16>;

} // namespace ponder::cuda
