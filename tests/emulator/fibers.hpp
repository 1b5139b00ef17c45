// What runs a kernel on the CPU: a fiber for each thread of a block, blocks one after the other but
// for those of a cluster, which take turns.
//
// Exchanges and barriers are where fibers take turns. Shared memory starts as NaN, and what is
// copied asynchronously arrives when it is waited for, so tests see results that nothing wrote,
// missing waits for copies and most missing barriers; races in general are compute-sanitizer's.
// With PONDER_EMULATOR_STALLS=n in the environment, one time in n, a warp of a cluster that has
// sent something or waited for it rests, at random, for as long as others take for a tile. Results
// must not change by it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cuda_runtime.h>
#include <functional>
#include <vector>

namespace emulator {

struct Copy {
    void *to;
    const void *from;
    bool valid;
};

struct Block;

struct Thread {
    Block *block = nullptr;
    unsigned id = 0; // in the block
    uint3 index{};
    void *stack_pointer = nullptr;
    bool done = false;
    unsigned exchanges = 0; // that it took part in
    unsigned cluster_turn = 0;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

using Slots = unsigned char[32][32]; // a value of each lane

struct Warp {
    int lanes = 0, arrived = 0;
    unsigned generation = 0;
    int rests = 0; // for so many turns of the others
    alignas(16) Slots slot[2];
};

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct Cluster;

struct Block {
    Cluster *cluster;
    uint3 index;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    Barrier barrier[16]; // 0: __syncthreads
};

struct Cluster {
    const std::function<void()> *body;
    std::vector<Block> blocks;
    Barrier barrier;
    int threads;
};

extern Block *block;
extern Thread *thread;
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern cudaError_t last_error;

constexpr size_t most_shared = 227 * 1024;

// As a kernel's <<<grid, block, shared, stream>>>.
struct Config {
    dim3 grid, block;
    size_t shared;
    unsigned cluster; // along x
    Config(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr, unsigned cluster = 1)
        : grid(grid), block(block), shared(shared), cluster(cluster) {}
};
// Runs `body` for every thread and returns when the last is done.
void launch(const Config &, const std::function<void()> &body);

// To the next thread.
void yield();
// This thread's warp may rest, see above.
void maybe_stall();

inline unsigned lane() { return thread->id % 32; }

inline void wait_at(Barrier &b, int threads) {
    const unsigned generation = b.generation;
    if (++b.arrived == threads) {
        b.arrived = 0;
        ++b.generation;
    } else
        while (b.generation == generation)
            yield();
}

inline void arrive_in_cluster() {
    Cluster &c = *block->cluster;
    thread->cluster_turn = c.barrier.generation;
    if (++c.barrier.arrived == c.threads) {
        c.barrier.arrived = 0;
        ++c.barrier.generation;
    }
}
inline void wait_for_cluster() {
    while (block->cluster->barrier.generation == thread->cluster_turn)
        yield();
}

// Every lane gives its value and gets those of all.
template <class T> const Slots &exchange(const T &mine) {
    static_assert(sizeof(T) <= 32);
    Warp &w = block->warps[thread->id / 32];
    const unsigned turn = thread->exchanges++;
    Slots &slots = w.slot[turn & 1];
    std::memcpy(slots[lane()], &mine, sizeof mine);
    if (++w.arrived == w.lanes) {
        w.arrived = 0;
        w.generation = turn + 1;
    } else
        while (w.generation == turn)
            yield();
    return slots;
}
template <class T> T of_lane(const Slots &slots, unsigned lane) {
    T x;
    std::memcpy(&x, slots[lane], sizeof x);
    return x;
}

// Dynamic shared memory.
inline unsigned char *first_byte(Block &b) {
    const auto first = reinterpret_cast<uintptr_t>(b.shared.data());
    return reinterpret_cast<unsigned char *>((first + 127) / 128 * 128);
}
template <class T> T *shared_memory() { return reinterpret_cast<T *>(first_byte(*block)); }
// The same place in another block of the cluster.
inline unsigned char *in_block(const void *p, unsigned rank) {
    return first_byte(block->cluster->blocks[rank]) +
           (static_cast<const unsigned char *>(p) - first_byte(*block));
}

} // namespace emulator
