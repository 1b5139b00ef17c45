#include "formats/tokenizer.hpp"

#include "base/error.hpp"
#include "formats/tokenizer_files.hpp"
#include "formats/word_split.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace ponder {

namespace {

constexpr size_t text_limit = size_t(1) << 31; // positions in a word are 32 bits

// The tokens of words seen lately in one text: code repeats its words. Local to one call, so that
// threads share nothing.
class WordCache {
public:
    static constexpr size_t longest = 15;

    // Small texts do not pay for a large table.
    explicit WordCache(size_t text_size)
        : entries_(std::bit_ceil(std::clamp<size_t>(text_size / 16, 16, 16384))) {}

    // The entry for the word, which holds its tokens if `matches`.
    struct Entry {
        uint64_t key[2] = {}; // the bytes, padded with zeros, and the length in the last one
        uint32_t count = 0;
        int32_t tokens[11];
    };
    static void key_of(std::string_view word, uint64_t (&key)[2]) {
        char bytes[sizeof key] = {};
        std::memcpy(bytes, word.data(), word.size());
        bytes[longest] = char(word.size());
        std::memcpy(key, bytes, sizeof key);
    }
    Entry &entry(const uint64_t (&key)[2]) {
        uint64_t mixed =
            (key[0] ^ std::rotl(key[1], 29) * 0xc2b2ae3d27d4eb4fu) * 0x9e3779b97f4a7c15u;
        return entries_[size_t(mixed >> 40) & (entries_.size() - 1)];
    }

private:
    std::vector<Entry> entries_;
};

void encode_cached(const BytePairs &pairs, std::string_view word, WordCache &cache,
                   std::vector<int32_t> &tokens) {
    if (word.size() > WordCache::longest)
        return pairs.encode(word, tokens);
    uint64_t key[2];
    WordCache::key_of(word, key);
    WordCache::Entry &entry = cache.entry(key);
    if (entry.key[0] == key[0] && entry.key[1] == key[1]) {
        tokens.insert(tokens.end(), entry.tokens, entry.tokens + entry.count);
        return;
    }
    size_t before = tokens.size();
    pairs.encode(word, tokens);
    size_t count = tokens.size() - before;
    if (count > std::size(entry.tokens))
        return;
    std::copy(key, key + 2, entry.key);
    std::copy(tokens.begin() + ptrdiff_t(before), tokens.end(), entry.tokens);
    entry.count = uint32_t(count);
}

} // namespace

struct Tokenizer::Data {
    TokenTables tables;
    WordSplitter splitter;
    bool begins_special[256] = {};
};

Tokenizer::Tokenizer() = default;
Tokenizer::~Tokenizer() = default;

std::unique_ptr<Tokenizer> Tokenizer::load(const std::string &folder) {
    std::optional<TokenTables> tables = read_token_tables(folder);
    if (!tables)
        return nullptr;
    std::unique_ptr<Tokenizer> tokenizer(new Tokenizer);
    tokenizer->data_ = std::make_unique<Data>();
    tokenizer->data_->tables = std::move(*tables);
    for (int32_t token : tokenizer->data_->tables.special)
        tokenizer->data_->begins_special[uint8_t(tokenizer->bytes(token)[0])] = true;
    return tokenizer;
}

int32_t Tokenizer::special_at(std::string_view text) const {
    if (!data_->begins_special[uint8_t(text[0])])
        return -1;
    for (int32_t token : data_->tables.special) // longest first
        if (text.starts_with(bytes(token)))
            return token;
    return -1;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, Special special) const {
    if (text.size() >= text_limit)
        throw_error(PONDER_E_ARGUMENT, "text of %zu bytes, at most 2^31-1 at a time", text.size());
    std::vector<int32_t> tokens;
    if (text.empty())
        return tokens;
    tokens.reserve(text.size() / 3 + 16);
    WordCache cache(text.size());
    auto encode_part = [&](std::string_view part) {
        Words words(data_->splitter, part);
        for (std::string_view word; words.next(word);)
            encode_cached(data_->tables.pairs, word, cache, tokens);
    };
    size_t begin = 0;
    for (size_t at = 0; special == Special::recognise && at < text.size();) {
        int32_t token = special_at(text.substr(at));
        if (token < 0) {
            ++at;
            continue;
        }
        encode_part(text.substr(begin, at - begin));
        tokens.push_back(token);
        begin = at += bytes(token).size();
    }
    encode_part(text.substr(begin));
    return tokens;
}

std::string_view Tokenizer::bytes(int32_t id) const {
    const TokenTables &tables = data_->tables;
    if (id < 0 || size_t(id) >= tables.tokens.size())
        return {};
    auto [begin, length] = tables.tokens[size_t(id)];
    return std::string_view(tables.text).substr(begin, length);
}

int32_t Tokenizer::size() const { return int32_t(data_->tables.tokens.size()); }

int32_t Tokenizer::end_of_text() const { return data_->tables.end_of_text; }

} // namespace ponder
