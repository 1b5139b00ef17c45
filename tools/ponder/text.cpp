#include "text.hpp"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <vector>

namespace tool {

std::string format(const char *pattern, ...) {
    va_list arguments, again;
    va_start(arguments, pattern);
    va_copy(again, arguments);
    const int size = std::vsnprintf(nullptr, 0, pattern, arguments);
    va_end(arguments);
    std::string text(size_t(size > 0 ? size : 0), '\0');
    std::vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(again);
    return text;
}

std::string with_commas(uint64_t value) {
    std::string digits = std::to_string(value);
    for (int at = int(digits.size()) - 3; at > 0; at -= 3)
        digits.insert(size_t(at), 1, ',');
    return digits;
}

std::string bytes_text(uint64_t bytes) {
    const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = double(bytes);
    size_t unit = 0;
    while (value >= 1024 && unit < 4) {
        value /= 1024;
        ++unit;
    }
    return format(unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
}

std::string duration_text(double seconds) {
    if (!std::isfinite(seconds) || seconds < 0)
        return "-";
    if (seconds < 10)
        return format("%.2f s", seconds);
    if (seconds < 60)
        return format("%.1f s", seconds);
    const uint64_t whole = uint64_t(seconds + 0.5);
    if (whole < 3600)
        return format("%llum%02llus", (unsigned long long)(whole / 60),
                      (unsigned long long)(whole % 60));
    return format("%lluh%02llum", (unsigned long long)(whole / 3600),
                  (unsigned long long)(whole / 60 % 60));
}

std::string flops_text(double flops) {
    if (flops >= 1e15)
        return format("%.2f PFLOP", flops / 1e15);
    if (flops >= 1e12)
        return format("%.2f TFLOP", flops / 1e12);
    return format("%.2f GFLOP", flops / 1e9);
}

size_t display_width(std::string_view utf8) {
    size_t width = 0;
    for (const char c : utf8)
        width += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
    return width;
}

std::string hanging(std::string head, std::string_view body, size_t indent, size_t width) {
    std::string text = std::move(head);
    size_t column = display_width(text);
    if (column > 0 && column + 2 > indent) {
        text += '\n';
        column = 0;
    }
    text.append(indent - column, ' ');
    column = indent;
    while (!body.empty()) {
        const size_t space = std::min(body.find(' '), body.size());
        const std::string_view word = body.substr(0, space);
        body.remove_prefix(std::min(space + 1, body.size()));
        const size_t wide = display_width(word);
        if (column > indent && column + 1 + wide > width) {
            text += '\n';
            text.append(indent, ' ');
            column = indent;
        } else if (column > indent) {
            text += ' ';
            ++column;
        }
        text += word;
        column += wide;
    }
    return text + '\n';
}

size_t utf8_sequence(std::string_view bytes) {
    if (bytes.empty())
        return 0;
    const auto at = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
    const unsigned char first = at(0);
    if (first < 0x80)
        return 1;
    const size_t size = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || bytes.size() < size)
        return 0;
    for (size_t i = 1; i < size; ++i)
        if ((at(i) & 0xc0) != 0x80)
            return 0;
    // Overlong forms, surrogates, above U+10FFFF.
    if ((first == 0xe0 && at(1) < 0xa0) || (first == 0xed && at(1) > 0x9f) ||
        (first == 0xf0 && at(1) < 0x90) || (first == 0xf4 && at(1) > 0x8f))
        return 0;
    return size;
}

std::string valid_utf8(std::string_view bytes) {
    std::string text;
    while (!bytes.empty()) {
        const size_t size = utf8_sequence(bytes);
        if (size > 0)
            text += bytes.substr(0, size);
        else
            text += "\xef\xbf\xbd";
        bytes.remove_prefix(size > 0 ? size : 1);
    }
    return text;
}

} // namespace tool
