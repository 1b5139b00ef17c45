// Curves over training steps as SVG.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace tool {

struct Curve {
    enum class Look { line, faint, dots };
    std::string name; // for the pointer
    size_t colour;    // 0, 1, ...: those of `curve_style`, again from the front after the last
    Look look = Look::line;
    std::vector<std::pair<double, double>> points; // step, value; ascending, finite
};

enum class Scale { linear, logarithmic };
// Nothing if no curve has a point.
std::string line_chart(const std::string &label, const std::vector<Curve> &curves, Scale scale);

// At most `most` points, each the mean of its neighbours.
std::vector<std::pair<double, double>> thinned(std::vector<std::pair<double, double>> points,
                                               size_t most);
// A centred moving average over `width` points.
std::vector<std::pair<double, double>>
smoothed(const std::vector<std::pair<double, double>> &points, size_t width);

extern const char *const curve_style;

} // namespace tool
