// GPT-2 (Radford et al. 2019): weights, and the forward pass as op calls.
#pragma once

#include "base/memory.hpp"
#include "formats/gpt2_folder.hpp"
#include "tensor/graph.hpp"

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace ponder {

class Adapter;

// Where the four products of a block stand: named as in the checkpoint.
enum class Module { attn_c_attn, attn_c_proj, mlp_c_fc, mlp_c_proj };
constexpr int modules_per_layer = 4;
const char *module_name(Module module);

struct LinearPlace {
    int64_t layer;
    Module module;
    int64_t in, out;
};
LinearPlace linear_place(const Gpt2Config &config, int64_t layer, Module module);

// How matrices are kept: in the type of activations, or as int8 (formats/int8_weights.hpp).
enum class Storage { plain, int8 };

// Frozen weights in one block: matrices in the model's type or as int8, vectors in f32 (f64 in
// tests).
class Gpt2 {
public:
    // Without memory nothing is allocated: constants have no data, for planning.
    Gpt2(const Gpt2Config &config, DType type, Storage storage = Storage::plain);
    // From any folder with any storage.
    Gpt2(const Gpt2Folder &folder, DType type, std::shared_ptr<Memory> memory,
         const std::function<void(uint64_t done, uint64_t total)> &progress,
         Storage storage = Storage::plain);

    // A copy with memory of its own.
    Gpt2(const Gpt2 &other, std::shared_ptr<Memory> memory);

    const Gpt2Config &config() const { return config_; }
    DType type() const { return type_; } // of activations
    Storage storage() const { return storage_; }
    uint64_t bytes() const { return bytes_; }
    uint64_t parameters() const { return parameters_; }
    // Of config and weights; of int8 weights, of those that they were made from, so that what fits
    // the one model fits the other.
    const std::string &hash() const { return hash_; }
    std::string content_hash() const; // of int8 weights as they are stored

    // What is stored, in its order, with the scales of int8 weights after them. Only an owner that
    // is not shared may write.
    struct Weight {
        std::string name;
        Shape shape;
        DType type;
        std::byte *data;
    };
    std::vector<Weight> weights();

    // Bytes of the matrices, which a backend packs: once for the forward pass of every layer, once
    // transposed for the backward pass of layers from `lowest_adapted` on.
    uint64_t packed_estimate(bool backward, int64_t lowest_adapted) const;

    // ids i32 [S, T] -> hidden states after the last layer norm, [S, scored, C]: of the last
    // `scored` tokens. The adapter chooses how each linear is computed.
    Id hidden(Graph &graph, Id ids, int64_t scored, const Adapter &adapter, DType out) const;

    // Its parts, for passes that read keys and values of earlier tokens. Residual stream of tokens
    // at given positions; through layers [first, end), where `attend` computes attention from qkv;
    // the last norm.
    using Attend = std::function<Id(int64_t layer, Id qkv)>;
    Id embed(Graph &graph, Id ids, Id positions) const;
    Id blocks(Graph &graph, Id x, int64_t first, int64_t end, const Adapter &adapter,
              const Attend &attend) const;
    Id last_norm(Graph &graph, Id x, DType out) const;
    Id head(Graph &graph) const; // [V, C]

private:
    struct Place {
        Shape shape;
        DType type;
        size_t offset;
    };
    void layout();
    void read(const Gpt2Folder &folder, const std::string &name, class Hash &hash);
    void from_int8(const Gpt2 &stored);
    std::byte *at(const std::string &name) { return data_.data() + places_.at(name).offset; }
    const std::byte *at(const std::string &name) const {
        return data_.data() + places_.at(name).offset;
    }
    Id weight(Graph &graph, const std::string &name) const;

    Gpt2Config config_;
    DType type_;
    Storage storage_;
    std::vector<std::pair<std::string, Place>> order_;
    std::map<std::string, Place> places_;
    uint64_t bytes_ = 0, parameters_ = 0;
    std::string hash_;
    Buffer data_;
};

} // namespace ponder
