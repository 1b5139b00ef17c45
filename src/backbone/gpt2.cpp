#include "backbone/gpt2.hpp"

#include "adapt/adapter.hpp"
#include "base/hash.hpp"
#include "tensor/ops.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace ponder {

const char *module_name(Module module) {
    switch (module) {
    case Module::attn_c_attn:
        return "attn.c_attn";
    case Module::attn_c_proj:
        return "attn.c_proj";
    case Module::mlp_c_fc:
        return "mlp.c_fc";
    case Module::mlp_c_proj:
        return "mlp.c_proj";
    }
    return "";
}

LinearPlace linear_place(const Gpt2Config &c, int64_t layer, Module module) {
    switch (module) {
    case Module::attn_c_attn:
        return {layer, module, c.width, 3 * c.width};
    case Module::attn_c_proj:
        return {layer, module, c.width, c.width};
    case Module::mlp_c_fc:
        return {layer, module, c.width, c.inner};
    case Module::mlp_c_proj:
        return {layer, module, c.inner, c.width};
    }
    return {};
}

void Gpt2::layout() {
    const Gpt2Config &c = config_;
    const DType vector = type_ == DType::f64 ? DType::f64 : DType::f32;
    const auto add = [&](const std::string &name, Shape shape) {
        const DType type = shape.rank == 2 ? type_ : vector;
        const Place place{shape, type, size_t(bytes_)};
        order_.emplace_back(name, place);
        places_[name] = place;
        parameters_ += uint64_t(shape.count());
        bytes_ += (uint64_t(shape.count()) * size_of(type) + 63) / 64 * 64;
    };
    const auto add_norm = [&](const std::string &name) {
        add(name + ".weight", {c.width});
        add(name + ".bias", {c.width});
    };
    add("wte.weight", {c.vocabulary, c.width});
    add("wpe.weight", {c.context, c.width});
    for (int64_t layer = 0; layer < c.layers; ++layer) {
        const std::string prefix = "h." + std::to_string(layer) + ".";
        const auto add_linear = [&](Module module) {
            const LinearPlace p = linear_place(c, layer, module);
            add(prefix + module_name(module) + ".weight", {p.in, p.out});
            add(prefix + module_name(module) + ".bias", {p.out});
        };
        add_norm(prefix + "ln_1");
        add_linear(Module::attn_c_attn);
        add_linear(Module::attn_c_proj);
        add_norm(prefix + "ln_2");
        add_linear(Module::mlp_c_fc);
        add_linear(Module::mlp_c_proj);
    }
    add_norm("ln_f");
    if (!c.tied)
        add("lm_head.weight", {c.vocabulary, c.width});
}

namespace {

// Matrices count as bf16 and vectors as f32, so that a model has one hash in every dtype.
void hash_weights(Hash &hash, const Shape &shape, DType type, const void *data) {
    const size_t count = size_t(shape.count());
    if (shape.rank < 2 || type == DType::bf16)
        return hash.add(data, count * size_of(type));
    const float *values = static_cast<const float *>(data);
    bf16 block[4096];
    for (size_t at = 0; at < count; at += std::size(block)) {
        const size_t n = std::min(std::size(block), count - at);
        for (size_t i = 0; i < n; ++i)
            block[i] = to_bf16(values[at + i]);
        hash.add(block, n * sizeof(bf16));
    }
}

} // namespace

Gpt2::Gpt2(const Gpt2Config &config, DType type) : config_(config), type_(type) { layout(); }

Gpt2::Gpt2(const Gpt2Folder &folder, DType type, std::shared_ptr<Memory> memory,
           const std::function<void(uint64_t, uint64_t)> &progress)
    : Gpt2(folder.config(), type) {
    data_ = Buffer(std::move(memory), bytes_);
    Hash hash;
    for (int64_t number : {config_.layers, config_.width, config_.heads, config_.inner,
                           config_.context, config_.vocabulary, int64_t(config_.tied)})
        hash.add_number(uint64_t(number));
    uint64_t done = 0;
    for (const auto &[name, place] : order_) {
        std::byte *out = data_.data() + place.offset;
        folder.read(name, place.type, out);
        const uint64_t size = uint64_t(place.shape.count()) * size_of(place.type);
        hash.add(name);
        hash_weights(hash, place.shape, place.type, out);
        progress(done += size, bytes_);
    }
    hash_ = hash.hex();
}

