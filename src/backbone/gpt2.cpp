#include "backbone/gpt2.hpp"

#include "adapt/adapter.hpp"
#include "base/error.hpp"
#include "base/hash.hpp"
#include "formats/int8_weights.hpp"
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
    const auto put = [&](const std::string &name, Shape shape, DType type) {
        const Place place{shape, type, size_t(bytes_)};
        order_.emplace_back(name, place);
        places_[name] = place;
        bytes_ += (uint64_t(shape.count()) * size_of(type) + 63) / 64 * 64;
    };
    const auto add = [&](const std::string &name, Shape shape) {
        parameters_ += uint64_t(shape.count());
        if (storage_ == Storage::plain || !is_int8_weight(name))
            return put(name, shape, shape.rank == 2 ? type_ : vector);
        put(name, shape, DType::i8);
        put(int8_scales_name(name),
            int8_scales_rows(name) ? Shape{shape[0], 1} : Shape{1, shape[1]}, DType::f32);
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

Hash config_hash(const Gpt2Config &c) {
    Hash hash;
    for (int64_t number :
         {c.layers, c.width, c.heads, c.inner, c.context, c.vocabulary, int64_t(c.tied)})
        hash.add_number(uint64_t(number));
    return hash;
}

} // namespace

Gpt2::Gpt2(const Gpt2Config &config, DType type, Storage storage)
    : config_(config), type_(type), storage_(storage) {
    layout();
}

Gpt2::Gpt2(const Gpt2Folder &folder, DType type, std::shared_ptr<Memory> memory,
           const std::function<void(uint64_t, uint64_t)> &progress, Storage storage)
    : Gpt2(folder.config(), type, storage) {
    data_ = Buffer(memory, bytes_);
    if (folder.int8() && storage == Storage::plain) {
        from_int8(Gpt2(folder, type, std::move(memory), progress, Storage::int8));
        return;
    }
    Hash hash = config_hash(config_);
    uint64_t done = 0;
    for (const auto &[name, place] : order_) {
        read(folder, name, hash);
        progress(done += uint64_t(place.shape.count()) * size_of(place.type), bytes_);
    }
    if (!folder.int8()) {
        hash_ = hash.hex();
        return;
    }
    if (content_hash() != folder.int8()->content)
        throw_error(PONDER_E_FORMAT, "%s: the int8 weights are not those that config.json names",
                    folder.path().c_str());
    hash_ = folder.int8()->source;
}

// One tensor; `hash` takes it as the folder has it.
void Gpt2::read(const Gpt2Folder &folder, const std::string &name, Hash &hash) {
    const Place &place = places_.at(name);
    if (place.type != DType::i8) {
        if (storage_ == Storage::int8 && name.ends_with("_scale"))
            return; // came with its weight
        folder.read(name, place.type, at(name));
        hash.add(name);
        return hash_weights(hash, place.shape, place.type, at(name));
    }
    int8_t *q = reinterpret_cast<int8_t *>(at(name));
    float *scales = reinterpret_cast<float *>(at(int8_scales_name(name)));
    if (folder.int8())
        return folder.read_int8(name, q, scales);
    hash.add(name);
    int64_t hashed = 0; // rows; those of columns with scales are read twice
    const auto rows = [&](int64_t first, int64_t count, float *to) {
        folder.read_rows(name, first, count, to);
        if (first != hashed)
            return;
        hash_weights(hash, {count, place.shape[1]}, DType::f32, to);
        hashed += count;
    };
    to_int8(place.shape[0], place.shape[1], int8_scales_rows(name), rows, q, scales);
}

void Gpt2::from_int8(const Gpt2 &stored) {
    hash_ = stored.hash_;
    for (const auto &[name, place] : order_) {
        const Place &from = stored.places_.at(name);
        if (from.type != DType::i8) {
            std::memcpy(at(name), stored.at(name),
                        size_t(place.shape.count()) * size_of(place.type));
            continue;
        }
        const int8_t *q = reinterpret_cast<const int8_t *>(stored.at(name));
        const float *scales = reinterpret_cast<const float *>(stored.at(int8_scales_name(name)));
        const bool of_rows = int8_scales_rows(name);
        const int64_t width = place.shape[1];
        for (int64_t i = 0; i < place.shape.count(); ++i) {
            const float w = q[i] * scales[of_rows ? i / width : i % width];
            if (place.type == DType::bf16)
                reinterpret_cast<bf16 *>(at(name))[i] = to_bf16(w);
            else if (place.type == DType::f64)
                reinterpret_cast<double *>(at(name))[i] = w;
            else
                reinterpret_cast<float *>(at(name))[i] = w;
        }
    }
}

