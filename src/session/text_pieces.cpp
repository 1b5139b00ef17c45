#include "session/text_pieces.hpp"

#include <algorithm>
#include <utility>

namespace ponder {

namespace {

// Bytes of a character that begins with this one; 1 where none does.
size_t length_of(unsigned char first) {
    return first >= 0xf0 && first < 0xf8 ? 4 : first >= 0xe0 ? 3 : first >= 0xc2 ? 2 : 1;
}

// Without the beginning of a character whose rest may still come.
size_t whole_characters(std::string_view text) {
    for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
        const auto byte = static_cast<unsigned char>(text[text.size() - back]);
        if (byte < 0x80 || (byte >= 0xc0 && (byte >= 0xf8 || length_of(byte) <= back)))
            break;
        if (byte >= 0xc0)
            return text.size() - back;
    }
    return text.size();
}

} // namespace

std::string TextPieces::add(std::string_view bytes) {
    if (stopped_ >= 0)
        return {};
    held_ += bytes;
    size_t end = std::string::npos;
    for (size_t i = 0; i < stops_.size(); ++i)
        if (const size_t at = held_.find(stops_[i]); at < end) {
            end = at;
            stopped_ = int(i);
        }
    if (stopped_ >= 0) {
        held_.resize(end);
        return std::exchange(held_, {});
    }
    size_t possible = 0; // longest end of the text that begins a stop string
    for (const std::string &stop : stops_)
        for (size_t n = std::min(stop.size() - 1, held_.size()); n > possible; --n)
            if (held_.ends_with(std::string_view(stop).substr(0, n)))
                possible = n;
    const size_t certain =
        whole_characters(std::string_view(held_).substr(0, held_.size() - possible));
    std::string piece = held_.substr(0, certain);
    held_.erase(0, certain);
    return piece;
}

std::string TextPieces::finish() { return std::exchange(held_, {}); }

} // namespace ponder
