// One chunk's pass, recorded: score (forward to each token's loss) and, if wanted, learn (gradients
// of the mean loss for the fast weights).
#pragma once

#include "adapt/adapter.hpp"
#include "tensor/program.hpp"

#include <array>

namespace ponder {

class Options;

// What a stream is cut into, in tokens. PONDER_E_ARGUMENT where the backbone has fewer positions.
struct Window {
    int64_t chunk, context; // context: with the chunk
};
Window window_of(const Options &options, const Gpt2Config &config);

struct PassShape {
    int64_t tokens;     // context and chunk
    int64_t scored;     // the chunk: the last of them
    bool learn;         // record the backward pass
    bool inside;        // the adapter's layer after the backbone takes part
    bool watch = false; // a gate reads hidden states, the last attention's input, probabilities
    auto operator<=>(const PassShape &) const = default;
};

enum Segment : size_t { score_segment, learn_segment };

// The recorded calls and the values that a session binds.
struct Recording {
    Graph graph;
    std::vector<size_t> segment_ends;
    Id tokens, targets;        // i32 [1, tokens], [1, scored]
    Id nll, entropy;           // wide [1, scored]
    Id reconstruction = none;  // wide [1, 3]
    std::vector<Id> new_state; // inside: fast weights after the pass
    std::vector<Id> gradient;  // learn: of each fast tensor
    // watch: act [1, scored, C], act [1, tokens, 3 C], act [1, scored, V] if a tape keeps it
    Id hidden = none, qkv = none, probabilities = none;
    std::array<Id, 3> watched() const { return {hidden, qkv, probabilities}; }
};

Recording record_pass(const Gpt2 &model, const Adapter &adapter, const PassShape &shape);

struct Pass {
    PassShape shape;
    Recording recording; // without its graph, which the program holds
    std::unique_ptr<const Program> program;
};

} // namespace ponder
