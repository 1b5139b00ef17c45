// Lines of stream files and training logs. The only place that knows nlohmann/json.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace tool {

struct Document {
    std::optional<std::string> package;
    std::string path, text;
};

enum class Package { required, optional };
// Throws std::runtime_error that says what is wrong with the line.
Document parse_document(std::string_view line, Package package = Package::required);

// The numbers of a flat object, by name; null is NaN. Throws like parse_document.
std::map<std::string, double> parse_numbers(std::string_view line);

} // namespace tool
