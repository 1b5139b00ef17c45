// Generated text in pieces that can be shown at once: whole UTF-8 characters, and nothing that may
// turn out to be the beginning of a stop string.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ponder {

class TextPieces {
public:
    explicit TextPieces(std::vector<std::string> stops) : stops_(std::move(stops)) {}
    // What is certain after these bytes. After a stop string nothing follows.
    std::string add(std::string_view bytes);
    // What was held back.
    std::string finish();
    int stopped() const { return stopped_; } // index of the stop string found, -1

private:
    std::vector<std::string> stops_;
    std::string held_;
    int stopped_ = -1;
};

} // namespace ponder
