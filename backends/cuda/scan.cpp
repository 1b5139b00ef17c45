// ttt_linear, ttt_mlp and ttt_linear_vjp: which kernels take a call.
#include "scan.hpp"
#include "ops.hpp"

namespace ponder::cuda {

int32_t plan_ttt_linear(const Call &call) { return plan_plain_ttt_linear(call); }
int32_t plan_ttt_mlp(const Call &call) { return plan_plain_ttt_mlp(call); }
int32_t plan_ttt_linear_vjp(const Call &call) { return plan_plain_ttt_linear_vjp(call); }

} // namespace ponder::cuda
