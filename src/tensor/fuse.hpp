// Calls of a recorded graph that a device can do in one.
#pragma once

#include "tensor/graph.hpp"

#include <functional>
#include <vector>

namespace ponder {

// Joins calls where `has` says that the device has a kernel for the joined one. What is computed
// stays the same; values in between may be gone. segment_ends as in program.hpp.
void fuse(Graph &graph, std::vector<size_t> &segment_ends,
          const std::function<bool(const Call &)> &has);

} // namespace ponder
