// Every op of the list has its planner here. See src/tensor/ops.hpp for what they compute.
#pragma once

#include "kernel.hpp"

namespace ponder::cuda {

// clang-format off
int32_t plan_embedding(const Call &), plan_embedding_at(const Call &),
        plan_embedding_vjp(const Call &);
int32_t plan_layer_norm(const Call &), plan_layer_norm_gated(const Call &), plan_layer_norm_vjp(const Call &),
        plan_layer_norm_vjp_weight(const Call &);
int32_t plan_linear(const Call &), plan_linear_gelu(const Call &), plan_linear_group(const Call &),
        plan_matmul(const Call &), plan_matmul_tn(const Call &),
        plan_matmul_tn_sum(const Call &), plan_matmul_tn_group(const Call &);
int32_t plan_lora_linear(const Call &), plan_lora_linear_vjp(const Call &),
        plan_lora_linear_gelu(const Call &), plan_lora_linear_vjp_gelu(const Call &), plan_lora_linear_vjp_narrow(const Call &);
int32_t plan_gelu(const Call &), plan_gelu_vjp(const Call &), plan_gelu_derivative(const Call &);
int32_t plan_sigmoid(const Call &), plan_affine(const Call &), plan_power(const Call &),
        plan_exp(const Call &), plan_relu(const Call &), plan_step(const Call &),
        plan_reshape(const Call &), plan_dropout(const Call &), plan_fill(const Call &);
int32_t plan_slice_rows(const Call &), plan_slice_rows_vjp(const Call &);
int32_t plan_cross_entropy(const Call &), plan_cross_entropy_vjp(const Call &),
        plan_cross_entropy_vjp_table(const Call &), plan_cross_entropy_parts(const Call &),
        plan_cross_entropy_parts_vjp(const Call &);
int32_t plan_attention(const Call &), plan_attention_vjp(const Call &),
        plan_attention_cached(const Call &), plan_keep_rows(const Call &);
int32_t plan_conv1d(const Call &), plan_conv1d_rope(const Call &), plan_conv1d_vjp(const Call &),
        plan_rope(const Call &);
int32_t plan_ttt_linear(const Call &), plan_ttt_mlp(const Call &), plan_ttt_linear_vjp(const Call &),
        plan_ttt_mlp_vjp(const Call &);
int32_t plan_mean(const Call &), plan_mean_vjp(const Call &), plan_norm(const Call &);
int32_t plan_gate(const Call &), plan_commit(const Call &);
int32_t plan_adam(const Call &), plan_sgd(const Call &), plan_adamw(const Call &),
        plan_adam_vjp(const Call &), plan_sgd_vjp(const Call &);
int32_t plan_add(const Call &), plan_sub(const Call &), plan_mul(const Call &),
        plan_broadcast(const Call &), plan_sum_to(const Call &);
int32_t plan_softmax(const Call &), plan_log_sum_exp(const Call &), plan_sum_last(const Call &);
int32_t plan_pick(const Call &), plan_pick_vjp(const Call &);
int32_t plan_split_heads(const Call &), plan_merge_heads(const Call &);
// clang-format on

} // namespace ponder::cuda
