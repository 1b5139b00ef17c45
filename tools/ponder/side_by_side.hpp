// Two texts beside each other, for a terminal.
#pragma once

#include <string>
#include <string_view>

namespace tool {

struct Column {
    std::string title, text;
};

// Lines of at most `width` columns in all; long lines go on below.
std::string side_by_side(const Column &left, const Column &right, size_t width);

// Columns of the terminal on stdout; 100 where it is none.
size_t terminal_width();

} // namespace tool
