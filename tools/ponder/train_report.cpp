// `ponder report`: logs of `ponder train` -> one page with a chart for every quantity.
#include "commands.hpp"
#include "common.hpp"
#include "html_charts.hpp"
#include "html_page.hpp"
#include "json_in.hpp"
#include "line_chart.hpp"
#include "source.hpp"
#include "terminal.hpp"
#include "text.hpp"
#include "write_file.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>

namespace tool {

namespace fs = std::filesystem;

namespace {

using Points = std::vector<std::pair<double, double>>;

struct Log {
    std::string name;
    std::map<std::string, Points> values; // by field, against the step; what is not finite left out
    double steps = 0, seconds = 0, tokens = 0;
};

Log read_log(const std::string &path) {
    Log log;
    LineReader lines(path);
    for (std::string line; lines.next(line);) {
        if (line.find_first_not_of(" \t") == line.npos)
            continue;
        std::map<std::string, double> numbers;
        try {
            numbers = parse_numbers(line);
            if (!numbers.contains("step"))
                throw std::runtime_error("\"step\" is missing");
        } catch (const std::runtime_error &error) {
            const std::string place = lines.place();
            // A run that still writes, or was killed, ends in a part of a line.
            if (std::string rest; !lines.next(rest) && log.steps > 0)
                break;
            throw Failure(exit_file, place + ": " + error.what());
        }
        const double step = numbers["step"];
        log.steps = std::max(log.steps, step);
        for (const auto &[name, value] : numbers)
            if (std::isfinite(value))
                log.values[name].emplace_back(step, value);
        if (numbers.contains("ns"))
            log.seconds += numbers["ns"] * 1e-9;
        if (numbers.contains("tokens"))
            log.tokens += numbers["tokens"];
    }
    if (log.values.empty())
        throw Failure(exit_file, path + ": no step is logged");
    return log;
}

// The shortest ends of the paths that tell them apart; log.jsonl alone says nothing.
std::vector<std::string> names_of(const std::vector<std::string> &paths) {
    std::vector<std::string> names;
    for (const std::string &path : paths) {
        const fs::path whole = fs::absolute(path).lexically_normal();
        names.push_back(whole.filename() == "log.jsonl" ? whole.parent_path().filename().string()
                                                        : whole.filename().string());
    }
    for (size_t i = 0; i < names.size(); ++i)
        if (std::count(names.begin(), names.end(), names[i]) > 1)
            for (size_t j = names.size(); j-- > i;)
                if (names[j] == names[i])
                    names[j] = paths[j];
    return names;
}

const Points &points_of(const Log &log, const std::string &field) {
    static const Points none;
    const auto found = log.values.find(field);
    return found == log.values.end() ? none : found->second;
}

struct Chart {
    const char *field, *title;
    Scale scale;
    bool smooth; // with the values themselves behind it
};
constexpr Chart charts[] = {
    {"cost", "Update rate: inner steps a chunk", Scale::linear, true},
    {"inner_rate", "Inner step size (geometric mean)", Scale::logarithmic, false},
    {"learning_rate", "Learning rate", Scale::linear, false},
    {"gradient_norm", "Gradient norm before clipping", Scale::logarithmic, true},
    {"tokens_per_second", "Tokens per second", Scale::linear, true},
    {"loss_first", "Loss of first chunks, before any inner step (nats/token)", Scale::linear, true},
    {"reconstruction", "Reconstruction loss", Scale::linear, true},
    {"temperature", "Temperature of the gate", Scale::linear, false},
    {"valid_cost", "Inner steps a chunk, on held-out packages", Scale::linear, false},
};

constexpr size_t most_points = 600;

void add_curves(std::vector<Curve> &curves, const Log &log, size_t colour, const Points &points,
                bool smooth) {
    if (smooth && points.size() > 20) {
        curves.push_back({log.name, colour, Curve::Look::faint, thinned(points, most_points)});
        const Points mean = smoothed(points, points.size() / 25 | 1);
        curves.push_back({log.name, colour, Curve::Look::line, thinned(mean, most_points)});
    } else if (!points.empty()) {
        curves.push_back({log.name, colour, Curve::Look::line, thinned(points, most_points)});
    }
}

std::string chart_html(const std::string &title, const std::vector<Curve> &curves, Scale scale) {
    const std::string svg = line_chart(title, curves, scale);
    return svg.empty() ? "" : "<div><h2>" + html_escape(title) + "</h2>\n" + svg + "</div>\n";
}

std::string loss_html(const std::vector<Log> &logs) {
    std::vector<Curve> curves;
    for (size_t i = 0; i < logs.size(); ++i) {
        add_curves(curves, logs[i], i, points_of(logs[i], "loss"), true);
        const Points &valid = points_of(logs[i], "valid_loss");
        if (!valid.empty())
            curves.push_back({logs[i].name + ", held out", i, Curve::Look::dots, valid});
    }
    return chart_html("Loss (nats/token)", curves, Scale::linear);
}

std::string number(const char *pattern, double value) {
    return std::isfinite(value) ? format("%.*f", pattern[0] - '0', value) : "&ndash;";
}

std::string table_html(const std::vector<Log> &logs) {
    std::string html = "<table><tr><th>run</th><th>steps</th><th>loss, last tenth</th>"
                       "<th>held out, last</th><th>best</th><th>at step</th><th>tokens</th>"
                       "<th>time in steps</th><th>tokens/s</th></tr>\n";
    for (size_t i = 0; i < logs.size(); ++i) {
        const Log &log = logs[i];
        const Points &loss = points_of(log, "loss"), &valid = points_of(log, "valid_loss");
        double sum = 0, count = 0;
        for (const auto &[step, value] : loss)
            if (step > 0.9 * log.steps)
                sum += value, count += 1;
        const auto best =
            std::min_element(valid.begin(), valid.end(),
                             [](const auto &a, const auto &b) { return a.second < b.second; });
        html += format("<tr><td><b class=k%zu>&#9644;</b> %s</td>", i % 8,
                       html_escape(valid_utf8(log.name)).c_str());
        html += "<td>" + with_commas(uint64_t(log.steps)) + "</td>";
        html += "<td>" + number("4", sum / count) + "</td>";
        html += "<td>" + number("4", valid.empty() ? NAN : valid.back().second) + "</td>";
        html += "<td>" + number("4", valid.empty() ? NAN : best->second) + "</td>";
        html += "<td>" + number("0", valid.empty() ? NAN : best->first) + "</td>";
        html += "<td>" + with_commas(uint64_t(log.tokens)) + "</td>";
        html += "<td>" + duration_text(log.seconds) + "</td>";
        const double speed = log.seconds > 0 ? log.tokens / log.seconds : 0;
        html += "<td>" + with_commas(uint64_t(speed)) + "</td></tr>\n";
    }
    return html + "</table>\n";
}

std::string page(const std::vector<Log> &logs) {
    std::string html = "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>"
                       "<meta name=viewport content=\"width=device-width,initial-scale=1\">"
                       "<title>ponder report</title><style>";
    html += page_style;
    html += curve_style;
    html += "</style></head><body>\n<h1>Training</h1>\n" + table_html(logs);
    html += "<div class=key><span>&mdash; training batches, moving average (faint: every step)"
            "</span><span>- &#9679; - held-out packages</span><span>across: steps</span></div>\n"
            "<div class=charts>\n";
    html += loss_html(logs);
    for (const Chart &chart : charts) {
        std::vector<Curve> curves;
        for (size_t i = 0; i < logs.size(); ++i)
            add_curves(curves, logs[i], i, points_of(logs[i], chart.field), chart.smooth);
        html += chart_html(chart.title, curves, chart.scale);
    }
    return html + "</div></body></html>\n";
}

} // namespace

int report_command(const Settings &settings) {
    const std::vector<std::string> names = names_of(settings.logs);
    std::vector<Log> logs;
    for (size_t i = 0; i < settings.logs.size(); ++i) {
        logs.push_back(read_log(settings.logs[i]));
        logs.back().name = names[i];
    }
    write_file(settings.html, page(logs));
    note(settings.quiet, "wrote " + settings.html);
    return exit_ok;
}

} // namespace tool
