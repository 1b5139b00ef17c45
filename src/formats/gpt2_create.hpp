// A new GPT-2 folder with random weights. Radford et al. 2019, section 2.3 (initialisation).
#pragma once

#include "formats/gpt2_folder.hpp"

namespace ponder {

// Writes config.json and then, as the last thing, model.safetensors in f32: normal deviates with
// standard deviation 0.02, 0.02 / sqrt(2 layers) for the projections that end in the residual
// stream; zero biases, unit norms. `end_of_text` as in write_gpt2. PONDER_E_STATE if the folder
// holds weights.
void create_gpt2(const std::string &folder, const Gpt2Config &config, uint64_t seed,
                 int32_t end_of_text = -1);

} // namespace ponder
