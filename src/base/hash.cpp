#include "base/hash.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace ponder {

static_assert(std::endian::native == std::endian::little, "hashes are compared across machines");

namespace {

// Odd, so that multiplying loses nothing.
constexpr uint64_t spread = 0xc2b2ae3d27d4eb4fu, stir = 0x9e3779b185ebca87u;

uint64_t round(uint64_t lane, uint64_t word) { return std::rotl(lane + word * spread, 31) * stir; }

// Every bit of the result depends on every bit of x.
uint64_t avalanche(uint64_t x) {
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
    x = (x ^ (x >> 29)) * 0xa0761d6478bd642fu;
    return x ^ (x >> 32);
}

} // namespace

void Hash::block(const unsigned char *bytes) {
    uint64_t word[4];
    std::memcpy(word, bytes, sizeof word);
    for (int i = 0; i < 4; ++i)
        lane_[i] = round(lane_[i], word[i]);
}

void Hash::add(const void *data, size_t size) {
    const auto *bytes = static_cast<const unsigned char *>(data);
    length_ += size;
    if (filled_ > 0) {
        size_t part = std::min(size, sizeof tail_ - filled_);
        if (part > 0)
            std::memcpy(tail_ + filled_, bytes, part);
        filled_ += part;
        bytes += part;
        size -= part;
        if (filled_ < sizeof tail_)
            return;
        block(tail_);
        filled_ = 0;
    }
    for (; size >= sizeof tail_; bytes += sizeof tail_, size -= sizeof tail_)
        block(bytes);
    if (size > 0)
        std::memcpy(tail_, bytes, size);
    filled_ = size;
}

std::string Hash::hex() const {
    Hash end = *this;
    // Padding with zeros is unambiguous because the length goes in as well.
    std::memset(end.tail_ + filled_, 0, sizeof tail_ - filled_);
    end.block(end.tail_);
    uint64_t low = length_, high = ~length_;
    for (uint64_t lane : end.lane_) {
        low = avalanche(low ^ lane);
        high = avalanche(high * stir + std::rotl(lane, 23));
    }
    std::string digits;
    for (uint64_t half : {high, low})
        for (int shift = 60; shift >= 0; shift -= 4)
            digits += "0123456789abcdef"[(half >> shift) & 15];
    return digits;
}

} // namespace ponder
