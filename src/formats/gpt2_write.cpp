#include "formats/gpt2_write.hpp"

#include "base/json.hpp"

namespace ponder {

namespace {

std::string config_text(const Gpt2Config &c, DType type, int32_t end_of_text) {
    const auto field = [](const char *name, const std::string &value) {
        return "  " + json::quote(name) + ": " + value + ",\n";
    };
    const auto number = [&](const char *name, int64_t value) {
        return field(name, std::to_string(value));
    };
    const std::string ends =
        end_of_text < 0 ? ""
                        : number("bos_token_id", end_of_text) + number("eos_token_id", end_of_text);
    return "{\n" + field("architectures", "[\"GPT2LMHeadModel\"]") +
           field("model_type", "\"gpt2\"") + field("activation_function", "\"gelu_new\"") +
           number("n_layer", c.layers) + number("n_embd", c.width) + number("n_head", c.heads) +
           number("n_inner", c.inner) + number("n_positions", c.context) +
           number("vocab_size", c.vocabulary) + ends +
           field("layer_norm_epsilon", json::number(c.norm_epsilon)) + field("attn_pdrop", "0.0") +
           field("embd_pdrop", "0.0") + field("resid_pdrop", "0.0") +
           field("initializer_range", "0.02") +
           field("tie_word_embeddings", c.tied ? "true" : "false") +
           "  \"dtype\": " + (type == DType::bf16 ? "\"bfloat16\"" : "\"float32\"") + "\n}\n";
}

} // namespace

void write_gpt2(const std::string &folder, const Gpt2Config &config, DType type,
                const std::vector<Gpt2Tensor> &tensors, int32_t end_of_text) {
    SafeTensorsWriter writer;
    writer.metadata["format"] = "pt";
    for (const Gpt2Tensor &tensor : tensors)
        writer.add((tensor.name == "lm_head.weight" ? "" : "transformer.") + tensor.name, type,
                   tensor.shape, tensor.data);
    const std::string text = config_text(config, type, end_of_text);
    replace_file(folder + "/config.json",
                 [&](const Sink &sink) { sink(text.data(), text.size()); });
    replace_file(folder + "/model.safetensors", [&](const Sink &sink) { writer.write(sink); });
}

} // namespace ponder
