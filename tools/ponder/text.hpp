// Numbers and lines for people.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace tool {

std::string format(const char *pattern, ...) __attribute__((format(printf, 1, 2)));

std::string with_commas(uint64_t value);     // 1,234,567
std::string bytes_text(uint64_t bytes);      // 12.3 MiB
std::string duration_text(double seconds);   // 0.42 s, 12.3 s, 4m05s, 1h02m
std::string flops_text(double flops);        // 1.23 TFLOP
size_t display_width(std::string_view utf8); // code points; enough for what the tool prints

// `head` padded to `indent`, then `body` broken at spaces to stay within `width` columns.
std::string hanging(std::string head, std::string_view body, size_t indent, size_t width);

// Valid UTF-8 is kept; each byte that is not part of it becomes U+FFFD.
std::string valid_utf8(std::string_view bytes);
// Length of the valid UTF-8 sequence at the front, 0 if there is none.
size_t utf8_sequence(std::string_view bytes);

} // namespace tool
