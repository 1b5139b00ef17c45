#include "formats/word_split.hpp"

#include "base/error.hpp"

#include <cstdint>
#include <cstring>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace ponder {

namespace {

// Unicode's White_Space. PCRE2's \s under UCP also takes U+180E, which the reference does not.
#define PONDER_SPACE                                                                               \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"    \
    "\\x{205f}\\x{3000}"

constexpr char gpt2_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+|"
                                " ?[^" PONDER_SPACE "\\p{L}\\p{N}]+|"
                                "[" PONDER_SPACE "]+(?![^" PONDER_SPACE "])|[" PONDER_SPACE "]+";

#undef PONDER_SPACE

constexpr char bad_byte_stand_in = '\x01';

bool is_continuation(unsigned char c) { return (c & 0xc0u) == 0x80u; }

// Length of the UTF-8 character at text[at], 0 if there is none (Unicode 15, table 3-7).
size_t character_length(std::string_view text, size_t at) {
    auto byte = [&](size_t i) { return at + i < text.size() ? uint8_t(text[at + i]) : 0u; };
    unsigned first = byte(0), second = byte(1);
    if (first < 0x80)
        return 1;
    if (first >= 0xc2 && first <= 0xdf)
        return is_continuation(uint8_t(second)) ? 2 : 0;
    unsigned low = 0x80, high = 0xbf;
    if (first == 0xe0 || first == 0xf0)
        low = first == 0xe0 ? 0xa0 : 0x90;
    if (first == 0xed || first == 0xf4)
        high = first == 0xed ? 0x9f : 0x8f;
    if (first < 0xe0 || first > 0xf4 || second < low || second > high)
        return 0;
    if (!is_continuation(uint8_t(byte(2))))
        return 0;
    if (first < 0xf0)
        return 3;
    return is_continuation(uint8_t(byte(3))) ? 4 : 0;
}

// The first byte at or after `at` that belongs to no UTF-8 character, or text.size().
size_t find_bad_byte(std::string_view text, size_t at) {
    while (at < text.size()) {
        uint64_t eight;
        if (at + sizeof eight <= text.size()) {
            std::memcpy(&eight, text.data() + at, sizeof eight);
            if (!(eight & 0x8080808080808080u)) {
                at += sizeof eight;
                continue;
            }
        }
        size_t length = character_length(text, at);
        if (length == 0)
            return at;
        at += length;
    }
    return at;
}

[[noreturn]] void pcre2_failed(int code, const char *what) {
    PCRE2_UCHAR message[160] = {};
    pcre2_get_error_message(code, message, sizeof message);
    throw_error(code == PCRE2_ERROR_NOMEMORY ? PONDER_E_NO_MEMORY : PONDER_E_INTERNAL,
                "tokenizer: PCRE2 %s: %s", what, reinterpret_cast<const char *>(message));
}

} // namespace

struct WordSplitter::Pattern {
    pcre2_code *code = nullptr;
    ~Pattern() { pcre2_code_free(code); }
};

struct Words::Matcher {
    pcre2_match_data *data = nullptr;
    ~Matcher() { pcre2_match_data_free(data); }
};

WordSplitter::WordSplitter() : pattern_(std::make_unique<Pattern>()) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    // Anchored here and not in each match: the compiled form knows no such match option.
    pattern_->code = pcre2_compile(
        reinterpret_cast<PCRE2_SPTR>(gpt2_pattern), PCRE2_ZERO_TERMINATED,
        PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, &error, &offset, nullptr);
    if (!pattern_->code)
        pcre2_failed(error, "compile");
    // Where the system forbids executable memory, PCRE2 interprets: slower, the same words.
    pcre2_jit_compile(pattern_->code, PCRE2_JIT_COMPLETE);
}

WordSplitter::~WordSplitter() = default;

Words::Words(const WordSplitter &splitter, std::string_view text)
    : splitter_(splitter), matcher_(std::make_unique<Matcher>()), text_(text), subject_(text) {
    matcher_->data = pcre2_match_data_create(1, nullptr);
    if (!matcher_->data)
        pcre2_failed(PCRE2_ERROR_NOMEMORY, "match data");
    size_t bad = find_bad_byte(text, 0);
    if (bad == text.size())
        return;
    clean_ = text;
    for (; bad < text.size(); bad = find_bad_byte(text, bad + 1))
        clean_[bad] = bad_byte_stand_in;
    subject_ = clean_;
}

Words::~Words() = default;

bool Words::next(std::string_view &word) {
    if (position_ == subject_.size())
        return false;
    int result =
        pcre2_match(splitter_.pattern_->code, reinterpret_cast<PCRE2_SPTR>(subject_.data()),
                    subject_.size(), position_, PCRE2_NO_UTF_CHECK, matcher_->data, nullptr);
    if (result < 0)
        pcre2_failed(result, "match");
    size_t end = pcre2_get_ovector_pointer(matcher_->data)[1];
    if (end <= position_ || end > subject_.size())
        pcre2_failed(PCRE2_ERROR_INTERNAL, "match");
    word = text_.substr(position_, end - position_);
    position_ = end;
    return true;
}

} // namespace ponder
