// What a session will need, from headers and shapes alone.
#pragma once

#include "base/options.hpp"
#include "session/runtime.hpp"

namespace ponder {

ponder_memory_plan plan_memory(const Runtime &runtime, const std::string &folder,
                               const std::string &backend, const std::string &dtype,
                               const std::string &weights, const Options &options);

} // namespace ponder
