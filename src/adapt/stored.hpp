// Adapter folders: ponder.json says what the adapter is and for which backbone, ponder.safetensors
// holds initial fast weights ("fast.NAME") and slow parameters ("slow.NAME").
//
//   { "format": "ponder-adapter", "version": 1, "kind": "lora", "model": "<hash>",
//     "options": { "lora.rank": "16", ... } }
//
// The stored options fix the adapter's structure; they replace the session's.
#pragma once

#include "adapt/adapter.hpp"

namespace ponder {

std::shared_ptr<const Adapter> load_adapter(const std::string &folder, const Gpt2Config &config,
                                            const Options &options, const std::string &model_hash);

// Writes both files (each replaced atomically) for an adapter of this kind with these values of its
// fast weights. `structure` lists the options to store.
void save_adapter(const std::string &folder, const std::string &kind, const std::string &model_hash,
                  const Options &options, const std::vector<std::string> &structure,
                  const Adapter &adapter, std::span<const float> fast);

} // namespace ponder
