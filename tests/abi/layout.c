/* The binary layout of the public headers on LP64 systems. A number that changes breaks
 * programs built before: after a release, lines may only be added, and sizes only grow.
 * Printed by header.py. */
#include <ponder/ponder.h>
#include <ponder/backend.h>

#define IS(what, number) _Static_assert((what) == (number), #what)

IS(sizeof(ponder_error), 512);
IS(offsetof(ponder_error, struct_size), 0);
IS(offsetof(ponder_error, code), 4);
IS(offsetof(ponder_error, message), 8);

IS(sizeof(ponder_runtime_options), 64);
IS(offsetof(ponder_runtime_options, struct_size), 0);
IS(offsetof(ponder_runtime_options, threads), 4);
IS(offsetof(ponder_runtime_options, memory_limit), 8);
IS(offsetof(ponder_runtime_options, backend_path), 16);
IS(offsetof(ponder_runtime_options, user_data), 24);
IS(offsetof(ponder_runtime_options, allocate), 32);
IS(offsetof(ponder_runtime_options, release), 40);
IS(offsetof(ponder_runtime_options, parallel_for), 48);
IS(offsetof(ponder_runtime_options, log), 56);

IS(sizeof(ponder_backend_info), 56);
IS(offsetof(ponder_backend_info, struct_size), 0);
IS(offsetof(ponder_backend_info, available), 4);
IS(offsetof(ponder_backend_info, name), 8);
IS(offsetof(ponder_backend_info, version), 16);
IS(offsetof(ponder_backend_info, isa), 24);
IS(offsetof(ponder_backend_info, path), 32);
IS(offsetof(ponder_backend_info, reason), 40);
IS(offsetof(ponder_backend_info, bf16), 48);
IS(offsetof(ponder_backend_info, priority), 52);

IS(sizeof(ponder_option_info), 64);
IS(offsetof(ponder_option_info, struct_size), 0);
IS(offsetof(ponder_option_info, type), 4);
IS(offsetof(ponder_option_info, name), 8);
IS(offsetof(ponder_option_info, default_value), 16);
IS(offsetof(ponder_option_info, unit), 24);
IS(offsetof(ponder_option_info, doc), 32);
IS(offsetof(ponder_option_info, minimum), 40);
IS(offsetof(ponder_option_info, maximum), 48);
IS(offsetof(ponder_option_info, choices), 56);

IS(sizeof(ponder_call), 32);
IS(offsetof(ponder_call, struct_size), 0);
IS(offsetof(ponder_call, reserved), 4);
IS(offsetof(ponder_call, timeout_ns), 8);
IS(offsetof(ponder_call, user_data), 16);
IS(offsetof(ponder_call, progress), 24);

IS(sizeof(ponder_model_options), 32);
IS(offsetof(ponder_model_options, struct_size), 0);
IS(offsetof(ponder_model_options, reserved), 4);
IS(offsetof(ponder_model_options, backend), 8);
IS(offsetof(ponder_model_options, dtype), 16);
IS(offsetof(ponder_model_options, weights), 24);

IS(sizeof(ponder_model_info), 96);
IS(offsetof(ponder_model_info, struct_size), 0);
IS(offsetof(ponder_model_info, layers), 4);
IS(offsetof(ponder_model_info, width), 8);
IS(offsetof(ponder_model_info, heads), 12);
IS(offsetof(ponder_model_info, vocabulary), 16);
IS(offsetof(ponder_model_info, context), 20);
IS(offsetof(ponder_model_info, inner_width), 24);
IS(offsetof(ponder_model_info, parameters), 32);
IS(offsetof(ponder_model_info, architecture), 40);
IS(offsetof(ponder_model_info, dtype), 48);
IS(offsetof(ponder_model_info, backend), 56);
IS(offsetof(ponder_model_info, isa), 64);
IS(offsetof(ponder_model_info, hash), 72);
IS(offsetof(ponder_model_info, has_tokenizer), 80);
IS(offsetof(ponder_model_info, end_of_text), 84);
IS(offsetof(ponder_model_info, weights), 88);

IS(sizeof(ponder_memory_plan), 88);
IS(offsetof(ponder_memory_plan, struct_size), 0);
IS(offsetof(ponder_memory_plan, reserved), 4);
IS(offsetof(ponder_memory_plan, weights), 8);
IS(offsetof(ponder_memory_plan, packed_weights), 16);
IS(offsetof(ponder_memory_plan, fast_weights), 24);
IS(offsetof(ponder_memory_plan, optimizer), 32);
IS(offsetof(ponder_memory_plan, activations), 40);
IS(offsetof(ponder_memory_plan, workspace), 48);
IS(offsetof(ponder_memory_plan, total), 56);
IS(offsetof(ponder_memory_plan, fast_parameters), 64);
IS(offsetof(ponder_memory_plan, flops_score), 72);
IS(offsetof(ponder_memory_plan, flops_step), 80);

