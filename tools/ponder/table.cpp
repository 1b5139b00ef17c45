#include "table.hpp"

#include "text.hpp"

#include <algorithm>
#include <cmath>

namespace tool {

std::string Table::text(size_t indent) const {
    std::vector<size_t> widths(alignment_.size(), 0);
    for (const auto &row : rows_)
        for (size_t i = 0; i < row.size() && i < widths.size(); ++i)
            widths[i] = std::max(widths[i], display_width(row[i]));
    std::string text;
    for (const auto &row : rows_) {
        std::string line(indent, ' ');
        for (size_t i = 0; i < row.size() && i < widths.size(); ++i) {
            const std::string padding(widths[i] - display_width(row[i]), ' ');
            if (i > 0)
                line += "  ";
            line += alignment_[i] == 'r' ? padding + row[i] : row[i] + padding;
        }
        line.erase(line.find_last_not_of(' ') + 1);
        text += line + '\n';
    }
    return text;
}

std::string unicode_bar(double share, int width) {
    const char *const parts[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
    if (!std::isfinite(share))
        return "";
    const int eighths = int(std::lround(std::clamp(share, 0.0, 1.0) * width * 8));
    std::string bar;
    for (int i = 0; i < eighths / 8; ++i)
        bar += "█";
    return bar + parts[eighths % 8];
}

} // namespace tool
