// A fast 128-bit hash of bytes: tells contents apart and finds damage; no protection against
// forgery. XXH64's rounds (Collet 2014) with two ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tool {

class Digest {
public:
    void add(const void *data, size_t size);
    // With its length before it, so that neighbours do not run together.
    void add_text(std::string_view text) {
        add_number(text.size());
        add(text.data(), text.size());
    }
    void add_number(uint64_t value) { add(&value, sizeof value); }
    uint64_t number() const { return finish(0); }
    std::string hex() const; // 32 digits; the same for the same bytes, however they were cut

private:
    uint64_t finish(uint64_t salt) const;
    void block(const unsigned char *bytes);

    uint64_t lane_[4] = {0x60ea27eeadc0b5d6u, 0xc2b2ae3d27d4eb4fu, 0, 0x61c8864e7a143579u};
    unsigned char tail_[32] = {};
    size_t filled_ = 0;
    uint64_t length_ = 0;
};

} // namespace tool
