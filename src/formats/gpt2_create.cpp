#include "formats/gpt2_create.hpp"

#include "base/error.hpp"
#include "base/random.hpp"

#include <cmath>

namespace ponder {

namespace {

std::string config_json(const Gpt2Config &c) {
    const auto number = [](const char *name, int64_t value) {
        return std::string("  \"") + name + "\": " + std::to_string(value) + ",\n";
    };
    return "{\n  \"architectures\": [\"GPT2LMHeadModel\"],\n  \"model_type\": \"gpt2\",\n"
           "  \"activation_function\": \"gelu_new\",\n" +
           number("n_layer", c.layers) + number("n_embd", c.width) + number("n_head", c.heads) +
           number("n_inner", c.inner) + number("n_positions", c.context) +
           number("vocab_size", c.vocabulary) + number("bos_token_id", 0) +
           number("eos_token_id", 0) +
           "  \"layer_norm_epsilon\": 1e-05,\n"
           "  \"initializer_range\": 0.02,\n"
           "  \"attn_pdrop\": 0.0,\n"
           "  \"embd_pdrop\": 0.0,\n"
           "  \"resid_pdrop\": 0.0,\n"
           "  \"tie_word_embeddings\": true,\n"
           "  \"dtype\": \"float32\"\n}\n";
}

bool is_norm(const std::string &name) { return name.find("ln_") != name.npos; }

// h.N.attn.c_proj.weight and h.N.mlp.c_proj.weight
bool ends_in_residual(const std::string &name) { return name.ends_with(".c_proj.weight"); }

} // namespace

void create_gpt2(const std::string &folder, const Gpt2Config &config, uint64_t seed) {
    for (const char *file : {"model.safetensors", "model.safetensors.index.json"})
        if (file_exists(folder + "/" + file))
            throw_error(PONDER_E_STATE, "%s: holds weights already: %s", folder.c_str(), file);
    Random random(seed);
    const double deviation = 0.02, residual = deviation / std::sqrt(2.0 * double(config.layers));
    const auto tensors = gpt2_tensors(config);
    std::vector<std::vector<float>> values;
    SafeTensorsWriter writer;
    writer.metadata["format"] = "pt";
    for (const auto &[name, shape] : tensors) {
        size_t count = 1;
        for (const int64_t dim : shape)
            count *= size_t(dim);
        std::vector<float> &tensor = values.emplace_back(count, 0.0f);
        if (shape.size() == 1 && is_norm(name) && name.ends_with(".weight"))
            tensor.assign(count, 1.0f);
        else if (shape.size() == 2)
            for (float &value : tensor)
                value = float((ends_in_residual(name) ? residual : deviation) * random.normal());
        writer.add("transformer." + name, DType::f32, shape, tensor.data());
    }
    const std::string text = config_json(config);
    replace_file(folder + "/config.json",
                 [&](const Sink &sink) { sink(text.data(), text.size()); });
    replace_file(folder + "/model.safetensors", [&](const Sink &sink) { writer.write(sink); });
}

} // namespace ponder
