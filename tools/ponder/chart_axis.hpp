// The vertical axis of a chart.
#pragma once

#include <string>

namespace tool {

// From a round number below the values to one above.
struct Axis {
    double low, high, step, top, bottom; // top, bottom: pixels
    double y(double value) const { return bottom - (value - low) / (high - low) * (bottom - top); }
};

Axis make_axis(double least, double most, double top, double bottom, int lines);
// Its lines and numbers as SVG.
std::string grid(const Axis &axis, double left, double right);

} // namespace tool
