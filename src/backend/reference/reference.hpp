// The reference backend: a plain kernel for every op of src/tensor/ops.hpp, compiled into the
// core. Every test measures other kernels against it, and a CPU device may leave calls to it.
#pragma once

#include "ponder/backend.h"

namespace ponder {

const ponder_backend *reference_backend();

} // namespace ponder
