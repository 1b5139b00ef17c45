// product_tiles_sm90.cu: products of few rows of bf16 on Hopper.
#pragma once

#include "kernel.hpp"

namespace ponder::cuda {

// Products of the same x in one launch: y_i = x w_i + bias_i or its gelu, and one with a narrow f32
// matrix [depth,rank], or its sigmoid. Every width is a multiple of 128.
constexpr int most_members = 4;
struct GroupMember {
    const bf16 *w; // [depth,width]
    const float *bias;
    void *y;
    int width;
    bool wide; // y is f32, else bf16
    bool gelu;
};
struct ProductGroup {
    const bf16 *x;
    int rows, depth, count;
    GroupMember member[most_members];
    const float *left, *left_bias; // or nothing
    float *narrow;
    int rank;
    bool sigmoid;
};
bool product_group_fit(const ponder_device &device, int64_t rows, int64_t depth, int64_t width,
                       int64_t rank);
void product_group(const Run &run, const ProductGroup &group);

} // namespace ponder::cuda
