#include "adapt/ttt.hpp"

#include "base/error.hpp"
#include "base/options.hpp"

#include <cmath>

namespace ponder {

namespace {

constexpr double rope_theta = 10000;

} // namespace

Ttt::Ttt(const Gpt2Config &config, const Options &options, bool mlp) {
    const int64_t width = config.width;
    heads_ = options.integer("ttt.heads");
    if (heads_ == 0)
        heads_ = config.heads;
    if (width % heads_ != 0 || (width / heads_) % 2 != 0)
        throw_error(PONDER_E_ARGUMENT,
                    "option 'ttt.heads': %d does not cut width %d into even heads", int(heads_),
                    int(width));
    const int64_t d = width / heads_;
    mini_batch_ = options.integer("ttt.mini_batch");
    share_qk_ = options.boolean("ttt.share_qk");
    gate_ = options.boolean("ttt.gate");
    const bool ponder = options.text("ttt.form") == "ponder";
    if (ponder && mlp)
        throw_error(PONDER_E_UNSUPPORTED, "option 'ttt.form': PonderTTT has no ttt-mlp");
    double base_lr = options.number("ttt.base_lr");
    if (base_lr == 0)
        base_lr = mlp ? 0.1 : 1.0;

    form_.mlp = mlp;
    form_.ponder = ponder;
    form_.scale = base_lr / double(d) * (ponder ? 768.0 / double(width) : 1.0);
    if (!options.boolean("ttt.learns"))
        form_.scale = 0;
    form_.decay = options.number("ttt.decay");
    form_.eps = ponder ? 1e-5 : 1e-6;
    form_.max_grad_norm = options.number("ttt.max_gradient_norm");
    form_.causal_k = options.integer("ttt.causal_k");
    if (!ponder && (form_.decay != 0 || form_.max_grad_norm != 0 || form_.causal_k != 0))
        throw_error(PONDER_E_ARGUMENT, "options 'ttt.decay', 'ttt.max_gradient_norm' and "
                                       "'ttt.causal_k' belong to ttt.form=ponder");
    outer_eps_ = form_.eps;

    // Untrained values as the sources draw them: the official code draws projections with 0.02 and
    // leaves convolutions to PyTorch's default; PonderTTT uses LeCun's and a zero output
    // projection.
    Random random(uint64_t(options.integer("seed")) ^ 0x5474744c61796572u);
    const Draw projection = ponder ? Draw::inverse_root : Draw::normal;
    const Draw convolution = ponder ? Draw::inverse_root : Draw::uniform_half;
    add_slow("norm.weight", {width}, Draw::ones, random);
    add_slow("norm.bias", {width}, Draw::zeros, random);
    add_slow("q.weight", {width, width}, projection, random);
    if (!share_qk_)
        add_slow("k.weight", {width, width}, projection, random);
    add_slow("v.weight", {width, width}, projection, random);
    add_slow("o.weight", {width, width}, ponder ? Draw::zeros : Draw::normal, random);
    if (gate_)
        add_slow("gate.weight", {width, width}, projection, random);
    if (share_qk_)
        for (const char *name : {"conv_q", "conv_k"}) {
            add_slow(std::string(name) + ".weight", {4, width}, convolution, random);
            add_slow(std::string(name) + ".bias", {width},
                     ponder ? Draw::zeros : Draw::uniform_half, random);
        }
    add_slow("lr.weight", {width, heads_}, projection, random);
    add_slow("lr.bias", {heads_}, Draw::zeros, random);
    add_slow("token_index", {mini_batch_}, Draw::zeros, random);
    add_slow("ttt_norm.weight", {heads_, d}, Draw::ones, random);
    add_slow("ttt_norm.bias", {heads_, d}, Draw::zeros, random);
    add_slow("post_norm.weight", {width}, Draw::ones, random);
    add_slow("post_norm.bias", {width}, Draw::zeros, random);

    const int64_t inner = mlp ? 4 * d : d;
    add_fast("w1", {1, heads_, d, inner});
    add_fast("b1", {1, heads_, inner});
    if (mlp) {
        add_fast("w2", {1, heads_, inner, d});
        add_fast("b2", {1, heads_, d});
    }
}

void Ttt::add_slow(const std::string &name, Shape shape, Draw draw, Random &random) {
    Slow slow{shape, std::vector<float>(size_t(shape.count()))};
    const double root = std::sqrt(double(shape[0])); // fan-in: rows of a matrix, taps of a filter
    for (float &value : slow.values)
        switch (draw) {
        case Draw::zeros:
            break;
        case Draw::ones:
            value = 1;
            break;
        case Draw::normal:
            value = float(0.02 * random.normal());
            break;
        case Draw::inverse_root:
            value = float(random.normal() / root);
            break;
        case Draw::uniform_half:
            value = float(random.uniform() - 0.5);
            break;
        }
    slow_[name] = std::move(slow);
}

void Ttt::draw_initial(std::span<float> fast, Random &random) const {
    std::fill(fast.begin(), fast.end(), 0.0f);
    for (const FastTensor &tensor : fast_tensors())
        if (tensor.name[0] == 'w')
            for (size_t i = 0; i < tensor.count(); ++i)
                fast[tensor.offset + i] = float(0.02 * random.normal());
}

Id Ttt::parameter(Graph &graph, const std::string &name) const {
    const Slow &slow = slow_.at(name);
    return graph.weight(name, DType::f32, slow.shape, slow.values.data(), graph.mode.train_adapter);
}

InsideResult Ttt::after_backbone(Graph &graph, Id hidden, Id before) const {
    // What enters products, and the scan, is of the activation type, as in the backbone.
    const auto product = [&](const char *name, Id x, DType out) {
        return ponder::linear(graph, x, parameter(graph, name), none, none, false, out);
    };
    const auto narrow = [&](Id x) {
        if (graph.value(x).type == graph.act)
            return x;
        const Id y = graph.temporary(graph.act, graph.shape(x));
        convert(graph, x, y);
        return y;
    };
    const Id x = layer_norm(graph, hidden, parameter(graph, "norm.weight"),
                            parameter(graph, "norm.bias"), outer_eps_, graph.act);
    const Id taps = product("q.weight", x, graph.wide);
    Id q = taps;
    Id k = share_qk_ ? q : product("k.weight", x, graph.wide);
    const Id v = product("v.weight", x, graph.act);
    if (share_qk_) {
        q = conv1d(graph, q, parameter(graph, "conv_q.weight"), parameter(graph, "conv_q.bias"),
                   shift(), before);
        k = conv1d(graph, k, parameter(graph, "conv_k.weight"), parameter(graph, "conv_k.bias"),
                   shift(), before);
    }
    q = narrow(rope(graph, q, heads_, mini_batch_, rope_theta));
    k = narrow(rope(graph, k, heads_, mini_batch_, rope_theta));
    const Id lr =
        sigmoid(graph, ponder::linear(graph, x, parameter(graph, "lr.weight"),
                                      parameter(graph, "lr.bias"), none, false, graph.wide));
    std::vector<Id> state;
    for (size_t i = 0; i < fast_tensors().size(); ++i)
        state.push_back(fast_id(i));
    const TttResult scan = ttt_scan(graph, q, k, v, lr, parameter(graph, "token_index"),
                                    parameter(graph, "ttt_norm.weight"),
                                    parameter(graph, "ttt_norm.bias"), state, form_);
    Id y = layer_norm(graph, scan.y, parameter(graph, "post_norm.weight"),
                      parameter(graph, "post_norm.bias"), outer_eps_, graph.wide);
    if (gate_)
        y = mul(graph, gelu(graph, product("gate.weight", x, graph.act)), y);
    const Id out =
        ponder::linear(graph, y, parameter(graph, "o.weight"), none, hidden, false, graph.act);
    return {out, scan.state, scan.loss, taps};
}

} // namespace ponder
