// LoRA as fast weights: y = x W + b + (x A) B on chosen linears (Hu et al. 2021), A drawn with
// standard deviation 1 / sqrt(in), B zero, so that a stream starts at the backbone itself.
#pragma once

#include "adapt/adapter.hpp"

namespace ponder {

class Lora : public Adapter {
public:
    Lora(const Gpt2Config &config, const Options &options);
    int64_t lowest_layer() const override { return lowest_; }
    int64_t lowest_stale_layer(int64_t) const override { return lowest_; }
    Id linear(Graph &graph, const LinearArguments &arguments) const override;

private:
    void draw_initial(std::span<float> fast, Random &random) const override;
    std::map<std::pair<int64_t, Module>, size_t> first_; // index of A; B follows
    int64_t lowest_ = 0;
};

} // namespace ponder