IS(sizeof(ponder_record), 152);
IS(offsetof(ponder_record, struct_size), 0);
IS(offsetof(ponder_record, flags), 4);
IS(offsetof(ponder_record, chunk), 8);
IS(offsetof(ponder_record, first_token), 16);
IS(offsetof(ponder_record, tokens), 24);
IS(offsetof(ponder_record, predictions), 28);
IS(offsetof(ponder_record, steps_wanted), 32);
IS(offsetof(ponder_record, steps), 36);
IS(offsetof(ponder_record, loss_before), 40);
IS(offsetof(ponder_record, loss_after), 48);
IS(offsetof(ponder_record, entropy), 56);
IS(offsetof(ponder_record, reconstruction), 64);
IS(offsetof(ponder_record, gradient_norm), 72);
IS(offsetof(ponder_record, update_norm), 80);
IS(offsetof(ponder_record, gate_score), 88);
IS(offsetof(ponder_record, gate_threshold), 96);
IS(offsetof(ponder_record, update_rate), 104);
IS(offsetof(ponder_record, flops), 112);
IS(offsetof(ponder_record, score_ns), 120);
IS(offsetof(ponder_record, decide_ns), 128);
IS(offsetof(ponder_record, learn_ns), 136);
IS(offsetof(ponder_record, bytes), 144);

IS(sizeof(ponder_session_info), 72);
IS(offsetof(ponder_session_info, struct_size), 0);
IS(offsetof(ponder_session_info, chunk_tokens), 4);
IS(offsetof(ponder_session_info, tokens_fed), 8);
IS(offsetof(ponder_session_info, chunks_scored), 16);
IS(offsetof(ponder_session_info, chunks_updated), 24);
IS(offsetof(ponder_session_info, steps), 32);
IS(offsetof(ponder_session_info, tokens_waiting), 40);
IS(offsetof(ponder_session_info, scored_open), 48);
IS(offsetof(ponder_session_info, has_fast_weights), 52);
IS(offsetof(ponder_session_info, records), 56);
IS(offsetof(ponder_session_info, budget_left), 64);

IS(sizeof(ponder_stream), 16);
IS(offsetof(ponder_stream, ids), 0);
IS(offsetof(ponder_stream, count), 8);

IS(sizeof(ponder_train_record), 112);
IS(offsetof(ponder_train_record, struct_size), 0);
IS(offsetof(ponder_train_record, flags), 4);
IS(offsetof(ponder_train_record, step), 8);
IS(offsetof(ponder_train_record, tokens), 16);
IS(offsetof(ponder_train_record, loss), 24);
IS(offsetof(ponder_train_record, loss_first), 32);
IS(offsetof(ponder_train_record, reconstruction), 40);
IS(offsetof(ponder_train_record, gradient_norm), 48);
IS(offsetof(ponder_train_record, learning_rate), 56);
IS(offsetof(ponder_train_record, inner_rate), 64);
IS(offsetof(ponder_train_record, cost), 72);
IS(offsetof(ponder_train_record, temperature), 80);
IS(offsetof(ponder_train_record, tokens_per_second), 88);
IS(offsetof(ponder_train_record, flops), 96);
IS(offsetof(ponder_train_record, ns), 104);

IS(sizeof(ponder_calibration), 168);
IS(offsetof(ponder_calibration, struct_size), 0);
IS(offsetof(ponder_calibration, rounds), 4);
IS(offsetof(ponder_calibration, target), 8);
IS(offsetof(ponder_calibration, loss), 16);
IS(offsetof(ponder_calibration, rate), 24);
IS(offsetof(ponder_calibration, rate_farthest), 32);
IS(offsetof(ponder_calibration, share), 40);
IS(offsetof(ponder_calibration, held_loss), 72);
IS(offsetof(ponder_calibration, held_rate), 80);
IS(offsetof(ponder_calibration, held_farthest), 88);
IS(offsetof(ponder_calibration, held_share), 96);
IS(offsetof(ponder_calibration, front), 128);
IS(offsetof(ponder_calibration, scale), 136);
IS(offsetof(ponder_calibration, scale_last), 144);
IS(offsetof(ponder_calibration, front_slope), 152);
IS(offsetof(ponder_calibration, reference), 160);

IS(sizeof(ponder_profile_entry), 48);
IS(offsetof(ponder_profile_entry, struct_size), 0);
IS(offsetof(ponder_profile_entry, calls), 4);
IS(offsetof(ponder_profile_entry, op), 8);
IS(offsetof(ponder_profile_entry, where), 16);
IS(offsetof(ponder_profile_entry, backend), 24);
IS(offsetof(ponder_profile_entry, flops), 32);
IS(offsetof(ponder_profile_entry, ns), 40);

