// `ponder train backbone --new`: a tokenizer trained on the data, then random weights for it.
#pragma once

#include "settings.hpp"

#include <ponder/ponder.h>

#include <string>

namespace tool {

// Makes the folder a model's; what a killed process left of it is finished. Throws Failure.
void create_backbone(const std::string &folder, const ponder_options *options,
                     const Settings &settings);

} // namespace tool
