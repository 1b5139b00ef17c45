// Attention for heads of 64 on Hopper, and its gradients; attention_sm90.cu, attention_vjp_sm90.cu.
// Addresses are multiples of 16.
#pragma once

#include "kernel.hpp"

namespace ponder::cuda {

bool attention_fits(const ponder_device &device, int64_t streams, int64_t heads, int64_t tokens,
                    int64_t d);
void attention_tiles(const Run &run, const bf16 *qkv, bf16 *o, float *lse, int64_t streams,
                     int64_t heads, int64_t tokens);

bool attention_gradients_fit(const ponder_device &device, int64_t streams, int64_t heads,
                             int64_t tokens, int64_t d);
// delta as attention_vjp.cu makes it.
void attention_gradients(const Run &run, const bf16 *qkv, const float *lse, const float *delta,
                         const bf16 *grad, bf16 *dqkv, int64_t streams, int64_t heads,
                         int64_t tokens);

} // namespace ponder::cuda
