// Fused ops as compositions of primitives, with the arguments of the functions in ops.hpp.
#pragma once

#include "tensor/ops.hpp"

namespace ponder::compose {

Id layer_norm(Graph &, Id x, Id scale, Id shift, double eps);
Id lora_linear(Graph &, Id x, Id w, Id b, Id a, Id bb, Id residual, double scale);
Id attention(Graph &, Id qkv, int64_t heads, double drop, int64_t salt);
Id cross_entropy(Graph &, Id h, Id table, Id target); // -> nll
Id conv1d(Graph &, Id x, Id w, Id b, int64_t shift);
TttResult ttt_scan(Graph &, Id q, Id k, Id v, Id lr, Id index, Id g, Id b,
                   const std::vector<Id> &state, const TttScan &form);

} // namespace ponder::compose
