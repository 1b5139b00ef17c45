// Adapter folders: ponder.json says what the adapter is and for which backbone, ponder.safetensors
// holds initial fast weights ("fast.NAME"), slow parameters ("slow.NAME") and, when it was trained,
// log step sizes and decay ("rates.log_rate", "rates.decay", see Adapter::Rates).
//
//   { "format": "ponder-adapter", "version": 1, "kind": "lora", "model": "<hash>",
//     "options": { "lora.rank": "16", ... } }
//
// Stored lora.* and ttt.* options fix the adapter's structure and replace the session's; of the
// others, those that the session was given stay.
#pragma once

#include "adapt/adapter.hpp"

namespace ponder {

// The session's options with those of its adapter's folder, if it names one.
Options with_stored_options(const Options &session);

// Hash of the folder's two files.
std::string adapter_stamp(const std::string &folder);

std::shared_ptr<Adapter> load_adapter(const std::string &folder, const Gpt2Config &config,
                                      const Options &options, const std::string &model_hash);

// lora, ttt-linear or ttt-mlp: what the options' adapter is, or is stored as.
std::string adapter_kind(const Options &options);

// Writes both files (each replaced atomically) for an adapter of this kind with these values of its
// fast weights, and the options that fix its structure and its updates.
void save_adapter(const std::string &folder, const std::string &kind, const std::string &model_hash,
                  const Options &options, const Adapter &adapter, std::span<const float> fast);

} // namespace ponder
