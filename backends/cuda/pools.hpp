// The memory pools of all open devices: what one holds free, another may need.
#pragma once

#include <cuda_runtime.h>

namespace ponder::cuda {

void add_pool(cudaMemPool_t pool);
void remove_pool(cudaMemPool_t pool);

} // namespace ponder::cuda
