// Random numbers with a small, portable state: xoshiro256++ (Blackman & Vigna 2019) seeded by
// splitmix64, normal deviates by Box & Muller.
#pragma once

#include <array>
#include <cstdint>

namespace ponder {

class Random {
public:
    explicit Random(uint64_t seed = 0);
    uint64_t next();
    double uniform(); // [0, 1)
    double normal();  // mean 0, variance 1; uses two numbers each time, keeps none back

    std::array<uint64_t, 4> state;
};

// Number `counter` of the stream `seed`, in [0, 1): Philox 2x64-10 (Salmon et al. 2011). It has no
// state, so a draw depends on its place alone.
double uniform_at(uint64_t seed, uint64_t counter);

} // namespace ponder
