#include "chart_axis.hpp"

#include "text.hpp"

#include <algorithm>
#include <cmath>

namespace tool {

Axis make_axis(double least, double most, double top, double bottom, int lines) {
    const double range = std::max(most - least, 1e-6);
    const double raw = range / lines, power = std::pow(10, std::floor(std::log10(raw)));
    const double step = power * (raw / power <= 1   ? 1
                                 : raw / power <= 2 ? 2
                                 : raw / power <= 5 ? 5
                                                    : 10);
    return {std::floor(least / step) * step, std::ceil(most / step + 1e-9) * step, step, top,
            bottom};
}

std::string grid(const Axis &axis, double left, double right) {
    std::string svg;
    for (double v = axis.low; v <= axis.high + axis.step / 2; v += axis.step)
        svg += format("<line class=grid x1=%.0f x2=%.0f y1=%.1f y2=%.1f />"
                      "<text x=%.0f y=%.1f text-anchor=end>%g</text>",
                      left, right, axis.y(v), axis.y(v), left - 6, axis.y(v) + 4,
                      std::round(v / axis.step) * axis.step);
    return svg;
}

} // namespace tool
