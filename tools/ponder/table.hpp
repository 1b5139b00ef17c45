// Columns of text for the terminal.
#pragma once

#include <string>
#include <vector>

namespace tool {

class Table {
public:
    // One character a column: 'l' left, 'r' right.
    explicit Table(std::string alignment) : alignment_(std::move(alignment)) {}
    void row(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
    void line() { rows_.emplace_back(); } // an empty line
    std::string text(size_t indent = 2) const;

private:
    std::string alignment_;
    std::vector<std::vector<std::string>> rows_;
};

// A bar of `width` columns at most, in eighths of a column.
std::string unicode_bar(double share, int width);

} // namespace tool
