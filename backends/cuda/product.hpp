// Matrix products through cuBLASLt: row-major, batched, with bias and an addend. bf16 operands
// accumulate in f32. Large products of f32 operands run on tensor cores as well: each operand is
// split into two bf16 numbers, and of the four products of halves all but the smallest are summed,
// so that an element is off by about 1e-6 of its terms. Small ones stay f32 throughout. TF32 only
// where it was asked for.
#pragma once

#include "blas.hpp"
#include "product_kernels.hpp"

#include <algorithm>
#include <map>
#include <memory>

namespace ponder::cuda {

// A product whose algorithm is chosen; shared by calls of one shape.
class Product {
public:
    Product(ponder_device *device, const ProductShape &shape);
    ~Product();
    Product(const Product &) = delete;
    bool fast() const { return aligned_.found; } // else a plain kernel computes it
    size_t workspace() const { return std::max(aligned_.workspace, any_.workspace); }
    // add may be c.
    void run(const Run &run, const void *a, const void *b, void *c, const void *bias = nullptr,
             const void *add = nullptr, std::byte *workspace = nullptr, void *kept = nullptr) const;

private:
    struct Choice {
        cublasLtMatmulAlgo_t algorithm{};
        size_t workspace = 0;
        bool found = false;
    };
    Choice choose(ponder_device *device, uint32_t alignment, bool tune) const;
    cublasStatus_t queue(const Choice &choice, ponder_device *device, const void *a, const void *b,
                         void *c, const void *bias, const void *add, std::byte *workspace,
                         void *kept = nullptr) const;

    ProductShape shape_;
    cublasLtMatmulDesc_t operation_ = nullptr;
    cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, c_ = nullptr;
    Choice aligned_, any_; // for addresses that are multiples of 16, and for others
};

class Products {
public:
    explicit Products(ponder_device *device) : device_(device) {}
    std::shared_ptr<const Product> get(const ProductShape &shape);

private:
    ponder_device *device_;
    std::map<ProductShape, std::shared_ptr<const Product>> known_;
};

// A product of tensors of any float types: operands of two types become bf16, a result that the
// library cannot write directly is converted. What it needs comes out of one workspace.
class TypedProduct {
public:
    // shape.operands is set here. An addend is f32, or of the result's type if `same` is true.
    TypedProduct(const Call &call, ProductShape shape, int32_t a, int32_t b, int64_t count_a,
                 int64_t count_b, bool same = false);
    bool fast() const { return product_->fast(); }
    int32_t result() const { return result_; } // as the library writes it: the bias's type
    size_t workspace() const { return at_product_ + product_->workspace(); }
    void run(const Run &run, const void *a, const void *b, void *c, const void *bias = nullptr,
             const void *add = nullptr) const;

private:
    std::shared_ptr<const Product> product_;
    int32_t result_;
    ProductShape shape_; // before operands were split
    bool narrow_a_, narrow_b_, narrow_c_, split_;
    int64_t count_a_, count_b_, count_c_;
    size_t at_b_, at_c_, at_product_;
};

} // namespace ponder::cuda
