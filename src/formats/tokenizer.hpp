// Byte-level BPE with the GPT-2 splitting pattern, from tokenizer.json or vocab.json + merges.txt.
// Sennrich et al. 2016 (BPE); Radford et al. 2019 (byte level, pattern).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ponder {

class Tokenizer {
public:
    // nullptr if the folder has no tokenizer files. Any component of tokenizer.json that changes
    // ids and is not byte-level BPE with the GPT-2 pattern is PONDER_E_UNSUPPORTED.
    static std::unique_ptr<Tokenizer> load(const std::string &folder);
    ~Tokenizer();

    // Any bytes: text that is no UTF-8 is split with each bad byte as a character of its own,
    // so decode(encode(x)) == x always. O(n log n) in text.size() at worst, which is below 2^31.
    // Thread-safe.
    //
    // Text that spells a special token, such as <|endoftext|>, is text: a document must not be
    // able to forge a separator. `Special::recognise` makes the token of it, as the Hugging Face
    // library does, for trusted text only; tokenizer.json lists those tokens, vocab.json does not.
    enum class Special { as_text, recognise };
    std::vector<int32_t> encode(std::string_view text, Special special = Special::as_text) const;
    // The token's bytes; ids outside [0, size()) are the caller's error.
    std::string_view bytes(int32_t id) const;
    int32_t size() const;        // 1 + largest id
    int32_t end_of_text() const; // id of <|endoftext|> or -1

private:
    Tokenizer();
    // The special token that the text begins with, or -1.
    int32_t special_at(std::string_view text) const;
    struct Data;
    std::unique_ptr<Data> data_;
};

} // namespace ponder
