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

// product_tiles_sm90.cu: the product with it. x, w and u are bf16, w as the op has it; forward
// [depth, width], backward [width,depth]. Few tokens of whole tiles, rank 16, compute capability 9.
bool lora_tiles_fit(const ponder_device &device, int64_t streams, int64_t tokens, int64_t depth,
                    int64_t width, int64_t rank);
struct LoraGelu {
    bool forward = false;
    bf16 *kept = nullptr;           // the sum before it
    const bf16 *slope_at = nullptr; // backward: what is found is multiplied with the slope there
};
template <bool back, class Y>
void lora_tiles(const Run &run, const Prepare<bf16, Y> &p, const bf16 *w, int64_t streams,
                bool constant, const LoraGelu &gelu);

// Clusters of blocks share 16 tokens; compute capability 9.
template <bool back, class X, class Y>
void prepare_clusters(const Run &run, const Prepare<X, Y> &p, int64_t streams);

} // namespace ponder::cuda
