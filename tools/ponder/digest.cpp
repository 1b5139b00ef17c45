#include "digest.hpp"

#include "text.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace tool {

namespace {

constexpr uint64_t prime1 = 0x9e3779b185ebca87u, prime2 = 0xc2b2ae3d27d4eb4fu,
                   prime3 = 0x165667b19e3779f9u;

uint64_t mixed(uint64_t lane, uint64_t input) {
    return std::rotl(lane + input * prime2, 31) * prime1;
}

} // namespace

void Digest::block(const unsigned char *bytes) {
    uint64_t words[4];
    std::memcpy(words, bytes, sizeof words);
    for (int i = 0; i < 4; ++i)
        lane_[i] = mixed(lane_[i], words[i]);
}

void Digest::add(const void *data, size_t size) {
    const auto *bytes = static_cast<const unsigned char *>(data);
    length_ += size;
    if (filled_ > 0) {
        const size_t taken = std::min(size, sizeof tail_ - filled_);
        std::memcpy(tail_ + filled_, bytes, taken);
        filled_ += taken;
        bytes += taken;
        size -= taken;
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

uint64_t Digest::finish(uint64_t salt) const {
    Digest last = *this;
    std::memset(last.tail_ + filled_, 0, sizeof tail_ - filled_);
    last.block(last.tail_);
    uint64_t hash = length_ + salt * prime3;
    for (const uint64_t lane : last.lane_)
        hash = (hash ^ mixed(0, lane + salt)) * prime1 + prime3;
    hash = (hash ^ hash >> 33) * prime2;
    hash = (hash ^ hash >> 29) * prime3;
    return hash ^ hash >> 32;
}

std::string Digest::hex() const {
    return format("%016llx%016llx", (unsigned long long)finish(0), (unsigned long long)finish(1));
}

} // namespace tool
