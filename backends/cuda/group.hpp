// Sums over the devices of several processes, by NCCL.
#pragma once

#include "ponder/backend.h"

namespace ponder::cuda {

int32_t group_key(ponder_device *device, void *key, char *why, size_t size);
int32_t group_join(ponder_device *device, const void *key, uint32_t rank, uint32_t count,
                   double patience, char *why, size_t size);
int32_t group_sum(ponder_device *device, float *values, size_t count, double patience, char *why,
                  size_t size);
void group_leave(ponder_device *device);

} // namespace ponder::cuda
