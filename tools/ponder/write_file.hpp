// Writes a file as a whole or not at all.
#pragma once

#include <string>
#include <string_view>

namespace tool {

void write_file(const std::string &path, std::string_view text); // throws Failure(exit_file)

} // namespace tool
