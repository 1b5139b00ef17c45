// The functions of backends/cuda/cluster.cuh, for the emulator: what is sent is there at once.
#pragma once
#define PONDER_CUDA_CLUSTER // keeps the real ones out

#include "warp.hpp"

namespace ponder::cuda {

constexpr bool has_clusters = true;

inline void cluster_arrive() { emulator::arrive_in_cluster(); }
inline void cluster_wait() { emulator::wait_for_cluster(); }
template <class T> T *in_block(T *shared, int rank) {
    return reinterpret_cast<T *>(emulator::in_block(shared, unsigned(rank)));
}

struct Deliveries {
    int bytes; // that were announced and have not come
    uint16_t announced, phase;
};
inline void end_phase(Deliveries *d) {
    if (d->announced && d->bytes == 0) {
        d->announced = 0;
        ++d->phase;
    }
}
inline void set_deliveries(Deliveries *d) { *d = {0, 0, 0}; }
inline void announce(Deliveries *d, unsigned bytes) {
    if (d->announced)
        std::abort();
    d->bytes += int(bytes);
    d->announced = 1;
    end_phase(d);
}
inline void wait_for_deliveries(Deliveries *d, unsigned parity) {
    while ((d->phase & 1) == parity)
        emulator::yield();
    emulator::maybe_stall();
}
inline void deliver(void *to, float4 x, Deliveries *d, int rank) {
    if (reinterpret_cast<uintptr_t>(to) % 16)
        std::abort();
    std::memcpy(in_block(static_cast<unsigned char *>(to), rank), &x, sizeof x);
    Deliveries *there = in_block(d, rank);
    there->bytes -= int(sizeof x);
    end_phase(there);
    emulator::maybe_stall();
}

} // namespace ponder::cuda
