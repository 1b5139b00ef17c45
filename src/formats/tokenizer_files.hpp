// The tables of a byte-level BPE tokenizer, from tokenizer.json or vocab.json + merges.txt.
#pragma once

#include "formats/byte_pairs.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ponder {

struct TokenTables {
    std::string text;                                  // the bytes of all tokens
    std::vector<std::pair<uint32_t, uint32_t>> tokens; // begin and length in text, by id
    BytePairs pairs;
    int32_t end_of_text = -1;
    std::vector<int32_t> special; // added tokens, longest first
};

// Nothing if the folder has no tokenizer files. PONDER_E_FORMAT for malformed or contradictory
// tables, PONDER_E_UNSUPPORTED for any component that would make other ids.
std::optional<TokenTables> read_token_tables(const std::string &folder);

} // namespace ponder
