// Byte-pair merging of one word: the mergeable pair of lowest rank first, of equals the leftmost.
// Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace ponder {

class BytePairs {
public:
    static constexpr uint32_t no_rank = UINT32_MAX;

    // Room for that many merges.
    explicit BytePairs(size_t merges = 0);
    void set_byte(unsigned char byte, int32_t token) { byte_token_[byte] = token; }
    // The merges in order of their rank. False when the pair was there before.
    bool add_merge(int32_t left, int32_t right, int32_t merged);

    // Appends the word's tokens. O(n log n) time, O(n) memory.
    void encode(std::string_view word, std::vector<int32_t> &tokens) const;

private:
    struct Merge {
        uint64_t pair = UINT64_MAX; // left << 32 | right; this value: a free slot
        uint32_t rank = no_rank;
        int32_t merged = -1;
    };
    const Merge &find(int32_t left, int32_t right) const;
    size_t slot_of(uint64_t pair) const;
    void encode_short(std::string_view word, std::vector<int32_t> &tokens) const;
    void encode_long(std::string_view word, std::vector<int32_t> &tokens) const;

    int32_t byte_token_[256] = {};
    std::vector<Merge> slots_; // open addressing, a power of two, at most half full
    uint32_t count_ = 0;
};

} // namespace ponder
