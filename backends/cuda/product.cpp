#include "product.hpp"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace ponder::cuda {

namespace {

constexpr size_t workspace_limit = size_t(32) << 20; // what NVIDIA recommends for Hopper

cudaDataType_t type_of(int32_t dtype) {
    return dtype == PONDER_DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

void set_batch(cublasLtMatrixLayout_t layout, int64_t count, int64_t stride) {
    const int32_t batch = int32_t(count);
    blas().MatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
                                    sizeof batch);
    blas().MatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                    sizeof stride);
}

size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

template <class T>
T of(const cublasLtMatmulAlgo_t &algorithm, cublasLtMatmulAlgoConfigAttributes_t which) {
    T value{};
    size_t written = 0;
    blas().MatmulAlgoConfigGetAttribute(&algorithm, which, &value, sizeof value, &written);
    return value;
}

// The library's kernels for clusters of 2 x 4 blocks (nvjet_sm90_*_2x4_*, cuBLAS 13.0) stop with
// an illegal instruction, an arrival at the barrier of another block of the cluster, once in a
// minute or two where processes take turns on a GPU; those of other clusters did not. They come
// last, after everything else that the library offers.
bool sound(const cublasLtMatmulAlgo_t &algorithm) {
    return of<uint16_t>(algorithm, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID) !=
           CUBLASLT_CLUSTER_SHAPE_2x4x1;
}

// Where there is much to do, tiles of 128 x 128 in clusters of two are faster on Hopper than the
// larger ones that the library puts first: GPT-2 124M, 16 x 1024 tokens, 8.5 ms for 9.0 on an H200.
bool preferred(const cublasLtMatmulHeuristicResult_t &result) {
    constexpr float waves = 4;
    return result.wavesCount >= waves &&
           of<uint32_t>(result.algo, CUBLASLT_ALGO_CONFIG_TILE_ID) ==
               CUBLASLT_MATMUL_TILE_128x128 &&
           of<uint32_t>(result.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1 &&
           of<uint16_t>(result.algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID) ==
               CUBLASLT_CLUSTER_SHAPE_2x1x1;
}

} // namespace

// The library is column-major: it computes c^T = op(b)^T op(a)^T, so a and b change places. A bias
// along its rows is then one along ours, which are c's columns.
Product::Product(ponder_device *device, const ProductShape &shape) : shape_(shape) {
    const ProductShape &s = shape_;
    const auto compute = s.operands == PONDER_DTYPE_F32 && device->tf32
                             ? CUBLAS_COMPUTE_32F_FAST_TF32
                             : CUBLAS_COMPUTE_32F;
    if (blas().MatmulDescCreate(&operation_, compute, CUDA_R_32F) != CUBLAS_STATUS_SUCCESS)
        return;
    const auto set = [&](cublasLtMatmulDescAttributes_t which, const auto &value) {
        blas().MatmulDescSetAttribute(operation_, which, &value, sizeof value);
    };
    const cublasOperation_t first = s.tb ? CUBLAS_OP_T : CUBLAS_OP_N,
                            second = s.ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    set(CUBLASLT_MATMUL_DESC_TRANSA, first);
    set(CUBLASLT_MATMUL_DESC_TRANSB, second);
    if (s.bias || s.gelu) {
        const cublasLtEpilogue_t epilogue =
            !s.gelu  ? CUBLASLT_EPILOGUE_BIAS
            : s.keep ? (s.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX)
                     : (s.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU);
        const cudaDataType_t type = type_of(s.result);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        if (s.bias)
            set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type);
        if (s.keep) {
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, s.n);
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, type);
        }
    }
    const auto layout = [&](cublasLtMatrixLayout_t &to, int32_t dtype, int64_t rows,
                            int64_t columns, int64_t ld, int64_t stride) {
        blas().MatrixLayoutCreate(&to, type_of(dtype), uint64_t(columns), uint64_t(rows),
                                  ld ? ld : columns);
        if (s.batch > 1)
            set_batch(to, s.batch, stride);
    };
    layout(a_, s.operands, s.ta ? s.k : s.m, s.ta ? s.m : s.k, s.lda, s.stride_a);
    layout(b_, s.operands, s.tb ? s.n : s.k, s.tb ? s.k : s.n, s.ldb, s.stride_b);
    layout(c_, s.result, s.m, s.n, s.ldc, s.stride_c);
    const char *tune = std::getenv("PONDER_CUDA_TUNE");
    aligned_ = choose(device, 16, tune && tune[0] == '1');
    any_ = choose(device, uint32_t(std::min(size_of(s.operands), size_of(s.result))), false);
}

Product::~Product() {
    for (cublasLtMatrixLayout_t layout : {a_, b_, c_})
        if (layout)
            blas().MatrixLayoutDestroy(layout);
    if (operation_)
        blas().MatmulDescDestroy(operation_);
}

