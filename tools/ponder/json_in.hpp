// One line of a stream file -> a document. The only place that knows nlohmann/json.
#pragma once

#include <string>
#include <string_view>

namespace tool {

struct Document {
    std::string package, path, text;
};

// Throws std::runtime_error that says what is wrong with the line.
Document parse_document(std::string_view line);

} // namespace tool
