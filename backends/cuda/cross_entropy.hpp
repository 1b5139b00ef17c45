// Losses of a head without its logits; cross_entropy_sm90.cu.
#pragma once

#include "kernel.hpp"

#include <algorithm>

namespace ponder::cuda {

bool head_losses_fit(const ponder_device &device, int64_t tokens, int64_t width,
                     int64_t vocabulary);
size_t head_losses_workspace(int64_t tokens, int64_t vocabulary);
inline int64_t head_stride(int64_t vocabulary) { return (vocabulary + 63) / 64 * 64; }
// 16-byte aligned h [tokens,width] and table [vocabulary,width]. Where e [tokens,head_stride] and
// share [tokens] are given, p - onehot = e share (p where there is no target), and e is 0 behind
// the vocabulary.
void head_losses(const Run &run, const bf16 *h, const bf16 *table, const int32_t *target,
                 float *nll, float *entropy, bf16 *e, float *share, int64_t tokens, int64_t width,
                 int64_t vocabulary);

} // namespace ponder::cuda
