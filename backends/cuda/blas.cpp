#include "blas.hpp"

#include <algorithm>
#include <dlfcn.h>
#include <string>

namespace ponder::cuda {

namespace {

void *open_library() {
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    if (void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL))
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

Blas load() {
    Blas blas;
    void *library = open_library();
    if (!library) {
        blas.problem = "libcublasLt.so is not found: see LD_LIBRARY_PATH";
        return blas;
    }
#define PONDER_FIND(name)                                                                          \
    blas.name = reinterpret_cast<decltype(blas.name)>(dlsym(library, "cublasLt" #name));           \
    if (!blas.name)                                                                                \
        blas.problem = "libcublasLt.so lacks cublasLt" #name;
    PONDER_CUBLASLT(PONDER_FIND)
#undef PONDER_FIND
    return blas;
}

} // namespace

const Blas &blas() {
    static const Blas loaded = load();
    return loaded;
}

} // namespace ponder::cuda
