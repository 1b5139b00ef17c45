#include "formats/gpt2_create.hpp"

#include "base/error.hpp"
#include "base/random.hpp"
#include "formats/gpt2_write.hpp"

#include <cmath>

namespace ponder {

namespace {

bool is_norm(const std::string &name) { return name.find("ln_") != name.npos; }

// h.N.attn.c_proj.weight and h.N.mlp.c_proj.weight
bool ends_in_residual(const std::string &name) { return name.ends_with(".c_proj.weight"); }

} // namespace

void create_gpt2(const std::string &folder, const Gpt2Config &config, uint64_t seed,
                 int32_t end_of_text) {
    for (const char *file : {"model.safetensors", "model.safetensors.index.json"})
        if (file_exists(folder + "/" + file))
            throw_error(PONDER_E_STATE, "%s: holds weights already: %s", folder.c_str(), file);
    Random random(seed);
    const double deviation = 0.02, residual = deviation / std::sqrt(2.0 * double(config.layers));
    const auto tensors = gpt2_tensors(config);
    std::vector<std::vector<float>> values;
    std::vector<Gpt2Tensor> written;
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
        written.push_back({name, shape, tensor.data()});
    }
    write_gpt2(folder, config, DType::f32, written, end_of_text);
}

} // namespace ponder
