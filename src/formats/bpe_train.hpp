// Training of a byte-level BPE vocabulary: the most frequent pair of neighbours becomes a token,
// again and again. Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword
// Units", on the words of GPT-2's pattern.
#pragma once

#include "formats/word_split.hpp"

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ponder {

// Ids: 0 is <|endoftext|>, 1 .. 256 are the bytes in the order of their printable names, as in
// Hugging Face's alphabet, then one for each merge.
constexpr int32_t first_merged_id = 257;
int32_t id_of_byte(unsigned char byte);

using Merges = std::vector<std::pair<int32_t, int32_t>>; // in order; the i-th makes id 257 + i

class BpeTrainer {
public:
    // Longer words are data rather than language; they do not count.
    static constexpr size_t longest_word = 1024;

    void add(std::string_view text);
    // At most `count` merges; fewer when no pair is left. Of pairs with equal counts the smaller
    // ids come first. A pair that spells a token which is there already is never merged.
    Merges merges(size_t count) const;

private:
    struct TextHash {
        using is_transparent = void;
        size_t operator()(std::string_view text) const {
            return std::hash<std::string_view>()(text);
        }
    };
    WordSplitter splitter_;
    std::unordered_map<std::string, uint64_t, TextHash, std::equal_to<>> words_;
};

// tokenizer.json as the Hugging Face library reads it.
std::string tokenizer_json(const Merges &merges);

} // namespace ponder