std::string Gpt2::content_hash() const {
    Hash hash = config_hash(config_);
    for (const auto &[name, place] : order_) {
        hash.add(name);
        if (place.type == DType::i8)
            hash.add(at(name), size_t(place.shape.count()));
        else if (name.ends_with("_scale"))
            hash.add(at(name), size_t(place.shape.count()) * sizeof(float));
        else
            hash_weights(hash, place.shape, place.type, at(name));
    }
    return hash.hex();
}

Gpt2::Gpt2(const Gpt2 &other, std::shared_ptr<Memory> memory)
    : Gpt2(other.config_, other.type_, other.storage_) {
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
    const uint64_t element = storage_ == Storage::int8 ? 1 : size_of(type_);
    uint64_t bytes = 0;
    for (int64_t layer = 0; layer < config_.layers; ++layer)
        for (int m = 0; m < modules_per_layer; ++m) {
            const LinearPlace p = linear_place(config_, layer, Module(m));
            const bool twice = backward && layer >= lowest_adapted;
            bytes += uint64_t(p.in * p.out) * element * (twice ? 2 : 1);
        }
    const uint64_t head = uint64_t(config_.vocabulary * config_.width) * element;
    return bytes + head * (backward ? 2 : 1);
}

Id Gpt2::weight(Graph &graph, const std::string &name) const {
    const Place &place = places_.at(name);
    const auto address = [&](const Place &p) -> const void * {
        return data_.data() ? data_.data() + p.offset : nullptr;
    };
    if (place.type == DType::i8) {
        const Place &scales = places_.at(int8_scales_name(name));
        return graph.scaled_constant(name, place.shape, address(place), scales.shape,
                                     address(scales));
    }
    return graph.weight(name, place.type, place.shape, address(place), graph.mode.train_backbone);
}

namespace {

int64_t dropout_salt(int64_t layer, Module module) { // 0 is the embedding's
    return 1 + layer * modules_per_layer + int(module);
}

} // namespace

Id Gpt2::hidden(Graph &graph, Id ids, int64_t scored, const Adapter &adapter, DType out) const {
    const int64_t tokens = graph.shape(ids)[1];
    Id x = embedding(graph, ids, weight(graph, "wte.weight"), weight(graph, "wpe.weight"), 0);
    x = dropout(graph, x, graph.mode.dropout, 0);
    x = blocks(graph, x, 0, config_.layers, adapter, [&](int64_t layer, Id qkv) {
        return attention(graph, qkv, config_.heads, dropout_salt(layer, Module::attn_c_attn));
    });
    if (scored < tokens)
        x = slice_rows(graph, x, tokens - scored, scored);
    return last_norm(graph, x, out);
}

Id Gpt2::embed(Graph &graph, Id ids, Id positions) const {
    return embedding_at(graph, ids, positions, weight(graph, "wte.weight"),
                        weight(graph, "wpe.weight"));
}

// The residual stream x stays wide; what enters a product is of the activation type.
Id Gpt2::blocks(Graph &graph, Id x, int64_t first, int64_t end, const Adapter &adapter,
                const Attend &attend) const {
    for (int64_t layer = first; layer < end; ++layer) {
        const size_t begin = graph.calls().size();
        const std::string prefix = "h." + std::to_string(layer) + ".";
        const auto norm = [&](const char *name, Id in) {
            return layer_norm(graph, in, weight(graph, prefix + name + ".weight"),
                              weight(graph, prefix + name + ".bias"), config_.norm_epsilon,
                              graph.act);
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
            return add(graph, x, dropout(graph, y, graph.mode.dropout, dropout_salt(layer, module)),
                       graph.wide);
        };
        const Id qkv = product(Module::attn_c_attn, norm("ln_1", x), none);
        x = branch(Module::attn_c_proj, attend(layer, qkv));
        const Id inner = gelu(graph, product(Module::mlp_c_fc, norm("ln_2", x), none));
        x = branch(Module::mlp_c_proj, inner);
        graph.add_block(begin);
    }
    return x;
}

Id Gpt2::last_norm(Graph &graph, Id x, DType out) const {
    return layer_norm(graph, x, weight(graph, "ln_f.weight"), weight(graph, "ln_f.bias"),
                      config_.norm_epsilon, out);
}

Id Gpt2::head(Graph &graph) const {
    return weight(graph, config_.tied ? "wte.weight" : "lm_head.weight");
}

} // namespace ponder