IS(PONDER_OK, 0);
IS(PONDER_E_ARGUMENT, 1);
IS(PONDER_E_STATE, 2);
IS(PONDER_E_NOT_FOUND, 3);
IS(PONDER_E_IO, 4);
IS(PONDER_E_FORMAT, 5);
IS(PONDER_E_UNSUPPORTED, 6);
IS(PONDER_E_MISMATCH, 7);
IS(PONDER_E_NO_MEMORY, 8);
IS(PONDER_E_BACKEND, 9);
IS(PONDER_E_CANCELLED, 10);
IS(PONDER_E_DEADLINE, 11);
IS(PONDER_E_BUFFER, 12);
IS(PONDER_E_INTERNAL, 13);
IS(PONDER_LOG_ERROR, 0);
IS(PONDER_LOG_WARNING, 1);
IS(PONDER_LOG_INFO, 2);
IS(PONDER_LOG_DEBUG, 3);
IS(PONDER_OPTION_INTEGER, 0);
IS(PONDER_OPTION_NUMBER, 1);
IS(PONDER_OPTION_BOOLEAN, 2);
IS(PONDER_OPTION_TEXT, 3);
IS(PONDER_RECORD_UPDATED, 1);
IS(PONDER_RECORD_ROLLED_BACK, 2);
IS(PONDER_RECORD_OVER_BUDGET, 4);
IS(PONDER_RECORD_CALIBRATING, 8);
IS(PONDER_RECORD_SCORED_ONLY, 16);
IS(PONDER_RECORD_NOT_CAUSAL, 32);
IS(PONDER_TRAIN_ADAPTER, 0);
IS(PONDER_TRAIN_GATE, 1);
IS(PONDER_TRAIN_BACKBONE, 2);
IS(PONDER_TRAIN_NOT_FINITE, 1);

IS(sizeof(ponder_tensor), 40);
IS(offsetof(ponder_tensor, dtype), 0);
IS(offsetof(ponder_tensor, rank), 4);
IS(offsetof(ponder_tensor, dim), 8);

IS(sizeof(ponder_op_call), 56);
IS(offsetof(ponder_op_call, struct_size), 0);
IS(offsetof(ponder_op_call, version), 4);
IS(offsetof(ponder_op_call, op), 8);
IS(offsetof(ponder_op_call, n_in), 16);
IS(offsetof(ponder_op_call, n_out), 20);
IS(offsetof(ponder_op_call, n_attr), 24);
IS(offsetof(ponder_op_call, tensor), 32);
IS(offsetof(ponder_op_call, constant), 40);
IS(offsetof(ponder_op_call, attr), 48);

IS(sizeof(ponder_plan), 32);
IS(offsetof(ponder_plan, struct_size), 0);
IS(offsetof(ponder_plan, tasks), 4);
IS(offsetof(ponder_plan, tiling), 8);
IS(offsetof(ponder_plan, reserved), 12);
IS(offsetof(ponder_plan, workspace), 16);
IS(offsetof(ponder_plan, kernel), 24);

IS(sizeof(ponder_backend_host), 40);
IS(offsetof(ponder_backend_host, struct_size), 0);
IS(offsetof(ponder_backend_host, workers), 4);
IS(offsetof(ponder_backend_host, user_data), 8);
IS(offsetof(ponder_backend_host, allocate), 16);
IS(offsetof(ponder_backend_host, release), 24);
IS(offsetof(ponder_backend_host, log), 32);

IS(sizeof(ponder_backend), 208);
IS(offsetof(ponder_backend, struct_size), 0);
IS(offsetof(ponder_backend, abi), 4);
IS(offsetof(ponder_backend, name), 8);
IS(offsetof(ponder_backend, version), 16);
IS(offsetof(ponder_backend, priority), 24);
IS(offsetof(ponder_backend, host_memory), 28);
IS(offsetof(ponder_backend, probe), 32);
IS(offsetof(ponder_backend, isa), 40);
IS(offsetof(ponder_backend, supports), 48);
IS(offsetof(ponder_backend, open), 56);
IS(offsetof(ponder_backend, close), 64);
IS(offsetof(ponder_backend, allocate), 72);
IS(offsetof(ponder_backend, release), 80);
IS(offsetof(ponder_backend, upload), 88);
IS(offsetof(ponder_backend, download), 96);
IS(offsetof(ponder_backend, plan), 104);
IS(offsetof(ponder_backend, run), 112);
IS(offsetof(ponder_backend, drop), 120);
IS(offsetof(ponder_backend, packed_bytes), 128);
IS(offsetof(ponder_backend, refresh), 136);
IS(offsetof(ponder_backend, copy), 144);
IS(offsetof(ponder_backend, clear), 152);
IS(offsetof(ponder_backend, synchronize), 160);
IS(offsetof(ponder_backend, problem), 168);
IS(offsetof(ponder_backend, record), 176);
IS(offsetof(ponder_backend, record_end), 184);
IS(offsetof(ponder_backend, replay), 192);
IS(offsetof(ponder_backend, drop_recording), 200);

IS(PONDER_DTYPE_NONE, 0);
IS(PONDER_DTYPE_F32, 1);
IS(PONDER_DTYPE_BF16, 2);
IS(PONDER_DTYPE_F64, 3);
IS(PONDER_DTYPE_I32, 4);
IS(PONDER_DTYPE_I8, 5);
IS(PONDER_TILE_WHOLE, 0);
IS(PONDER_TILE_ANY, 1);
IS(PONDER_TILE_ROWS, 2);
IS(PONDER_PLAN_OK, 0);
IS(PONDER_PLAN_NONE, 1);
IS(PONDER_PLAN_FAILED, 2);
