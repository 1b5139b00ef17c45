// A Hugging Face folder with a GPT-2 model: config.json and one or many safetensors files.
#pragma once

#include "formats/safetensors.hpp"

#include <optional>

namespace ponder {

struct Gpt2Config {
    int64_t layers = 0, width = 0, heads = 0, inner = 0, context = 0, vocabulary = 0;
    double norm_epsilon = 1e-5;
    bool tied = true; // embedding and head share one matrix
};

// quantization_config of a folder with int8 weights (int8_weights.hpp).
struct Int8Origin {
    std::string source;  // hash of the model they were made from: what adapters were made for
    std::string content; // hash of what is stored
};

// config.json, every field checked against ranges and against each other. Unknown
// architectures, activations other than gelu_new / gelu_pytorch_tanh and attention variants
// (scale_attn_by_inverse_layer_idx, reorder.., cross attention) are PONDER_E_UNSUPPORTED.
Gpt2Config read_gpt2_config(const std::string &folder);

// Every tensor of the architecture with its shape, in the order that Gpt2Folder::tensors() names.
std::vector<std::pair<std::string, std::vector<int64_t>>> gpt2_tensors(const Gpt2Config &config);

// The folder's text of config.json with that member.
std::string int8_config(const std::string &folder, const Int8Origin &origin);

// The folder's tensors, found by their name without the "transformer." prefix. Buffers such as
// h.0.attn.bias and h.0.attn.masked_bias are ignored.
class Gpt2Folder {
public:
    explicit Gpt2Folder(const std::string &path); // headers only
    const std::string &path() const { return path_; }
    const Gpt2Config &config() const { return config_; }
    // Every tensor of the architecture with its shape, in a fixed order:
    // wte.weight [V,C], wpe.weight [P,C], h.N.ln_1.weight ..., ln_f.bias, and lm_head.weight
    // [V,C] when untied. All present with these shapes, checked by the constructor.
    const std::vector<std::pair<std::string, std::vector<int64_t>>> &tensors() const {
        return expected_;
    }
    void read(const std::string &tensor, DType type, void *out) const;
    // Rows of a matrix.
    void read_rows(const std::string &tensor, int64_t first, int64_t count, float *out) const;
    // Where weights are int8, nullptr elsewhere. Those are read with their scales only.
    const Int8Origin *int8() const { return int8_ ? &*int8_ : nullptr; }
    void read_int8(const std::string &tensor, int8_t *q, float *scales) const;
    // The dtype in the file; f32 for F16, which has no type of its own here.
    DType stored_type(const std::string &tensor) const;
    uint64_t stored_bytes() const; // of the tensors above, as in the files

private:
    std::string path_;
    const TensorInfo &stored(const std::string &tensor, const SafeTensors *&file) const;

    Gpt2Config config_;
    std::optional<Int8Origin> int8_;
    std::vector<std::pair<std::string, std::vector<int64_t>>> expected_;
    std::vector<SafeTensors> shards_;
    std::map<std::string, std::pair<size_t, std::string>> place_; // shard, name in the shard
};

} // namespace ponder
