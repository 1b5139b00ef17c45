#include "library.hpp"

#include <algorithm>
#include <dlfcn.h>
#include <string>

namespace ponder::cuda {

void *open_library(const char *name) {
    if (void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL))
        return library;
    std::string folders = PONDER_CUDA_LIBDIRS; // separated by colons
    while (!folders.empty()) {
        const size_t end = std::min(folders.find(':'), folders.size());
        const std::string path = folders.substr(0, end) + "/" + name;
        if (void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL))
            return library;
        folders.erase(0, end + 1);
    }
    return nullptr;
}

} // namespace ponder::cuda
