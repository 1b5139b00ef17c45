#include "session/decode_pass.hpp"

#include "tensor/ops.hpp"

namespace ponder {

namespace {

std::unique_ptr<const Program> program_of(Graph graph,
                                          const std::shared_ptr<const Device> &device) {
    const size_t calls = graph.calls().size();
    return std::make_unique<Program>(std::move(graph), std::vector<size_t>{calls}, device);
}

Id logits_of(Graph &g, const Gpt2 &model, Id hidden) {
    return linear(g, hidden, model.head(g), none, none, true, g.wide);
}

} // namespace

DecodePass record_decode(Graph &g, const Gpt2 &model, const Adapter &adapter, bool with_layer,
                         const DecodeShape &shape) {
    const Gpt2Config &config = model.config();
    const int64_t streams = shape.streams, tokens = shape.tokens, width = config.width;
    const int64_t lowest = adapter.lowest_stale_layer(config.layers);
    DecodePass pass;
    pass.shape = shape;
    adapter.bind(g, streams);
    pass.first = g.external("rows before", DType::i32, {streams});
    pass.k.resize(size_t(config.layers), none);
    pass.v = pass.k_new = pass.v_new = pass.k;
    const auto attend = [&](int64_t layer, Id qkv) {
        const size_t l = size_t(layer);
        const Shape cache{streams, config.heads, shape.places, width / config.heads};
        pass.k[l] = g.external("keys", g.act, cache);
        pass.v[l] = g.external("values", g.act, cache);
        const CachedAttention a = attention_cached(g, qkv, pass.first, pass.k[l], pass.v[l]);
        pass.k_new[l] = a.k, pass.v_new[l] = a.v;
        g.expose(a.k, "keys");
        g.expose(a.v, "values");
        return a.o;
    };
    Id x;
    if (shape.from_layer == 0) {
        pass.ids = g.external("tokens", DType::i32, {streams, tokens});
        pass.at = g.external("positions", DType::i32, {streams, tokens});
        x = model.embed(g, pass.ids, pass.at);
        x = model.blocks(g, x, 0, lowest, adapter, attend);
        if (lowest > 0 && lowest < config.layers) {
            pass.kept = g.external("residual streams", g.wide, {streams, shape.places, width});
            pass.kept_new = keep_rows(g, x, pass.first, pass.kept);
            g.expose(pass.kept_new, "residual streams");
        }
    } else {
        x = pass.residual = g.external("residual stream", g.wide, {streams, tokens, width});
    }
    x = model.blocks(g, x, lowest, config.layers, adapter, attend);
    const Id hidden = model.last_norm(g, x, with_layer ? g.wide : g.act);
    if (shape.logits)
        g.expose(pass.logits = logits_of(g, model, hidden), "logits");
    else
        g.expose(pass.hidden = hidden, "hidden states");
    return pass;
}

LayerPass record_layer(Graph &g, const Gpt2 &model, const Adapter &adapter,
                       const LayerShape &shape) {
    const int64_t rows = shape.rows, width = model.config().width;
    LayerPass pass;
    adapter.bind(g);
    pass.hidden = g.external("hidden states", g.wide, {1, rows, width});
    if (const int64_t taps = adapter.taps(); taps > 0)
        pass.before = g.external("taps", g.wide, {1, taps, width});
    const InsideResult result = adapter.after_backbone(g, pass.hidden, pass.before);
    pass.state = result.state;
    if (shape.logits) {
        const Id last = rows > 1 ? slice_rows(g, result.hidden, rows - 1, 1) : result.hidden;
        g.expose(pass.logits = logits_of(g, model, last), "logits");
    } else {
        g.expose(pass.out = result.hidden, "hidden states");
    }
    for (const Id id : pass.state)
        g.expose(id, "new fast weights");
    if (pass.before != none)
        g.expose(pass.taps = result.taps, "taps");
    return pass;
}

const DecodePass &DecodePasses::decode(const DecodeShape &shape) const {
    const std::lock_guard lock(mutex_);
    DecodePass &p = decode_[shape];
    if (p.program)
        return p;
    Graph g(model_.type());
    DecodePass pass = record_decode(g, model_, adapter_, with_layer_, shape);
    pass.program = program_of(std::move(g), device_);
    return p = std::move(pass);
}

const HeadPass &DecodePasses::head(int64_t streams) const {
    const std::lock_guard lock(mutex_);
    HeadPass &p = head_[streams];
    if (p.program)
        return p;
    HeadPass pass;
    Graph g(model_.type());
    pass.hidden = g.external("hidden states", g.act, {streams, 1, model_.config().width});
    g.expose(pass.logits = logits_of(g, model_, pass.hidden), "logits");
    pass.program = program_of(std::move(g), device_);
    return p = std::move(pass);
}

const LayerPass &DecodePasses::layer(const LayerShape &shape) const {
    const std::lock_guard lock(mutex_);
    LayerPass &p = layer_[shape];
    if (p.program)
        return p;
    Graph g(model_.type());
    LayerPass pass = record_layer(g, model_, adapter_, shape);
    pass.program = program_of(std::move(g), device_);
    return p = std::move(pass);
}

} // namespace ponder
