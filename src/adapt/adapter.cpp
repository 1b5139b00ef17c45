#include "adapt/adapter.hpp"

#include "adapt/lora.hpp"
#include "adapt/stored.hpp"
#include "adapt/ttt.hpp"
#include "base/options.hpp"
#include "tensor/ops.hpp"

#include <algorithm>
#include <cmath>

namespace ponder {

size_t Adapter::add_fast(std::string name, Shape shape, size_t group) {
    fast_.push_back({std::move(name), shape, fast_count_, group});
    fast_count_ += fast_.back().count();
    return fast_.size() - 1;
}

void Adapter::bind(Graph &graph, int64_t streams) const {
    for (const FastTensor &tensor : fast_) {
        Shape shape = tensor.shape;
        shape.dim[0] = streams;
        graph.external(tensor.name, graph.wide, shape,
                       !learns_inside() || graph.mode.train_adapter);
    }
}

void Adapter::initial(std::span<float> fast, Random &random) const {
    if (stored_.empty())
        draw_initial(fast, random);
    else
        std::copy(stored_.begin(), stored_.end(), fast.begin());
}

void Adapter::expand_rates(double inner_lr, std::span<float> rate, std::span<float> keep) const {
    for (size_t i = 0; i < fast_.size(); ++i) {
        const FastTensor &tensor = fast_[i];
        const double decay = 1 / (1 + std::exp(-double(rates_.decay[tensor.group])));
        const auto fill = [&](std::span<float> to, double value) {
            std::fill_n(to.begin() + std::ptrdiff_t(tensor.offset), tensor.count(), float(value));
        };
        fill(rate, inner_lr * std::exp(double(rates_.log_rate[i])));
        fill(keep, 1 - decay);
    }
}

void Adapter::draw_initial(std::span<float>, Random &) const {}

Id Adapter::linear(Graph &graph, const LinearArguments &p) const {
    return ponder::linear(graph, p.x, p.w, p.b, p.residual, false, p.out);
}

InsideResult Adapter::after_backbone(Graph &, Id hidden, Id) const { return {hidden, {}}; }

Options effective_options(const Options &options, bool never_learns) {
    Options effective = options;
    if (never_learns && is_built_in(options.text("adapter")))
        effective.set("adapter", "none");
    return effective;
}

bool is_built_in(const std::string &name) {
    return name == "none" || name == "lora" || name == "ttt-linear" || name == "ttt-mlp";
}

std::shared_ptr<Adapter> make_adapter(const Gpt2Config &config, const Options &options,
                                      const std::string &model_hash) {
    const std::string &name = options.text("adapter");
    if (name == "none")
        return std::make_shared<Adapter>();
    if (name == "lora")
        return std::make_shared<Lora>(config, options);
    if (name == "ttt-linear" || name == "ttt-mlp")
        return std::make_shared<Ttt>(config, options, name == "ttt-mlp");
    return load_adapter(name, config, options, model_hash);
}

} // namespace ponder
