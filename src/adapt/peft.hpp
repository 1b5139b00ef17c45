// LoRA adapters in the names and shapes of Hugging Face's PEFT library, and merged into a backbone.
// https://github.com/huggingface/peft (checkpoint format)
#pragma once

#include "formats/gpt2_folder.hpp"

#include <string>

namespace ponder {

// adapter_config.json and adapter_model.safetensors from the initial A and B of an adapter folder;
// what was learned about its updates has no place there. PONDER_E_UNSUPPORTED for other kinds.
void adapter_to_peft(const std::string &adapter, const std::string &out);

// The other way, for a backbone of this config and hash. A scale other than 1 goes into B.
void adapter_from_peft(const Gpt2Config &config, const std::string &model_hash,
                       const std::string &peft, const std::string &out);

// A copy of the backbone with W + A B for each adapted W, in the dtype that its file has (F16
// becomes F32). config.json and the tokenizer are copied as they are.
void merge_adapter(const std::string &model, const std::string &adapter, const std::string &out);

} // namespace ponder
