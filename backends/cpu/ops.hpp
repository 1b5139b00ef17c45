// The plan functions, one or two a file; isa.cpp lists them.
#pragma once

#include "kernel.hpp"

namespace ponder::cpu::PONDER_ISA {

int32_t plan_embedding(const Call &c);
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

} // namespace ponder::cpu::PONDER_ISA
