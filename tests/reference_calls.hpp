// Calls of the reference kernels, whose dtypes are named shortly.
#pragma once

#include "backend/reference/reference.hpp"
#include "op_harness.hpp"

namespace ponder::test {

inline constexpr DType f32 = DType::f32, f64 = DType::f64;

inline std::vector<Tensor> call(const std::string &op, const std::vector<Tensor> &in,
                                const std::vector<Out> &out, const std::vector<double> &attr = {}) {
    return run_op(reference_backend(), op, in, out, attr);
}

} // namespace ponder::test
