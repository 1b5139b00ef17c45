#include "side_by_side.hpp"

#include "text.hpp"

#include <algorithm>
#include <sys/ioctl.h>
#include <unistd.h>
#include <vector>

namespace tool {

namespace {

// Tabs to the next fourth column, other control characters left out, cut at `width`.
std::vector<std::string> lines_of(std::string_view text, size_t width) {
    std::vector<std::string> lines(1);
    size_t column = 0;
    const auto put = [&](std::string_view character) {
        if (column == width) {
            lines.emplace_back();
            column = 0;
        }
        lines.back() += character;
        ++column;
    };
    const std::string valid = valid_utf8(text);
    for (size_t at = 0; at < valid.size();) {
        const size_t n = std::max<size_t>(utf8_sequence(std::string_view(valid).substr(at)), 1);
        const std::string_view character = std::string_view(valid).substr(at, n);
        at += n;
        if (character == "\n") {
            lines.emplace_back();
            column = 0;
        } else if (character == "\t") {
            do
                put(" ");
            while (column % 4 != 0 && column < width);
        } else if (n > 1 || static_cast<unsigned char>(character[0]) >= 0x20) {
            put(character);
        }
    }
    return lines;
}

} // namespace

std::string side_by_side(const Column &left, const Column &right, size_t width) {
    const size_t each = std::max<size_t>((std::max<size_t>(width, 3) - 3) / 2, 8);
    const auto a = lines_of(left.text, each), b = lines_of(right.text, each);
    std::string out;
    const auto row = [&](const std::string &l, const std::string &r, const char *between) {
        out += l + std::string(each - std::min(each, display_width(l)), ' ') + between + r;
        out.erase(out.find_last_not_of(' ') + 1);
        out += '\n';
    };
    row(left.title, right.title, " | ");
    std::string rule;
    for (size_t i = 0; i < each; ++i)
        rule += '-';
    row(rule, rule, "-+-");
    for (size_t i = 0; i < std::max(a.size(), b.size()); ++i)
        row(i < a.size() ? a[i] : "", i < b.size() ? b[i] : "", " | ");
    return out;
}

size_t terminal_width() {
    winsize size{};
    if (isatty(STDOUT_FILENO) && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
        return size.ws_col;
    return 100;
}

} // namespace tool
