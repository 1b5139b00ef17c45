#include "blas.hpp"

#include "library.hpp"

#include <dlfcn.h>
#include <string>

namespace ponder::cuda {

namespace {

Blas load() {
    Blas blas;
    void *library =
        open_library(("libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR)).c_str());
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
