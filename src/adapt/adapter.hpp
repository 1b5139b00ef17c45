// An adapter says what the fast weights are and where they enter the backbone's pass. Adding one
// is one file here, a row in the option table, a fixture and a test.
#pragma once

#include "backbone/gpt2.hpp"
#include "base/random.hpp"
#include "policy/gate.hpp"
#include "tensor/graph.hpp"

#include <memory>
#include <span>
#include <string>
#include <vector>

namespace ponder {

class Options;

// One tensor of the fast weights, in their flat buffer.
struct FastTensor {
    std::string name;
    Shape shape; // [S, ...] with one stream
    size_t offset = 0;
    size_t group = 0; // tensors of one layer decay together
    size_t count() const { return size_t(shape.count()); }
};

struct LinearArguments {
    LinearPlace place;
    Id x, w, b, residual;
    DType out;
};

// What an adapter that learns inside the pass leaves in the graph.
struct InsideResult {
    Id hidden;
    std::vector<Id> state; // new fast weights, in the order of fast_tensors()
    Id loss = none;        // wide [S, 3]: reconstruction loss (initial weights, before, after)
    Id taps = none;        // wide [S, T, C]: what convolutions over time read
};

class Adapter {
public:
    virtual ~Adapter() = default;

    // Fast weights, all of them f32 (f64 in tests).
    const std::vector<FastTensor> &fast_tensors() const { return fast_; }
    size_t fast_count() const { return fast_count_; }
    // The values a stream starts from; the same for the same seed. Stored ones if there are.
    void initial(std::span<float> fast, Random &random) const;
    void store_initial(std::vector<float> values) { stored_ = std::move(values); }
    // True: score and learn are one pass, decided before it. False: learning follows the score.
    virtual bool learns_inside() const { return false; }
    // Layers below need no gradient.
    virtual int64_t lowest_layer() const { return 0; }
    // Keys and values of this layer and those above depend on the fast weights; `layers`: of none.
    virtual int64_t lowest_stale_layer(int64_t layers) const { return layers; }
    // Inside the pass: tokens between two updates, and rows before a token that its result reads.
    virtual int64_t mini_batch() const { return 0; }
    virtual int64_t taps() const { return 0; }

    // Recording. bind() comes first and puts the fast weights into the graph.
    virtual Id linear(Graph &graph, const LinearArguments &arguments) const;
    // `before`: rows of `taps` before the first, [S, taps(), C]; absent at the start of a chunk.
    virtual InsideResult after_backbone(Graph &graph, Id hidden, Id before = none) const;

    // The fast weights' externals in a graph that is being recorded, in order.
    void bind(Graph &graph, int64_t streams = 1) const;
    static Id fast_id(size_t index) { return Id(index); }

    // What was learned of the updates: for each fast tensor the log of its step size over inner.lr,
    // for each group the logit of its decay towards the initial values. Empty when untrained.
    struct Rates {
        std::vector<float> log_rate, decay;
    };
    const Rates &rates() const { return rates_; }
    void store_rates(Rates rates) { rates_ = std::move(rates); }
    size_t groups() const { return fast_.empty() ? 0 : fast_.back().group + 1; }
    // Over all fast weights: step size and what is kept of the distance to the initial values.
    void expand_rates(double inner_lr, std::span<float> rate, std::span<float> keep) const;

    // What decides when to learn, if it was trained; for policy `adapter`.
    const std::shared_ptr<const Gate> &gate() const { return gate_; }
    void store_gate(std::shared_ptr<const Gate> gate) { gate_ = std::move(gate); }

    // Parameters that do not change at test time (a TTT layer's projections), by name: shape and
    // values. Stored in an adapter folder beside the initial fast weights.
    struct Slow {
        Shape shape;
        std::vector<float> values;
    };
    const std::map<std::string, Slow> &slow() const { return slow_; }
    std::span<float> slow_values(const std::string &name) { return slow_.at(name).values; }

protected:
    virtual void draw_initial(std::span<float> fast, Random &random) const;
    size_t add_fast(std::string name, Shape shape, size_t group = 0); // returns its index

    std::map<std::string, Slow> slow_;

private:
    std::vector<FastTensor> fast_;
    size_t fast_count_ = 0;
    std::vector<float> stored_; // initial fast weights, empty if drawn
    Rates rates_;
    std::shared_ptr<const Gate> gate_;
};

// The options an adapter is made from. An untrained adapter that never learns changes nothing, so
// it becomes none; a stored one counts even so.
Options effective_options(const Options &options, bool never_learns);

// A value of the `adapter` option that is no folder: none, lora, ttt-linear, ttt-mlp.
bool is_built_in(const std::string &name);
// From the `adapter` option. The seed draws what an untrained adapter draws once per model (a TTT
// layer's projections).
std::shared_ptr<Adapter> make_adapter(const Gpt2Config &config, const Options &options,
                                      const std::string &model_hash);

} // namespace ponder
