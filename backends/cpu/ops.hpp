// The plan functions, one or two a file; isa.cpp lists them.
#pragma once

#include "kernel.hpp"

namespace ponder::cpu::PONDER_ISA {

int32_t plan_embedding(const Call &c);
int32_t plan_embedding_at(const Call &c);
int32_t plan_layer_norm(const Call &c);
int32_t plan_layer_norm_vjp(const Call &c);
int32_t plan_linear(const Call &c);
int32_t plan_lora_linear(const Call &c);
int32_t plan_lora_linear_vjp(const Call &c);
int32_t plan_gelu(const Call &c);
int32_t plan_gelu_vjp(const Call &c);
int32_t plan_add(const Call &c);
int32_t plan_mul(const Call &c);
int32_t plan_sigmoid(const Call &c);
int32_t plan_slice_rows(const Call &c);
int32_t plan_slice_rows_vjp(const Call &c);
int32_t plan_cross_entropy(const Call &c);
int32_t plan_cross_entropy_vjp(const Call &c);
int32_t plan_attention(const Call &c);
int32_t plan_attention_vjp(const Call &c);
int32_t plan_attention_cached(const Call &c);
int32_t plan_conv1d(const Call &c);
int32_t plan_rope(const Call &c);
int32_t plan_ttt_linear(const Call &c);
int32_t plan_mean(const Call &c);
int32_t plan_mean_vjp(const Call &c);
int32_t plan_fill(const Call &c);
int32_t plan_matmul_tn(const Call &c);
int32_t plan_norm(const Call &c);
int32_t plan_adam(const Call &c);
int32_t plan_sgd(const Call &c);
int32_t plan_adamw(const Call &c);
int32_t plan_adam_vjp(const Call &c);
int32_t plan_sgd_vjp(const Call &c);
int32_t plan_conv1d_vjp(const Call &c);
int32_t plan_ttt_linear_vjp(const Call &c);
int32_t plan_matmul_tn_sum(const Call &c);
int32_t plan_cross_entropy_vjp_table(const Call &c);
int32_t plan_layer_norm_vjp_weight(const Call &c);
int32_t plan_sum_to(const Call &c);
int32_t plan_sum_last(const Call &c);
int32_t plan_embedding_vjp(const Call &c);
int32_t plan_dropout(const Call &c);
int32_t plan_sub(const Call &c);
int32_t plan_broadcast(const Call &c);
int32_t plan_affine(const Call &c);
int32_t plan_power(const Call &c);
int32_t plan_exp(const Call &c);
int32_t plan_relu(const Call &c);
int32_t plan_step(const Call &c);
int32_t plan_gelu_derivative(const Call &c);
int32_t plan_softmax(const Call &c);
int32_t plan_log_sum_exp(const Call &c);
int32_t plan_pick(const Call &c);
int32_t plan_pick_vjp(const Call &c);
int32_t plan_matmul(const Call &c);
int32_t plan_reshape(const Call &c);
int32_t plan_split_heads(const Call &c);
int32_t plan_merge_heads(const Call &c);

} // namespace ponder::cpu::PONDER_ISA
