// An op as the reference backend knows it: a signature to check calls by, and two kernels.
//
// A signature is written as in src/tensor/ops.hpp: "x[S,T,C] g[C] add?:w[S,T,C] -> y[S,T,C]".
// `?` may be absent, `??` even left out at the end of the inputs; after a colon i means i32, w wide
// (f32 or f64), q any float type or i8, s the scales of that i8, [1,N] or [M,1] for
// q[M,N] and absent without one; the rest is any float type. A letter stands for one size in the
// whole call, "3C" for three times it; [...] is any shape, of the same number of elements wherever
// it occurs; [*] is any shape at all, left to check_shapes.
#pragma once

#include "ponder/backend.h"

#include <cstddef>
#include <cstdint>

namespace ponder::reference {

constexpr size_t max_tensors = 32, max_attrs = 8;

struct Sizes {
    int64_t of[128] = {};
    int64_t operator[](char letter) const { return of[size_t(letter) & 127]; }
    int64_t &operator[](char letter) { return of[size_t(letter) & 127]; }
};

template <class T> class Args;

struct Op {
    const char *name;
    const char *signature;
    uint32_t n_attr;
    void (*f32)(Args<float> &);
    void (*f64)(Args<double> &);
    // What a signature cannot say; nullptr when all is well, else the rule that is broken.
    const char *(*check)(const Sizes &, const double *attr) = nullptr;
    // The same for [*]: the call's tensors, inputs first.
    const char *(*check_shapes)(const ponder_tensor *, const double *attr) = nullptr;
    // How many attributes at the end may be left out; they are 0 then.
    uint32_t n_attr_optional = 0;
};

struct Planned {
    const Op *op;
    bool f64;
    uint32_t n_in, n_out;
    ponder_tensor tensor[max_tensors];
    double attr[max_attrs];
    Sizes sizes;
};

// In the order of src/tensor/ops.hpp.
extern const Op embedding_op, embedding_at_op, layer_norm_op, layer_norm_vjp_op, linear_op,
    lora_linear_op, lora_linear_vjp_op, gelu_op, gelu_vjp_op, sigmoid_op, slice_rows_op,
    slice_rows_vjp_op, cross_entropy_op, cross_entropy_vjp_op, attention_op, attention_vjp_op,
    attention_cached_op, keep_rows_op, conv1d_op, rope_op, ttt_linear_op, ttt_mlp_op, mean_op,
    mean_vjp_op, fill_op, matmul_tn_op, norm_op, adam_op, sgd_op, adam_vjp_op, sgd_vjp_op, adamw_op,
    gate_op, commit_op, embedding_vjp_op, layer_norm_vjp_weight_op, matmul_tn_sum_op, cross_entropy_vjp_table_op,
    dropout_op, conv1d_vjp_op, ttt_linear_vjp_op, ttt_mlp_vjp_op, add_op, sub_op, mul_op, broadcast_op, affine_op,
    power_op, exp_op, relu_op, step_op, gelu_derivative_op, softmax_op, log_sum_exp_op, sum_last_op,
    pick_op, pick_vjp_op, sum_to_op, matmul_op, reshape_op, split_heads_op, merge_heads_op;

} // namespace ponder::reference
