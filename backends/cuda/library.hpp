// Libraries that are opened when they are first used, so that the module loads without them.
#pragma once

namespace ponder::cuda {

// `name` wherever the system finds it, or in the folders that the build knew. NULL: not there.
void *open_library(const char *name);

} // namespace ponder::cuda
