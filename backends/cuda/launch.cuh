// Launches that overlap the end of the kernel before them: a block may start when the earlier
// kernel's blocks are done with their work and not yet with leaving, which saves a microsecond
// where passes consist of many small kernels. The kernel calls wait_for_earlier() before it reads
// what an earlier one wrote, or writes what one may read: at its start, or after work on nothing but
// its own, constants, and what ponder_device::settled() answers for.
#pragma once

#include "kernel.hpp"

namespace ponder::cuda {

struct Launch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute overlap;

    Launch(const Run &run, dim3 grid, dim3 block, size_t shared) {
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared;
        config.stream = run.stream;
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &overlap;
        config.numAttrs = run.device->major >= 9 ? 1 : 0;
    }
    Launch(const Launch &) = delete;
};

template <class... P, class... A>
void launch(const Run &run, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
            A... arguments) {
    Launch to(run, grid, block, shared);
    run.device->check(cudaLaunchKernelEx(&to.config, kernel, P(arguments)...), "launch");
}

__device__ inline void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Blocks of the next kernel may come as soon as all of this one's have said so or are done, where
// there is room for them. After wait_for_earlier(): then what overlaps are two kernels, not three,
// and the next one may read at once what was written before this one.
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

} // namespace ponder::cuda
