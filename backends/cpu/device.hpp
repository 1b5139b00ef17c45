// What the kernels see of a device: packed copies of frozen weights and memory for kernel objects.
//
// Kernels are compiled once per instruction set, this side once for the baseline. So only plain
// structs and non-inline functions stand here.
#pragma once

#include "ponder/backend.h"

namespace ponder::cpu {

struct Engine; // onednn.hpp

// A planned kernel starts with its run function. Kernels are plain memory: nothing to destroy.
struct Kernel {
    void (*run)(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task);
};

struct Call {
    const ponder_op_call *op;
    ponder_device *device;
    ponder_plan *plan;
};

// Fills call.plan, or says that there is no kernel for these types and shapes.
using Planner = int32_t (*)(const Call &call);

struct Op {
    const char *name;
    Planner plan;
};

struct Isa {
    const char *name; // PONDER_TEXT of the namespace's
    const Op *ops;
    int32_t op_count; // 0: the set was left out of the build
};
#define PONDER_TEXT_(x) #x
#define PONDER_TEXT(x) PONDER_TEXT_(x)

// Zeroed memory for a kernel object, NULL when there is none.
void *kernel_memory(size_t size);
void kernel_release(void *kernel);

// The packed form of a frozen weight, made by `pack(to, context)` at the first request and shared
// by every kernel of the device. `layout` tells apart the packed forms of one weight. The context,
// plain data of at most max_pack_context bytes, is kept: the device packs again when the weight
// has changed. NULL when memory ran out.
constexpr size_t max_pack_context = 64;
const void *packed_weight(ponder_device *device, const void *weight, uint64_t layout, size_t size,
                          void (*pack)(void *to, const void *context), const void *context,
                          size_t context_size);

} // namespace ponder::cpu
