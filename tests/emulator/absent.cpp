// What the emulated module has to do without: the driver's library, which is only asked for; graphs;
// cuBLASLt, which has no algorithm here, so that products are the plain ones; and the kernels that
// are written in Hopper's instructions (*_sm90.cu), which take nothing.
#include "attention_sm90.hpp"
#include "blas.hpp"
#include "condition.hpp"
#include "cross_entropy.hpp"
#include "lora_linear.hpp"
#include "product_tiles.hpp"

#include <cstdlib>

extern "C" {
void *dlopen(const char *, int) {
    static int library;
    return &library;
}
int dlclose(void *) { return 0; }
}

namespace ponder::cuda {

const Blas &blas() {
    static const Blas b = [] {
        Blas b;
        b.Create = [](cublasLtHandle_t *) { return CUBLAS_STATUS_SUCCESS; };
        b.Destroy = [](cublasLtHandle_t) { return CUBLAS_STATUS_SUCCESS; };
        b.MatmulDescCreate = [](cublasLtMatmulDesc_t *, cublasComputeType_t, cudaDataType_t) {
            return CUBLAS_STATUS_NOT_SUPPORTED;
        };
        return b;
    }();
    return b;
}

int32_t record_if(ponder_device *, const int32_t *) { return 1; }
int32_t record_end_if(ponder_device *) { return 1; }
void abandon_conditions(ponder_device *) {}

bool head_losses_fit(const ponder_device &, int64_t, int64_t, int64_t) { return false; }
size_t head_losses_workspace(int64_t, int64_t) { return 0; }
void head_losses(const Run &, const bf16 *, const bf16 *, const int32_t *, float *, float *, bf16 *,
                 float *, int64_t, int64_t, int64_t) {
    std::abort();
}

bool attention_fits(const ponder_device &, int64_t, int64_t, int64_t, int64_t) { return false; }
void attention_tiles(const Run &, const bf16 *, bf16 *, float *, int64_t, int64_t, int64_t) {
    std::abort();
}
bool attention_gradients_fit(const ponder_device &, int64_t, int64_t, int64_t, int64_t) {
    return false;
}
void attention_gradients(const Run &, const bf16 *, const float *, const float *, const bf16 *,
                         bf16 *, int64_t, int64_t, int64_t) {
    std::abort();
}

bool lora_tiles_fit(const ponder_device &, int64_t, int64_t, int64_t, int64_t, int64_t) {
    return false;
}
template <bool back, class Y>
void lora_tiles(const Run &, const Prepare<bf16, Y> &, const bf16 *, int64_t, bool,
                const LoraGelu &) {
    std::abort();
}
template void lora_tiles<false>(const Run &, const Prepare<bf16, bf16> &, const bf16 *, int64_t,
                                bool, const LoraGelu &);
template void lora_tiles<false>(const Run &, const Prepare<bf16, float> &, const bf16 *, int64_t,
                                bool, const LoraGelu &);
template void lora_tiles<true>(const Run &, const Prepare<bf16, bf16> &, const bf16 *, int64_t,
                               bool, const LoraGelu &);

bool product_group_fit(const ponder_device &, int64_t, int64_t, int64_t, int64_t) { return false; }
void product_group(const Run &, const ProductGroup &) { std::abort(); }

// Of compute capability 9.
template <bool back, class X, class Y>
void prepare_clusters(const Run &, const Prepare<X, Y> &, int64_t) {
    std::abort();
}
template void prepare_clusters<false>(const Run &, const Prepare<bf16, bf16> &, int64_t);
template void prepare_clusters<false>(const Run &, const Prepare<bf16, float> &, int64_t);
template void prepare_clusters<true>(const Run &, const Prepare<bf16, bf16> &, int64_t);
template void prepare_clusters<true>(const Run &, const Prepare<float, bf16> &, int64_t);

} // namespace ponder::cuda
