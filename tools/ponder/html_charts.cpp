#include "html_charts.hpp"

#include "chart_axis.hpp"
#include "text.hpp"

#include <algorithm>
#include <cmath>

namespace tool {

std::string html_escape(std::string_view text) {
    std::string escaped;
    for (const char c : text) {
        switch (c) {
        case '&':
            escaped += "&amp;";
            break;
        case '<':
            escaped += "&lt;";
            break;
        case '>':
            escaped += "&gt;";
            break;
        case '"':
            escaped += "&quot;";
            break;
        case '\'':
            escaped += "&#39;";
            break;
        default:
            escaped += c;
        }
    }
    return escaped;
}

namespace {

// Centred moving average; NaN ends it.
std::vector<double> smooth(const std::vector<double> &values, size_t width) {
    std::vector<double> result;
    const size_t half = width / 2;
    for (size_t i = 0; i < values.size(); ++i) {
        const size_t begin = i > half ? i - half : 0, end = std::min(values.size(), i + half + 1);
        double sum = 0, count = 0;
        for (size_t j = begin; j < end; ++j)
            if (!std::isnan(values[j]))
                sum += values[j], count += 1;
        result.push_back(std::isnan(values[i]) ? NAN : sum / count);
    }
    return result;
}

constexpr double width = 1000, height = 300, left = 44, right = 990, top = 12, bottom = 262;

std::string polyline(const char *style, const std::vector<double> &values, const Axis &axis) {
    const size_t stride = std::max<size_t>(1, values.size() / 800);
    std::string points;
    for (size_t i = 0; i < values.size(); i += stride)
        if (!std::isnan(values[i]))
            points += format("%.1f,%.1f ",
                             left + (double(i) + 0.5) / double(values.size()) * (right - left),
                             axis.y(values[i]));
    return format("<polyline class=%s points=\"%s\"/>", style, points.c_str());
}

double biggest_chunk_loss(const RunResult &run) {
    double most = 0.1;
    for (const RunChunk &chunk : run.chunks)
        for (const double loss : {chunk.record.loss_before, chunk.skip_loss})
            if (std::isfinite(loss))
                most = std::max(most, loss);
    return most;
}

} // namespace

std::string loss_curve(const RunResult &run) {
    std::vector<double> skip, adapted;
    for (const RunChunk &chunk : run.chunks) {
        skip.push_back(chunk.skip_loss);
        adapted.push_back(chunk.record.loss_before);
    }
    const size_t window = std::max<size_t>(1, run.chunks.size() / 20) | 1;
    const std::vector<double> smooth_skip = smooth(skip, window);
    const std::vector<double> smooth_adapted = smooth(adapted, window);
    double least = 1e9, most = 0;
    for (const auto &values : {smooth_skip, smooth_adapted, adapted})
        for (const double v : values)
            if (std::isfinite(v))
                least = std::min(least, v), most = std::max(most, v);
    if (least > most)
        return "";
    const Axis axis = make_axis(least, most, top, bottom, 5);
    std::string svg = format("<svg viewBox=\"0 0 %.0f %.0f\" width=\"100%%\" role=img "
                             "aria-label=\"Loss over the stream, SKIP and adapted\">",
                             width, height);
    svg += grid(axis, left, right);
    if (window > 1)
        svg += polyline("raw", adapted, axis);
    if (run.has_skip())
        svg += polyline("skip", smooth_skip, axis);
    svg += polyline("adapted", smooth_adapted, axis);
    for (int i = 0; i <= 4; ++i)
        svg += format("<text x=%.0f y=%.0f text-anchor=%s>%s</text>", left + (right - left) * i / 4,
                      bottom + 18,
                      i == 0   ? "start"
                      : i == 4 ? "end"
                               : "middle",
                      with_commas(run.adapted.tokens * uint64_t(i) / 4).c_str());
    svg += format("<text x=%.0f y=%.0f text-anchor=middle>tokens read</text></svg>",
                  (left + right) / 2, bottom + 34);
    return svg;
}

namespace {

constexpr double bar_step = 15, bar_width = 11, bar_left = 44;
constexpr double bar_top = 10, bar_bottom = 170, k_line = 186, gate_top = 206, gate_bottom = 256;

// Signal and threshold of a policy, on a lane of their own below the bars.
struct GateLane {
    double low = 1e300, high = -1e300;
    explicit GateLane(const RunResult &run) {
        for (const RunChunk &chunk : run.chunks)
            for (const double v : {chunk.record.gate_score, chunk.record.gate_threshold})
                if (std::isfinite(v))
                    low = std::min(low, v), high = std::max(high, v);
    }
    bool used() const { return low <= high; }
    double y(double v) const {
        return gate_bottom - (v - low) / std::max(high - low, 1e-12) * (gate_bottom - gate_top);
    }
};

std::string number_or_dash(double value) {
    return std::isfinite(value) ? format("%.3f", value) : "none";
}

std::string one_bar(const RunChunk &chunk, double x, const Axis &axis, const GateLane &gate) {
    const ponder_record &r = chunk.record;
    const double y = axis.y(std::isfinite(r.loss_before) ? r.loss_before : 0);
    const char *style = std::isnan(chunk.skip_loss)        ? "n"
                        : chunk.skip_loss >= r.loss_before ? "b"
                                                           : "w";
    std::string svg =
        format("<g><title>chunk %llu: loss %.3f, SKIP %s, K = %d, gate score %s, "
               "threshold %s%s%s</title>",
               (unsigned long long)r.chunk, r.loss_before, number_or_dash(chunk.skip_loss).c_str(),
               int(r.steps), number_or_dash(r.gate_score).c_str(),
               number_or_dash(r.gate_threshold).c_str(),
               r.flags & PONDER_RECORD_ROLLED_BACK ? ", rolled back" : "",
               r.flags & PONDER_RECORD_OVER_BUDGET ? ", over budget" : "");
    svg += format("<rect class=%s x=%.1f y=%.1f width=%.0f height=%.1f />", style, x, y, bar_width,
                  axis.bottom - y);
    if (std::isfinite(chunk.skip_loss))
        svg += format("<line class=s x1=%.1f x2=%.1f y1=%.1f y2=%.1f />", x - 1, x + bar_width + 1,
                      axis.y(chunk.skip_loss), axis.y(chunk.skip_loss));
    svg += format("<text class=k x=%.1f y=%.0f>%d%s</text>", x + bar_width / 2, k_line,
                  int(r.steps), r.flags & PONDER_RECORD_ROLLED_BACK ? "!" : "");
    if (std::isfinite(r.gate_threshold))
        svg += format("<line class=limit x1=%.1f x2=%.1f y1=%.1f y2=%.1f />", x - 2,
                      x + bar_width + 2, gate.y(r.gate_threshold), gate.y(r.gate_threshold));
    if (std::isfinite(r.gate_score))
        svg += format("<circle class=gate cx=%.1f cy=%.1f r=3 />", x + bar_width / 2,
                      gate.y(r.gate_score));
    return svg + "</g>";
}

} // namespace

std::string chunk_bars(const RunResult &run) {
    constexpr size_t most = 500; // of each end
    const size_t count = run.chunks.size();
    std::vector<size_t> shown;
    for (size_t i = 0; i < count; ++i)
        if (i < most || i + most >= count)
            shown.push_back(i);
    const GateLane gate(run);
    const Axis axis = make_axis(0, biggest_chunk_loss(run), bar_top, bar_bottom, 4);
    const double end = bar_left + bar_step * double(shown.size()) + 8;
    const double tall = gate.used() ? gate_bottom + 14 : k_line + 12;
    std::string svg = format("<svg width=%.0f height=%.0f role=img aria-label=\"Loss, steps and "
                             "gate score of each chunk\">",
                             std::max(end, 160.0), tall);
    svg += grid(axis, bar_left, end);
    svg += format("<text x=%.0f y=%.0f text-anchor=end>K</text>", bar_left - 6, k_line);
    if (gate.used())
        svg +=
            format("<text x=%.0f y=%.0f text-anchor=end>%.3g</text>"
                   "<text x=%.0f y=%.0f text-anchor=end>%.3g</text>",
                   bar_left - 6, gate_top + 4, gate.high, bar_left - 6, gate_bottom + 4, gate.low);
    for (size_t i = 0; i < shown.size(); ++i)
        svg += one_bar(run.chunks[shown[i]], bar_left + 3 + bar_step * double(i), axis, gate);
    svg += "</svg>";
    std::string page = "<div class=scroll tabindex=0>" + svg + "</div>";
    page += gate.used() ? "<p class=soft>Below the bars: K, the inner steps taken; then the gate "
                          "score (dot) and the threshold it was compared with (line).</p>"
                        : "<p class=soft>Below the bars: K, the inner steps taken. This policy "
                          "compares no signal, so there is no gate score.</p>";
    if (shown.size() < count)
        page += format("<p class=soft>The first and last %zu of %zu chunks.</p>", most, count);
    return page;
}

} // namespace tool