Gpt2::Gpt2(const Gpt2 &other, std::shared_ptr<Memory> memory) : Gpt2(other.config_, other.type_) {
    data_ = Buffer(std::move(memory), bytes_);
    std::memcpy(data_.data(), other.data_.data(), bytes_);
    hash_ = other.hash_;
}

std::vector<Gpt2::Weight> Gpt2::weights() {
    std::vector<Weight> result;
    for (const auto &[name, place] : order_)
        result.push_back({name, place.shape, place.type, data_.data() + place.offset});
    return result;
}

uint64_t Gpt2::packed_estimate(bool backward, int64_t lowest_adapted) const {
    uint64_t bytes = 0;
    for (int64_t layer = 0; layer < config_.layers; ++layer)
        for (int m = 0; m < modules_per_layer; ++m) {
            const LinearPlace p = linear_place(config_, layer, Module(m));
            const bool twice = backward && layer >= lowest_adapted;
            bytes += uint64_t(p.in * p.out) * size_of(type_) * (twice ? 2 : 1);
        }
    const uint64_t head = uint64_t(config_.vocabulary * config_.width) * size_of(type_);
    return bytes + head * (backward ? 2 : 1);
}

Id Gpt2::weight(Graph &graph, const std::string &name) const {
    const Place &place = places_.at(name);
    const void *data = data_.data() ? data_.data() + place.offset : nullptr;
    return graph.weight(name, place.type, place.shape, data, graph.mode.train_backbone);
}

Id Gpt2::hidden(Graph &graph, Id ids, int64_t scored, const Adapter &adapter, DType out) const {
    const double eps = config_.norm_epsilon;
    const int64_t tokens = graph.shape(ids)[1];
    // The residual stream x stays wide; what enters a product is of the activation type.
    Id x = embedding(graph, ids, weight(graph, "wte.weight"), weight(graph, "wpe.weight"), 0);
    x = dropout(graph, x, 0);
    for (int64_t layer = 0; layer < config_.layers; ++layer) {
        const std::string prefix = "h." + std::to_string(layer) + ".";
        const auto norm = [&](const char *name, Id in) {
            return layer_norm(graph, in, weight(graph, prefix + name + ".weight"),
                              weight(graph, prefix + name + ".bias"), eps, graph.act);
        };
        const auto product = [&](Module module, Id in, Id residual) {
            const std::string name = prefix + module_name(module);
            const LinearArguments arguments{linear_place(config_, layer, module),
                                            in,
                                            weight(graph, name + ".weight"),
                                            weight(graph, name + ".bias"),
                                            residual,
                                            residual == none ? graph.act : graph.wide};
            return adapter.linear(graph, arguments);
        };
        // Onto the residual stream; added apart where the branch is dropped out.
        const auto branch = [&](Module module, Id in) {
            if (graph.mode.dropout == 0)
                return product(module, in, x);
            const Id y = product(module, in, none);
            return add(graph, x, dropout(graph, y, 1 + layer * modules_per_layer + int(module)),
                       graph.wide);
        };
        const Id qkv = product(Module::attn_c_attn, norm("ln_1", x), none);
        x = branch(Module::attn_c_proj, attention(graph, qkv, config_.heads));
        const Id inner = gelu(graph, product(Module::mlp_c_fc, norm("ln_2", x), none));
        x = branch(Module::mlp_c_proj, inner);
    }
    if (scored < tokens)
        x = slice_rows(graph, x, tokens - scored, scored);
    return layer_norm(graph, x, weight(graph, "ln_f.weight"), weight(graph, "ln_f.bias"), eps, out);
}

Id Gpt2::head(Graph &graph) const {
    return weight(graph, config_.tied ? "wte.weight" : "lm_head.weight");
}

} // namespace ponder
