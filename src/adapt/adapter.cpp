#include "adapt/adapter.hpp"

#include "adapt/lora.hpp"
#include "adapt/stored.hpp"
#include "adapt/ttt.hpp"
#include "base/error.hpp"
#include "base/options.hpp"
#include "tensor/ops.hpp"

#include <algorithm>

namespace ponder {

size_t Adapter::add_fast(std::string name, Shape shape) {
    fast_.push_back({std::move(name), shape, fast_count_});
    fast_count_ += fast_.back().count();
    return fast_.size() - 1;
}

void Adapter::bind(Graph &graph) const {
    for (const FastTensor &tensor : fast_)
        graph.external(tensor.name, graph.wide, tensor.shape, !learns_inside());
}

void Adapter::initial(std::span<float> fast, Random &random) const {
    if (stored_.empty())
        draw_initial(fast, random);
    else
        std::copy(stored_.begin(), stored_.end(), fast.begin());
}

void Adapter::draw_initial(std::span<float>, Random &) const {}

Id Adapter::linear(Graph &graph, const LinearArguments &p) const {
    return ponder::linear(graph, p.x, p.w, p.b, p.residual, false, p.out);
}

InsideResult Adapter::after_backbone(Graph &, Id hidden) const { return {hidden, {}}; }

Options effective_options(const Options &options, bool never_learns) {
    const std::string &name = options.text("adapter");
    Options effective = options;
    if (never_learns && (name == "lora" || name == "ttt-linear" || name == "ttt-mlp"))
        effective.set("adapter", "none");
    return effective;
}

std::shared_ptr<const Adapter> make_adapter(const Gpt2Config &config, const Options &options,
                                            const std::string &model_hash) {
    const std::string &name = options.text("adapter");
    if (name == "none")
        return std::make_shared<Adapter>();
    if (name == "lora")
        return std::make_shared<Lora>(config, options);
    if (name == "ttt-linear" || name == "ttt-mlp")
        return std::make_shared<Ttt>(config, options, name == "ttt-mlp");
    if (!file_exists(name + "/ponder.json"))
        throw_error(PONDER_E_ARGUMENT,
                    "adapter '%.200s' is none of none, lora, ttt-linear, ttt-mlp, and no folder "
                    "with a ponder.json",
                    name.c_str());
    return load_adapter(name, config, options, model_hash);
}

} // namespace ponder
