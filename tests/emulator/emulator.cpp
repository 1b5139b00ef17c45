// Fibers of the emulator (x86-64, System V), and the few runtime calls that tests make.
#include "ttt_warp.hpp"

#undef threadIdx
#undef blockIdx

extern "C" void ponder_switch_stack(void **from, void *to);
asm(R"(
.text
.globl ponder_switch_stack
.type ponder_switch_stack, @function
ponder_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size ponder_switch_stack, .-ponder_switch_stack
)");

namespace emulator {

Block *block = nullptr;
Thread *thread = nullptr;
static void *scheduler = nullptr;

void yield() { ponder_switch_stack(&thread->stack_pointer, scheduler); }

static void entry() {
    block->body();
    thread->done = true;
    yield();
    std::abort();
}

void run_block(Block &b) {
    constexpr size_t size = 128 * 1024;
    block = &b;
    for (size_t i = 0; i < b.threads.size(); ++i) {
        Thread &t = b.threads[i];
        t.x = unsigned(i);
        t.stack = std::make_unique_for_overwrite<unsigned char[]>(size);
        auto top = (reinterpret_cast<uintptr_t>(t.stack.get()) + size) & ~uintptr_t(15);
        void **sp = reinterpret_cast<void **>(top);
        *--sp = nullptr; // where a caller would be: rsp is 8 off 16 at the entry
        *--sp = reinterpret_cast<void *>(entry);
        sp -= 6;
        std::fill_n(sp, 6, nullptr);
        t.stack_pointer = sp;
    }
    for (size_t left = b.threads.size(); left > 0;)
        for (Thread &t : b.threads) {
            if (t.done)
                continue;
            thread = &t;
            ponder_switch_stack(&scheduler, t.stack_pointer);
            left -= t.done;
        }
}

} // namespace emulator

extern "C" {
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    *value = 227 * 1024;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **p, size_t size) {
    *p = std::aligned_alloc(256, (size + 255) / 256 * 256);
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    std::memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int value, size_t size) {
    std::memset(p, value, size);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return "emulated"; }
}
