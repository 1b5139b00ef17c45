// Backbones with random weights, as small as tests of gradients need them.
#pragma once

#include "support.hpp"

#include "formats/gpt2_write.hpp"

namespace ponder::test {

inline constexpr Gpt2Config small{2, 8, 2, 16, 32, 20, 1e-5, true};

// A folder with random weights.
inline void write_backbone(const std::string &folder, const Gpt2Config &config,
                           double spread = 0.3) {
    Random random(11);
    Gpt2 shapes(config, DType::f32);
    std::vector<std::vector<float>> values;
    std::vector<Gpt2Tensor> tensors;
    for (const Gpt2::Weight &w : shapes.weights()) {
        std::vector<float> &to = values.emplace_back(size_t(w.shape.count()));
        const bool norm = w.name.find("ln_") != std::string::npos && w.name.ends_with("weight");
        for (float &x : to)
            x = float((norm ? 1.0 : 0.0) + spread * random.normal());
        tensors.push_back({w.name, {w.shape.dim, w.shape.dim + w.shape.rank}, to.data()});
    }
    write_gpt2(folder, config, DType::f32, tensors);
}

} // namespace ponder::test
