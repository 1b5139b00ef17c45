// Writes a Hugging Face folder: config.json and model.safetensors.
#pragma once

#include "formats/gpt2_folder.hpp"

namespace ponder {

struct Gpt2Tensor {
    std::string name; // without "transformer."
    std::vector<int64_t> shape;
    const void *data; // of the folder's dtype
};

// f32 or bf16. config.json first, then the weights, each replaced atomically: a new folder is
// complete once it holds weights. Tokenizer files are left alone; `end_of_text` is what they say,
// -1 where they say nothing.
void write_gpt2(const std::string &folder, const Gpt2Config &config, DType type,
                const std::vector<Gpt2Tensor> &tensors, int32_t end_of_text = -1);

} // namespace ponder
