#include "base/random.hpp"

#include <bit>
#include <cmath>
#include <numbers>

namespace ponder {

Random::Random(uint64_t seed) {
    for (uint64_t &word : state) {
        seed += 0x9e3779b97f4a7c15u;
        uint64_t z = seed;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        word = z ^ (z >> 31);
    }
}

uint64_t Random::next() {
    const uint64_t result = std::rotl(state[0] + state[3], 23) + state[0];
    const uint64_t shifted = state[1] << 17;
    state[2] ^= state[0];
    state[3] ^= state[1];
    state[1] ^= state[2];
    state[0] ^= state[3];
    state[2] ^= shifted;
    state[3] = std::rotl(state[3], 45);
    return result;
}

double Random::uniform() { return double(next() >> 11) * 0x1p-53; }

double Random::normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
}

double uniform_at(uint64_t seed, uint64_t counter) {
    uint64_t x = counter, y = 0, key = seed;
    for (int round = 0; round < 10; ++round, key += 0x9e3779b97f4a7c15u) {
        const auto product = static_cast<unsigned __int128>(x) * 0xd2b74407b1ce6e93u;
        x = uint64_t(product >> 64) ^ key ^ y;
        y = uint64_t(product);
    }
    return double(x >> 11) * 0x1p-53;
}

} // namespace ponder
