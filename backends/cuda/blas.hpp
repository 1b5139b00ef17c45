// cuBLASLt, opened with the first device: its library is half a gigabyte, and a program that has no
// use for a device should not map it.
#pragma once

#include <cublasLt.h>

namespace ponder::cuda {

#define PONDER_CUBLASLT(each)                                                                      \
    each(Create) each(Destroy) each(GetStatusName) each(Matmul) each(MatmulAlgoGetHeuristic)       \
    each(MatmulAlgoConfigGetAttribute)                                                             \
    each(MatmulDescCreate) each(MatmulDescDestroy) each(MatmulDescSetAttribute)                    \
    each(MatrixLayoutCreate) each(MatrixLayoutDestroy) each(MatrixLayoutSetAttribute)              \
    each(MatmulPreferenceCreate) each(MatmulPreferenceDestroy) each(MatmulPreferenceSetAttribute)

struct Blas {
#define PONDER_MEMBER(name) decltype(&cublasLt##name) name = nullptr;
    PONDER_CUBLASLT(PONDER_MEMBER)
#undef PONDER_MEMBER
    const char *problem = nullptr; // why it is not usable
};

// Opened at the first call and for good. By its name, so that the loader's paths count, then in the
// folders that the build was told of.
const Blas &blas();

} // namespace ponder::cuda
