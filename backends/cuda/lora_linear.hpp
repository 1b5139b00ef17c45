// What precedes the product of lora_linear and its vjp; lora_linear_sm90.cu.
#pragma once

#include "kernel.hpp"

namespace ponder::cuda {

// u = scale_u x left, base = add + b + scale_base u right, a stream's tokens at a time.
// Forward: left is a [S,depth,rank], right bb [S,rank,width]. Backward: left is bb^T, right a^T, of
// the same layouts: bb [S,rank,depth], a [S,width,rank].
template <class X, class Y> struct Prepare {
    const X *x;
    const float *left, *right;
    bf16 *u;
    const float *add, *b;
    Y *base;
    int tokens, depth, width, rank;
    float scale_u, scale_base;
};

constexpr int most_ranks = 64;
inline bool prepare_fits(int64_t tokens, int64_t depth, int64_t width, int64_t rank) {
    return depth % 32 == 0 && width % 16 == 0 && rank % 16 == 0 && rank <= most_ranks &&
           tokens < (1 << 24) && depth < (1 << 24) && width < (1 << 24);
}

// Clusters of blocks share 16 tokens; compute capability 9.
template <bool back, class X, class Y>
void prepare_clusters(const Run &run, const Prepare<X, Y> &p, int64_t streams);

} // namespace ponder::cuda
