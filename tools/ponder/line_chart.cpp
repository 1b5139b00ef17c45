#include "line_chart.hpp"

#include "chart_axis.hpp"
#include "html_charts.hpp"
#include "text.hpp"

#include <algorithm>
#include <cmath>

namespace tool {

// Okabe & Ito's colours, darker on white and lighter on black where the contrast needs it.
const char *const curve_style = R"css(
:root{--c0:#0b62c4;--c1:#b35900;--c2:#007a5a;--c3:#a8326e;--c4:#6b5b00;--c5:#5b3fa8;--c6:#3d4752;
--c7:#a02020}
@media(prefers-color-scheme:dark){:root{--c0:#6cb1ff;--c1:#f0a24a;--c2:#3cc79c;--c3:#e88bb8;
--c4:#d6c24a;--c5:#b59cf5;--c6:#aab4bf;--c7:#f08080}}
svg .curve{fill:none;stroke-width:1.8;stroke-linejoin:round}svg .faint{opacity:.3;stroke-width:1}
.k0{stroke:var(--c0);fill:var(--c0);color:var(--c0)}
.k1{stroke:var(--c1);fill:var(--c1);color:var(--c1)}
.k2{stroke:var(--c2);fill:var(--c2);color:var(--c2)}
.k3{stroke:var(--c3);fill:var(--c3);color:var(--c3)}
.k4{stroke:var(--c4);fill:var(--c4);color:var(--c4)}
.k5{stroke:var(--c5);fill:var(--c5);color:var(--c5)}
.k6{stroke:var(--c6);fill:var(--c6);color:var(--c6)}
.k7{stroke:var(--c7);fill:var(--c7);color:var(--c7)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(27rem,1fr));gap:1rem 2rem}
.charts h2{margin:1rem 0 .2rem}
)css";

namespace {

constexpr size_t colours = 8;
constexpr double width = 560, height = 240, left = 52, right = 552, top = 10, bottom = 206;

std::string log_grid(const Axis &axis) {
    std::string svg;
    const bool sparse = axis.high - axis.low > 2;
    for (int power = int(std::floor(axis.low)); power <= int(std::ceil(axis.high)); ++power)
        for (const int digit : {1, 2, 5}) {
            const double v = power + std::log10(digit);
            if (v < axis.low - 1e-9 || v > axis.high + 1e-9 || (sparse && digit > 1))
                continue;
            svg += format("<line class=grid x1=%.0f x2=%.0f y1=%.1f y2=%.1f />"
                          "<text x=%.0f y=%.1f text-anchor=end>%g</text>",
                          left, right, axis.y(v), axis.y(v), left - 6, axis.y(v) + 4,
                          digit * std::pow(10, power));
        }
    return svg;
}

} // namespace

std::vector<std::pair<double, double>> thinned(std::vector<std::pair<double, double>> points,
                                               size_t most) {
    if (points.size() <= most)
        return points;
    std::vector<std::pair<double, double>> few;
    for (size_t i = 0; i < most; ++i) {
        const size_t begin = i * points.size() / most, end = (i + 1) * points.size() / most;
        double x = 0, y = 0;
        for (size_t j = begin; j < end; ++j)
            x += points[j].first, y += points[j].second;
        few.emplace_back(x / double(end - begin), y / double(end - begin));
    }
    return few;
}

std::vector<std::pair<double, double>>
smoothed(const std::vector<std::pair<double, double>> &points, size_t width) {
    std::vector<double> sums(1, 0.0);
    for (const auto &[x, y] : points)
        sums.push_back(sums.back() + y);
    std::vector<std::pair<double, double>> smooth;
    for (size_t i = 0; i < points.size(); ++i) {
        const size_t half = std::min({width / 2, i, points.size() - 1 - i});
        smooth.emplace_back(points[i].first,
                            (sums[i + half + 1] - sums[i - half]) / double(2 * half + 1));
    }
    return smooth;
}

std::string line_chart(const std::string &label, const std::vector<Curve> &curves, Scale scale) {
    const bool log = scale == Scale::logarithmic;
    const auto value = [&](double v) { return log ? std::log10(v) : v; };
    double least = 1e300, most = -1e300, last = 1;
    for (const Curve &curve : curves)
        for (const auto &[x, y] : curve.points) {
            if (log && y <= 0)
                continue;
            // Faint curves may leave the picture: outliers must not flatten the others.
            if (curve.look != Curve::Look::faint)
                least = std::min(least, value(y)), most = std::max(most, value(y));
            last = std::max(last, x);
        }
    if (least > most)
        return "";
    if (most - least < 1e-9 * std::max(1.0, std::fabs(most)))
        least -= log ? 0.5 : 0.5 * std::max(std::fabs(least), 1e-3), most += most - least;
    const Axis axis = log ? Axis{least - 0.05, most + 0.05, 1, top, bottom}
                          : make_axis(least, most, top, bottom, 4);
    const auto x_of = [&](double x) { return left + x / last * (right - left); };
    std::string svg = format("<svg viewBox=\"0 0 %.0f %.0f\" width=\"100%%\" role=img "
                             "aria-label=\"%s\">",
                             width, height, html_escape(label).c_str());
    svg += log ? log_grid(axis) : grid(axis, left, right);
    for (const Curve &curve : curves) {
        std::string points;
        const size_t colour = curve.colour % colours;
        for (const auto &[x, y] : curve.points) {
            if (log && y <= 0)
                continue;
            const double at = std::clamp(axis.y(value(y)), top - 4, bottom + 4);
            if (curve.look == Curve::Look::dots)
                svg += format("<circle class=k%zu cx=%.1f cy=%.1f r=3><title>%s, step %.0f: %.5g"
                              "</title></circle>",
                              colour, x_of(x), at, html_escape(curve.name).c_str(), x, y);
            points += format("%.1f,%.1f ", x_of(x), at);
        }
        if (points.empty())
            continue;
        svg += format("<g><title>%s</title><polyline class=\"k%zu curve%s\" points=\"%s\"%s/></g>",
                      html_escape(curve.name).c_str(), colour,
                      curve.look == Curve::Look::faint ? " faint" : "", points.c_str(),
                      curve.look == Curve::Look::dots ? " stroke-dasharray=\"5 3\"" : "");
    }
    for (int i = 0; i <= 4; ++i)
        svg +=
            format("<text x=%.0f y=%.0f text-anchor=%s>%s</text>", x_of(last * i / 4), bottom + 18,
                   i == 4 ? "end" : "middle", with_commas(uint64_t(last * i / 4 + 0.5)).c_str());
    return svg + "</svg>";
}

} // namespace tool
