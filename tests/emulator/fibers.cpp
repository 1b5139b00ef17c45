// Fibers as x86-64 and System V have them.
#include "fibers.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>

extern "C" void ponder_switch_stack(void **from, void *to);
asm(R"(
.text
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
uint3 block_index;
dim3 block_size, grid_size;
cudaError_t last_error = cudaSuccess;

static void *scheduler = nullptr;

void yield() { ponder_switch_stack(&thread->stack_pointer, scheduler); }

void maybe_stall() {
    static const char *const chance = std::getenv("PONDER_EMULATOR_STALLS");
    static const uint32_t n = chance ? uint32_t(std::atoi(chance)) : 0;
    static uint32_t random = n;
    random = random * 1664525u + 1013904223u;
    if (n > 0 && (random >> 16) % n == 0)
        block->warps[thread->id / 32].rests = 5000;
}

static void entry() {
    (*block->cluster->body)();
    thread->done = true;
    yield();
    std::abort();
}

static void start(Thread &t, unsigned char *stack, size_t size) {
    const auto top = (reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t(15);
    void **sp = reinterpret_cast<void **>(top);
    *--sp = nullptr; // where a caller would be: rsp is 8 off 16 at the entry
    *--sp = reinterpret_cast<void *>(entry);
    sp -= 6;
    std::fill_n(sp, 6, nullptr);
    t.stack_pointer = sp;
}

static void run_cluster(Cluster &c) {
    constexpr size_t size = 128 * 1024;
    static std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (stacks.size() < size_t(c.threads))
        stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(size));
    std::vector<Thread *> all;
    for (Block &b : c.blocks)
        for (size_t i = 0; i < b.threads.size(); ++i) {
            Thread &t = b.threads[i];
            t.block = &b;
            t.id = unsigned(i);
            t.index = {t.id % block_size.x, t.id / block_size.x % block_size.y,
                       t.id / block_size.x / block_size.y};
            ++b.warps[i / 32].lanes;
            start(t, stacks[all.size()].get(), size);
            all.push_back(&t);
        }
    for (size_t left = all.size(); left > 0;) {
        for (Block &b : c.blocks)
            for (Warp &w : b.warps)
                w.rests -= w.rests > 0;
        for (Thread *t : all) {
            if (t->done || t->block->warps[t->id / 32].rests > 0)
                continue;
            thread = t;
            block = t->block;
            block_index = block->index;
            ponder_switch_stack(&scheduler, t->stack_pointer);
            left -= t->done;
        }
    }
}

void launch(const Config &c, const std::function<void()> &body) {
    const unsigned threads = c.block.x * c.block.y * c.block.z;
    if (threads == 0 || threads > 1024 || c.shared > most_shared ||
        c.grid.x * c.grid.y * c.grid.z == 0 || c.cluster == 0 || c.cluster > 8 ||
        c.grid.x % c.cluster != 0) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    block_size = c.block;
    grid_size = c.grid;
    for (unsigned z = 0; z < c.grid.z; ++z)
        for (unsigned y = 0; y < c.grid.y; ++y)
            for (unsigned x = 0; x < c.grid.x; x += c.cluster) {
                Cluster cluster;
                cluster.body = &body;
                cluster.threads = int(threads * c.cluster);
                cluster.blocks.resize(c.cluster);
                for (unsigned i = 0; i < c.cluster; ++i) {
                    Block &b = cluster.blocks[i];
                    b.cluster = &cluster;
                    b.index = {x + i, y, z};
                    b.threads.resize(threads);
                    b.warps.resize((threads + 31) / 32);
                    b.shared.assign(c.shared + 128, 0xff);
                }
                run_cluster(cluster);
            }
}

} // namespace emulator
