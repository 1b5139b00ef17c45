// Passes for generating, recorded: some tokens of each stream through the backbone, over the keys
// and values of those before; the layer after the backbone over one open mini-batch; logits. Where
// a stream is and how much it has read are inputs, so a few recordings serve every length. A pass
// that decodes ends in logits, so that a token is one upload, one replayed pass and one download.
#pragma once

#include "adapt/adapter.hpp"
#include "tensor/program.hpp"

#include <map>
#include <mutex>

namespace ponder {

// The backbone over `tokens` new tokens of each stream. Their keys and values, and what later
// passes from `from_layer` on begin with, go to rows first_s .. of the caches.
struct DecodeShape {
    int64_t streams, tokens;
    int64_t places;     // rows of a cache
    int64_t from_layer; // 0, or the first layer that fast weights enter: residual streams come in
    bool logits;        // of each token; else hidden states
    auto operator<=>(const DecodeShape &) const = default;
};

struct DecodePass {
    DecodeShape shape;
    Id ids = none, at = none; // i32 [S, T]: tokens, their positions
    Id first = none;          // i32 [S]: rows of the caches before
    Id residual = none;       // wide [S, T, C]: at the first layer that fast weights enter
    Id kept = none;           // wide [S, N, C]: of all tokens so far
    std::vector<Id> k, v;     // of each layer, act [S, H, N, D]
    Id kept_new = none;       // these three afterwards, in place
    std::vector<Id> k_new, v_new;
    Id hidden = none; // [S, T, C]
    Id logits = none; // wide [S, T, V]
    std::unique_ptr<const Program> program;
};

// hidden act [S, 1, C] -> logits wide [S, 1, V]
struct HeadPass {
    Id hidden = none, logits = none;
    std::unique_ptr<const Program> program;
};

// The layer after the backbone over rows of a stream that begin with a mini-batch.
struct LayerShape {
    int64_t rows;
    bool logits; // of the last row; else `out`
    auto operator<=>(const LayerShape &) const = default;
};

struct LayerPass {
    Id hidden = none;      // wide [1, R, C]
    Id before = none;      // wide [1, B, C]: the convolutions' inputs before these rows
    Id taps = none;        // wide [1, R, C]: of these rows
    Id out = none;         // act [1, R, C]
    Id logits = none;      // wide [1, 1, V]
    std::vector<Id> state; // fast weights after the rows
    std::unique_ptr<const Program> program;
};

// Without a program, which is made of the graph.
DecodePass record_decode(Graph &graph, const Gpt2 &model, const Adapter &adapter, bool with_layer,
                         const DecodeShape &shape);
LayerPass record_layer(Graph &graph, const Gpt2 &model, const Adapter &adapter,
                       const LayerShape &shape);

// Recorded at the first request, kept for good: there are few. Any thread.
class DecodePasses {
public:
    DecodePasses(const Gpt2 &model, const Adapter &adapter, std::shared_ptr<const Device> device,
                 bool with_layer)
        : model_(model), adapter_(adapter), device_(std::move(device)), with_layer_(with_layer) {}
    const DecodePass &decode(const DecodeShape &shape) const;
    const HeadPass &head(int64_t streams) const;
    const LayerPass &layer(const LayerShape &shape) const;

private:
    const Gpt2 &model_;
    const Adapter &adapter_;
    std::shared_ptr<const Device> device_;
    bool with_layer_; // the backbone's result stays wide for it
    mutable std::mutex mutex_;
    mutable std::map<DecodeShape, DecodePass> decode_;
    mutable std::map<int64_t, HeadPass> head_;
    mutable std::map<LayerShape, LayerPass> layer_;
};

} // namespace ponder