// The library's first choice, but for the two rules above. Timing its first few instead can be
// faster by some percent, but then the order of sums differs from process to process: by request
// only.
Product::Choice Product::choose(ponder_device *device, uint32_t alignment, bool tune) const {
    Choice choice;
    cublasLtMatmulPreference_t preference;
    if (blas().MatmulPreferenceCreate(&preference) != CUBLAS_STATUS_SUCCESS)
        return choice;
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, const auto &value) {
        blas().MatmulPreferenceSetAttribute(preference, which, &value, sizeof value);
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_limit);
    for (const auto which :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        prefer(which, alignment);
    constexpr int most = 8;
    cublasLtMatmulHeuristicResult_t results[most];
    int count = 0;
    const cublasStatus_t status = blas().MatmulAlgoGetHeuristic(
        device->blas, operation_, b_, a_, c_, c_, preference, most, results, &count);
    blas().MatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS || count == 0)
        return choice;
    const auto *const end = std::stable_partition(
        results, results + count, [](const auto &result) { return sound(result.algo); });
    if (end != results)
        count = int(end - results);
    const auto *const best_known = std::find_if(results, results + count, preferred);
    const auto &first = best_known == results + count ? results[0] : *best_known;
    choice = {first.algo, first.workspaceSize, true};
    if (!tune || count == 1)
        return choice;

    const ProductShape &s = shape_;
    const auto extent = [&](int64_t rows, int64_t columns, int64_t ld, int64_t stride) {
        return size_t((s.batch - 1) * stride + rows * (ld ? ld : columns));
    };
    const size_t bytes_a = round_up(extent(s.ta ? s.k : s.m, s.ta ? s.m : s.k, s.lda, s.stride_a) *
                                    size_of(s.operands)),
                 bytes_b = round_up(extent(s.tb ? s.n : s.k, s.tb ? s.k : s.n, s.ldb, s.stride_b) *
                                    size_of(s.operands)),
                 bytes_c = round_up(extent(s.m, s.n, s.ldc, s.stride_c) * size_of(s.result)),
                 bytes_bias = round_up(size_t(s.n) * size_of(s.result));
    size_t workspace = 0;
    for (int i = 0; i < count; ++i)
        workspace = std::max(workspace, results[i].workspaceSize);
    void *block = nullptr;
    const size_t operands = bytes_a + bytes_b + bytes_c + bytes_bias;
    if (cudaMallocFromPoolAsync(&block, operands + workspace, device->pool, device->stream) !=
        cudaSuccess) {
        cudaGetLastError();
        return choice;
    }
    cudaMemsetAsync(block, 0x3c, operands, device->stream);
    std::byte *const a = static_cast<std::byte *>(block), *const b = a + bytes_a,
                     *const c = b + bytes_b, *const bias = c + bytes_c,
                     *const scratch = bias + bytes_bias;
    cudaEvent_t start, stop;
    cudaEventCreate(&start);
    cudaEventCreate(&stop);
    const double flops = 2.0 * double(s.m) * double(s.n) * double(s.k) * double(s.batch);
    const int repeat = flops > 2e11 ? 2 : flops > 2e10 ? 5 : 20;
    float best = 0;
    for (int i = 0; i < count; ++i) {
        const Choice candidate{results[i].algo, results[i].workspaceSize, true};
        bool works = true;
        for (int r = 0; r < repeat + 1; ++r) {
            if (r == 1)
                cudaEventRecord(start, device->stream); // the first one warms up
            works = works &&
                    queue(candidate, device, a, b, c, bias, c, scratch, c) == CUBLAS_STATUS_SUCCESS;
        }
        cudaEventRecord(stop, device->stream);
        float ms = 0;
        if (cudaEventSynchronize(stop) != cudaSuccess || !works)
            continue;
        cudaEventElapsedTime(&ms, start, stop);
        if (best == 0 || ms < best * 0.98f) {
            best = ms;
            choice = candidate;
        }
    }
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    cudaFreeAsync(block, device->stream);
    return choice;
}

cublasStatus_t Product::queue(const Choice &choice, ponder_device *device, const void *a,
                              const void *b, void *c, const void *bias, const void *add,
                              std::byte *workspace, void *kept) const {
    if (shape_.keep)
        blas().MatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &kept,
                                      sizeof kept);
    if (shape_.bias)
        blas().MatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                      sizeof bias);
    const float one = 1, beta = shape_.add ? 1 : 0;
    return blas().Matmul(device->blas, operation_, &one, b, b_, a, a_, &beta, shape_.add ? add : c,
                         c_, c, c_, &choice.algorithm, workspace, choice.workspace, device->stream);
}

