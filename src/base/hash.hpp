// A fast 128-bit content hash: tells files and options apart, no protection against forgery.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ponder {

class Hash {
public:
    void add(const void *data, size_t size);
    void add(const std::string &text) { add_number(text.size()), add(text.data(), text.size()); }
    void add_number(uint64_t value) { add(&value, sizeof value); }
    std::string hex() const; // 32 digits; the same for the same bytes, however they were cut

private:
    void block(const unsigned char *bytes);
    uint64_t lane_[4] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu,
                         0x2545f4914f6cdd1du};
    unsigned char tail_[32] = {};
    size_t filled_ = 0;
    uint64_t length_ = 0;
};

} // namespace ponder
