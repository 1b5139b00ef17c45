#include "session/pass.hpp"

#include "base/error.hpp"
#include "base/options.hpp"
#include "tensor/ops.hpp"

namespace ponder {

Window window_of(const Options &options, const Gpt2Config &config) {
    const int64_t chunk = options.integer("chunk"), given = options.integer("context");
    if (chunk > config.context || given > config.context)
        throw_error(PONDER_E_ARGUMENT,
                    "options 'chunk' %d and 'context' %d: the backbone has %d positions",
                    int(chunk), int(given), int(config.context));
    return {chunk, given == 0 ? config.context : std::max(given, chunk)};
}

Recording record_pass(const Gpt2 &model, const Adapter &adapter, const PassShape &shape) {
    Recording r{Graph(model.type()), {}, none, none, none, none, none, {}, {}, none, none, none};
    Graph &g = r.graph;
    adapter.bind(g);
    r.tokens = g.external("tokens", DType::i32, {1, shape.tokens});
    r.targets = g.external("targets", DType::i32, {1, shape.scored});

    const bool inside = shape.inside && adapter.learns_inside();
    Id hidden = model.hidden(g, r.tokens, shape.scored, adapter, inside ? g.wide : g.act);
    if (inside) {
        const InsideResult result = adapter.after_backbone(g, hidden);
        hidden = result.hidden;
        r.new_state = result.state;
        r.reconstruction = result.loss;
        for (Id id : r.new_state)
            g.expose(id, "new fast weights");
        g.expose(r.reconstruction, "reconstruction loss");
    }
    const CrossEntropy loss = cross_entropy(g, hidden, model.head(g), r.targets, shape.learn);
    r.nll = loss.nll;
    r.entropy = loss.entropy;
    g.expose(r.nll, "losses");
    g.expose(r.entropy, "entropies");
    if (shape.watch) {
        r.hidden = hidden;
        for (const Call &call : g.calls()) {
            if (call.rule->name == std::string_view("attention"))
                r.qkv = call.in[0]; // of the last layer in the end
            if (call.rule->name == std::string_view("cross_entropy") && call.out.size() > 2)
                r.probabilities = call.out[2];
        }
        for (Id id : r.watched())
            if (id != none)
                g.expose(id, "watched");
    }
    r.segment_ends.push_back(g.calls().size());

    if (shape.learn) {
        std::vector<Id> fast;
        for (size_t i = 0; i < adapter.fast_tensors().size(); ++i)
            fast.push_back(Adapter::fast_id(i));
        // Of the losses' mean, without the mean.
        const Id each = fill(g, g.shape(r.nll), 1.0 / double(shape.scored - 1));
        r.gradient = gradients(g, {{r.nll, each}}, fast);
        for (size_t i = 0; i < r.gradient.size(); ++i)
            g.expose(r.gradient[i], "gradient of " + adapter.fast_tensors()[i].name);
        r.segment_ends.push_back(g.calls().size());
    }
    return r;
}

} // namespace ponder
