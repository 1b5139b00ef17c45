// Work that a recording makes only where a flag in device memory is set: conditional nodes of a
// CUDA graph.
#pragma once

#include "ponder/backend.h"

namespace ponder::cuda {

int32_t record_if(ponder_device *device, const int32_t *flag);
int32_t record_end_if(ponder_device *device);
// Ends what is open, where a recording is given up.
void abandon_conditions(ponder_device *device);

} // namespace ponder::cuda
