// The module's descriptor: chooses the instruction set, hands calls to its planners.
#include "cpu_features.hpp"
#include "device.hpp"
#include "packs.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <xmmintrin.h>

struct ponder_device {
    ponder::cpu::Packs packs;
    const ponder::cpu::Isa *isa;
    explicit ponder_device(const ponder_backend_host &host) : packs(host), isa(nullptr) {}
};

namespace ponder::cpu {

void *kernel_memory(size_t size) { return std::calloc(1, size); }

void kernel_release(void *kernel) { std::free(kernel); }

const void *packed_weight(ponder_device *device, const void *weight, uint64_t layout, size_t size,
                          void (*pack)(void *to, const void *context), const void *context,
                          size_t context_size) {
    return device->packs.get(weight, layout, size, pack, context, context_size);
}

namespace {

int32_t probe(char *why, size_t size) {
    if (best_isa())
        return 1;
    if (why && size)
        std::snprintf(why, size, "this processor or system lacks AVX2 with FMA");
    return 0;
}

const char *isa() {
    const Isa *best = best_isa();
    return best ? best->name : "none";
}

int32_t supports(int32_t dtype) {
    return dtype == PONDER_DTYPE_F32 || dtype == PONDER_DTYPE_BF16 || dtype == PONDER_DTYPE_I8;
}

ponder_device *open(const ponder_backend_host *host, char *why, size_t size) {
    const Isa *best = best_isa();
    if (!best) {
        probe(why, size);
        return nullptr;
    }
    ponder_backend_host known = {};
    if (host)
        std::memcpy(&known, host,
                    host->struct_size < sizeof known ? host->struct_size : sizeof known);
    ponder_device *device = new (std::nothrow) ponder_device(known);
    if (!device) {
        if (why && size)
            std::snprintf(why, size, "out of memory");
        return nullptr;
    }
    device->isa = best;
    return device;
}

void close(ponder_device *device) { delete device; }

int32_t plan(ponder_device *device, const ponder_op_call *op, ponder_plan *out, char *why,
             size_t size) {
    if (op->version != 1)
        return PONDER_PLAN_NONE;
    for (uint32_t i = 0; i < op->n_in + op->n_out; ++i)
        if (op->tensor[i].dtype == PONDER_DTYPE_F64)
            return PONDER_PLAN_NONE;
    for (int32_t i = 0; i < device->isa->op_count; ++i) {
        if (std::strcmp(device->isa->ops[i].name, op->op) != 0)
            continue;
        const int32_t result = device->isa->ops[i].plan({op, device, out});
        if (result == PONDER_PLAN_FAILED && why && size)
            std::snprintf(why, size, "out of memory for the packed weights of %s", op->op);
        return result;
    }
    return PONDER_PLAN_NONE;
}

// Numbers below 1e-38 count as zero while a kernel runs: tails of exponentials are full of them,
// and Intel processors take over 100 cycles for each (measured: attention 4 times slower). The
// control register belongs to the thread and is put back.
void run(void *kernel, void *const *buffers, void *workspace, uint32_t task) {
    constexpr unsigned flush_to_zero = 0x8000, denormals_are_zero = 0x0040;
    const Kernel *k = static_cast<const Kernel *>(kernel);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | flush_to_zero | denormals_are_zero);
    k->run(k, buffers, workspace, task);
    _mm_setcsr(before);
}

void drop(void *kernel) { kernel_release(kernel); }

size_t packed_bytes(ponder_device *device) { return device->packs.bytes(); }

void refresh(ponder_device *device, const void *constant) { device->packs.refresh(constant); }
void forget(ponder_device *device, const void *constant) { device->packs.forget(constant); }

constexpr ponder_backend descriptor = [] {
    ponder_backend backend{};
    backend.struct_size = sizeof(ponder_backend);
    backend.abi = PONDER_BACKEND_ABI;
    backend.name = "cpu";
    backend.version = PONDER_CPU_VERSION;
    backend.priority = 10;
    backend.host_memory = 1;
    backend.probe = probe;
    backend.isa = isa;
    backend.supports = supports;
    backend.open = open;
    backend.close = close;
    backend.plan = plan;
    backend.run = run;
    backend.drop = drop;
    backend.packed_bytes = packed_bytes;
    backend.refresh = refresh;
    backend.forget = forget;
    return backend;
}();

} // namespace
} // namespace ponder::cpu

extern "C" __attribute__((visibility("default"))) const ponder_backend *ponder_backend_query_v1() {
    return &ponder::cpu::descriptor;
}