void Product::run(const Run &run, const void *a, const void *b, void *c, const void *bias,
                  const void *add, std::byte *workspace, void *kept) const {
    const bool multiples = ponder::cuda::aligned(a, 16) && ponder::cuda::aligned(b, 16) &&
                           ponder::cuda::aligned(c, 16) &&
                           (!shape_.add || ponder::cuda::aligned(add, 16));
    if (multiples && few_fit(shape_))
        return few_product(run, shape_, a, b, c, bias, add, kept);
    const Choice &choice = multiples ? aligned_ : any_;
    if (!choice.found && (shape_.gelu || shape_.keep))
        return run.device->fail("product: addresses have to be multiples of 16");
    if (!choice.found)
        return plain_product(shape_, a, b, c, bias, add, run.stream);
    const cublasStatus_t status =
        queue(choice, run.device, a, b, c, bias, add, workspace ? workspace : run.workspace, kept);
    if (status != CUBLAS_STATUS_SUCCESS)
        run.device->fail((std::string("cublasLtMatmul: ") + blas().GetStatusName(status)).c_str());
}

std::shared_ptr<const Product> Products::get(const ProductShape &shape) {
    std::shared_ptr<const Product> &entry = known_[shape];
    if (!entry)
        entry = std::make_shared<const Product>(device_, shape);
    return entry;
}

TypedProduct::TypedProduct(const Call &call, ProductShape shape, int32_t a, int32_t b,
                           int64_t count_a, int64_t count_b, bool same) {
    const bool narrow = a == PONDER_DTYPE_BF16 || b == PONDER_DTYPE_BF16;
    constexpr int64_t worth_splitting = int64_t(1) << 25; // multiply-adds
    shape_ = shape;
    split_ = !narrow && !call.device->tf32 && shape.batch == 1 && shape.lda == 0 &&
             shape.ldb == 0 && shape.m % 8 == 0 && shape.n % 8 == 0 && shape.k % 8 == 0 &&
             shape.m * shape.n * shape.k >= worth_splitting;
    if (split_) {
        shape.k *= 3;
        count_a *= 3;
        count_b *= 3;
    }
    shape.operands = narrow || split_ ? PONDER_DTYPE_BF16 : PONDER_DTYPE_F32;
    narrow_a_ = narrow && a != PONDER_DTYPE_BF16;
    narrow_b_ = narrow && b != PONDER_DTYPE_BF16;
    // f32 operands have no bf16 result in the library, and there an addend is of its type.
    narrow_c_ = (shape.operands == PONDER_DTYPE_F32 || (shape.add && !same)) &&
                shape.result == PONDER_DTYPE_BF16;
    if (narrow_c_)
        shape.result = PONDER_DTYPE_F32;
    result_ = shape.result;
    count_c_ = shape.batch > 1 ? shape.batch * shape.stride_c : shape.m * shape.n;
    at_b_ = narrow_a_ || split_ ? round_up(size_t(count_a) * 2) : 0;
    at_c_ = at_b_ + (narrow_b_ || split_ ? round_up(size_t(count_b) * 2) : 0);
    at_product_ = at_c_ + (narrow_c_ ? round_up(size_t(count_c_) * 4) : 0);
    count_a_ = count_a;
    count_b_ = count_b;
    product_ = call.device->products().get(shape);
}

void TypedProduct::run(const Run &run, const void *a, const void *b, void *c, const void *bias,
                       const void *add) const {
    if (split_) {
        const ProductShape &s = shape_;
        bf16 *const to_a = reinterpret_cast<bf16 *>(run.workspace), *const to_b =
                                                                        reinterpret_cast<bf16 *>(
                                                                            run.workspace + at_b_);
        ponder::cuda::split(static_cast<const float *>(a), to_a, s.ta ? s.k : s.m, s.ta ? s.m : s.k,
                            s.ta, false, run.stream);
        ponder::cuda::split(static_cast<const float *>(b), to_b, s.tb ? s.n : s.k, s.tb ? s.k : s.n,
                            !s.tb, true, run.stream);
        a = to_a;
        b = to_b;
    }
    if (narrow_a_) {
        bf16 *to = reinterpret_cast<bf16 *>(run.workspace);
        convert(run, static_cast<const float *>(a), to, count_a_);
        a = to;
    }
    if (narrow_b_) {
        bf16 *to = reinterpret_cast<bf16 *>(run.workspace + at_b_);
        convert(run, static_cast<const float *>(b), to, count_b_);
        b = to;
    }
    void *to = narrow_c_ ? run.workspace + at_c_ : c;
    product_->run(run, a, b, to, bias, add, run.workspace + at_product_);
    if (narrow_c_)
        convert(run, static_cast<const float *>(to), static_cast<bf16 *>(c), count_c_);
}

} // namespace ponder::cuda
