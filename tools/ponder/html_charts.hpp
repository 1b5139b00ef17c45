// The two charts of the page, as inline SVG.
#pragma once

#include "run_result.hpp"

namespace tool {

std::string html_escape(std::string_view text);
std::string loss_curve(const RunResult &run);
std::string chunk_bars(const RunResult &run);

} // namespace tool
