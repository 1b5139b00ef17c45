// Copies of model folders with other storage.
#pragma once

#include "base/memory.hpp"

#include <functional>
#include <memory>
#include <string>

namespace ponder {

// A copy of the folder with int8 weights, its tokenizer and the adapter that lies in it. The source
// may be plain only, `out` may hold no weights. Weights come last and each file is replaced
// atomically: a folder with weights is complete.
void convert_to_int8(const std::string &folder, const std::string &out,
                     std::shared_ptr<Memory> memory,
                     const std::function<void(uint64_t done, uint64_t total)> &progress);

} // namespace ponder
