// Losses of a head without its logits; cross_entropy_sm90.cu.
#pragma once

#include "kernel.hpp"

#include <algorithm>

namespace ponder::cuda {

bool head_losses_fit(const ponder_device &device, int64_t tokens, int64_t width,
                     int64_t vocabulary);
size_t head_losses_workspace(int64_t tokens, int64_t vocabulary);
// 16-byte aligned h [tokens,width] and table [vocabulary,width].
void head_losses(const Run &run, const bf16 *h, const bf16 *table, const int32_t *target,
                 float *nll, float *entropy, int64_t tokens, int64_t width, int64_t vocabulary);

} // namespace ponder::cuda
