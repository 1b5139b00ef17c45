// The op table of one instruction set.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr Op ops[] = {
    {"embedding", plan_embedding},
    {"embedding_at", plan_embedding_at},
    {"layer_norm", plan_layer_norm},
    {"layer_norm_vjp", plan_layer_norm_vjp},
    {"linear", plan_linear},
    {"lora_linear", plan_lora_linear},
    {"lora_linear_vjp", plan_lora_linear_vjp},
    {"gelu", plan_gelu},
    {"gelu_vjp", plan_gelu_vjp},
    {"add", plan_add},
    {"mul", plan_mul},
    {"sigmoid", plan_sigmoid},
    {"slice_rows", plan_slice_rows},
    {"slice_rows_vjp", plan_slice_rows_vjp},
    {"cross_entropy", plan_cross_entropy},
    {"cross_entropy_vjp", plan_cross_entropy_vjp},
    {"attention", plan_attention},
    {"attention_vjp", plan_attention_vjp},
    {"attention_cached", plan_attention_cached},
    {"conv1d", plan_conv1d},
    {"rope", plan_rope},
    {"ttt_linear", plan_ttt_linear},
    {"mean", plan_mean},
    {"mean_vjp", plan_mean_vjp},
    {"fill", plan_fill},
    {"matmul_tn", plan_matmul_tn},
    {"norm", plan_norm},
    {"adam", plan_adam},
    {"sgd", plan_sgd},
    {"adamw", plan_adamw},
    {"adam_vjp", plan_adam_vjp},
    {"sgd_vjp", plan_sgd_vjp},
    {"conv1d_vjp", plan_conv1d_vjp},
    {"ttt_linear_vjp", plan_ttt_linear_vjp},
    {"matmul_tn_sum", plan_matmul_tn_sum},
    {"cross_entropy_vjp_table", plan_cross_entropy_vjp_table},
    {"layer_norm_vjp_weight", plan_layer_norm_vjp_weight},
    {"sum_to", plan_sum_to},
    {"sum_last", plan_sum_last},
    {"embedding_vjp", plan_embedding_vjp},
    {"dropout", plan_dropout},
    {"sub", plan_sub},
    {"broadcast", plan_broadcast},
    {"affine", plan_affine},
    {"power", plan_power},
    {"exp", plan_exp},
    {"relu", plan_relu},
    {"step", plan_step},
    {"gelu_derivative", plan_gelu_derivative},
    {"softmax", plan_softmax},
    {"log_sum_exp", plan_log_sum_exp},
    {"pick", plan_pick},
    {"pick_vjp", plan_pick_vjp},
    {"matmul", plan_matmul},
    {"reshape", plan_reshape},
    {"split_heads", plan_split_heads},
    {"merge_heads", plan_merge_heads},
};

} // namespace

extern const Isa isa;
constexpr Isa isa = {PONDER_TEXT(PONDER_ISA), ops, int32_t(sizeof ops / sizeof ops[0])};

} // namespace ponder::cpu::PONDER_ISA
