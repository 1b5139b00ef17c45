// The plain TTT scans; see scan_plain.cuh.
#pragma once

#include "kernel.hpp"

namespace ponder::cuda {

int32_t plan_plain_ttt_linear(const Call &);
int32_t plan_plain_ttt_mlp(const Call &);
int32_t plan_plain_ttt_linear_vjp(const Call &);

} // namespace ponder::cuda
