// What a caller asks of one stream, and what came of it. See ponder.h.
#pragma once

#include "ponder/ponder.h"
#include "session/sampler.hpp"

#include <functional>
#include <string>
#include <vector>

namespace ponder {

struct Generation {
    std::vector<int32_t> prompt;
    uint64_t max_tokens = 0;
    Sampling sampling;
    std::vector<int32_t> stop_tokens;
    std::vector<std::string> stop_strings;
    bool log_probabilities = false, keep_cache = false;
    // True: stop here. Text may be empty; id -1 comes last, with what was held back.
    std::function<bool(uint64_t index, int32_t id, double log_probability, std::string_view text)>
        token;
};

} // namespace ponder
