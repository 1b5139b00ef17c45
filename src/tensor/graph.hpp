// A pass as data: values with shapes, and the list of op calls that compute them. Nothing is
// allocated or run here; program.hpp does that. The tape of a backward pass is this list read
// backwards (gradients below).
#pragma once

#include "base/dtype.hpp"

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ponder {

using Id = int32_t; // of a value in its graph
constexpr Id none = -1;

struct Shape {
    int rank = 0;
    int64_t dim[PONDER_MAX_RANK] = {};

    Shape() = default;
    Shape(std::initializer_list<int64_t> dims) {
        for (int64_t d : dims)
            dim[rank++] = d;
    }
    int64_t operator[](int i) const { return dim[i]; }
    int64_t count() const {
        int64_t n = 1;
        for (int i = 0; i < rank; ++i)
            n *= dim[i];
        return n;
    }
    bool operator==(const Shape &) const = default;
    Shape with_last(int64_t n) const {
        Shape s = *this;
        s.dim[rank - 1] = n;
        return s;
    }
};

enum class Kind {
    constant,  // frozen: never gets a gradient; data known while the graph lives
    parameter, // as constant, but it is being trained: gets a gradient, changes between runs
    external,  // bound to an address before each run
    temporary, // in the arena
};

struct Value {
    std::string name; // for messages and profiles
    DType type;
    Shape shape;
    Kind kind;
    const void *data = nullptr; // constants and parameters; nullptr in a graph only for planning
    bool needs_gradient = false;
    bool owned = false; // a literal: its data lives with the graph
    Id scales = none;   // of an int8 constant: what its elements are times
    size_t bytes() const { return size_t(shape.count()) * size_of(type); }
};

struct OpRule;

struct Call {
    const OpRule *rule;
    std::vector<Id> in, out; // none where optional and absent
    std::vector<double> attr;
};

// What is wanted of a recording, chosen when it starts.
struct Mode {
    bool higher = false;          // gradients of gradients: fused ops are recorded as compositions
    bool train_backbone = false;  // the backbone's weights are parameters
    bool train_adapter = false;   // the adapter's slow weights are
    double dropout = 0;           // probability, on embeddings and residual branches
    double attention_dropout = 0; // probability, on attention's weights
    Id dropout_seed = -1;
    bool compose_mlp = false; // TTT-MLP's scan is, where it has a gradient: products run faster on
                              // the host than its reference kernel
    bool recompute = false; // what a block keeps for its gradient is computed again when it is due
};

class Graph {
public:
    // act: type of activations and large frozen weights. wide: f32, f64 when act is.
    explicit Graph(DType act, Mode mode = {});
    DType act, wide;
    Mode mode;

    // The constant or parameter of that name; asked for twice it is the same value.
    Id weight(std::string name, DType type, Shape shape, const void *data, bool trained);
    Id constant(std::string name, DType type, Shape shape, const void *data) {
        return weight(std::move(name), type, shape, data, false);
    }
    // An int8 constant and its scales, f32 [1,N] or [M,1]; the ops that take the one take both.
    Id scaled_constant(std::string name, Shape shape, const void *data, Shape scales_shape,
                       const void *scales);
    // A constant in `wide` that the graph owns.
    Id literal(Shape shape, const std::vector<double> &values);
    Id external(std::string name, DType type, Shape shape, bool needs_gradient = false);
    Id temporary(DType type, Shape shape, bool needs_gradient = false);
    // Gives a computed value a fixed place: its address is bound like an external's.
    void expose(Id value, std::string name);
    // Appends a call; its outputs need a gradient if any input does and the rule can give it.
    void add_call(const OpRule &rule, std::vector<Id> in, std::vector<Id> out,
                  std::vector<double> attr = {});

    // The calls from `begin` to here are a block: in a recording with Mode::recompute its gradient
    // starts by recording them again, so that between the two only what others read is kept (Chen
    // et al. 2016, "Training deep nets with sublinear memory cost").
    void add_block(size_t begin);
    struct Block {
        size_t begin, end;
    };
    const std::vector<Block> &blocks() const { return blocks_; }
    // Records a block again. Nothing of it may run before all that is recorded so far: here a
    // program has to end a segment. Returns what stands for each value that the block computes.
    std::map<Id, Id> repeat(Block block);
    const std::vector<size_t> &breaks() const { return breaks_; }
    // Takes out those of the calls from `begin` to `end` whose results no later call reads.
    void drop_unread(size_t begin, size_t end);

    // Puts `call` in the place of call `place`, which is one of `old`, and takes out the others.
    // For programs: the graph is recorded and its gradients are taken.
    void replace(const std::vector<size_t> &old, size_t place, Call call);

    const Value &value(Id id) const { return values_[size_t(id)]; }
    const Shape &shape(Id id) const { return value(id).shape; }
    const std::deque<Value> &values() const { return values_; }
    const std::vector<Call> &calls() const { return calls_; }

private:
    std::deque<Value> values_; // references stay while it grows
    std::vector<Call> calls_;
    std::vector<Block> blocks_;
    std::vector<size_t> breaks_;
    std::map<std::string, Id> weights_;
    std::vector<std::shared_ptr<const std::byte[]>> literals_;
};

// Records the backward pass of sum <value, gradient> over the seeds with respect to `wanted`
// (values that need a gradient); returns their gradients in wide types. Calls that lead to no
// wanted value are left out, so the pass ends at the lowest layer with fast weights.
struct Seed {
    Id value, gradient;
};
std::vector<Id> gradients(Graph &graph, const std::vector<Seed> &seeds,
                          const std::vector<Id> &wanted);
// Of a scalar.
std::vector<Id> gradients(Graph &graph, Id loss, const std::vector<Id> &wanted);

} // namespace ponder
