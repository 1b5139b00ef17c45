// Command line -> Settings. The only place that knows CLI11.
#pragma once

#include "settings.hpp"

#include <optional>

namespace tool {

// Nothing: help or version was asked for and printed. Throws Failure(exit_usage).
std::optional<Settings> parse_command_line(int argc, char **argv);

} // namespace tool
