// Gradients of TTT layers against those that other implementations left in fixtures (grad.*).
#include "support.hpp"

#include "tensor/compose.hpp"

#include <deque>
#include <gtest/gtest.h>

namespace ponder::test {
namespace {

// A TTT layer with the fixture's parameters, from its input to its output, and the gradients of
// the fixture's objective in every parameter.
class LayerFixture {
public:
    LayerFixture(const std::string &name, bool composed)
        : file_(SafeTensors::open(PONDER_TEST_DATA "/" + name + ".safetensors")),
          ponder_(name.starts_with("ponder")), graph_(DType::f64, Mode{.higher = composed}) {
        form_.mlp = name.find("mlp") != std::string::npos;
    }

    void check(double tolerance) {
        Graph &g = graph_;
        const Shape in = shape_of("input");
        const int64_t s = in[0], c = in[2];
        const int64_t h = int64_t(number(ponder_ ? "num_heads" : "heads", 0)), d = c / h;
        const double eps = ponder_ ? 1e-5 : 1e-6;
        form_.ponder = ponder_;
        form_.eps = eps;
        form_.scale = number("ttt_base_lr", 1) / double(d) *
                      (ponder_ ? 768.0 / double(c) * number("gating_scale", 1) : 1);
        form_.decay = number("eta_decay_rate", 0);
        form_.max_grad_norm = number("max_grad_norm", 0);
        form_.causal_k = int64_t(number("causal_k", 0));
        const bool transposed = !ponder_; // PyTorch's weights are [out, in]
        const auto linear_by = [&](Id x, const char *jax, const char *torch) {
            const Id w = trained(
                ponder_ ? std::string(jax) + ".kernel" : std::string(torch) + ".weight", {c, c});
            return linear(g, x, w, none, none, transposed, g.wide);
        };

        const Id x = trained("input", in);
        const bool shared = ponder_ || !has("k_proj.weight");
        Id q = linear_by(x, "wq", "q_proj"), k = shared ? q : linear_by(x, "wk", "k_proj");
        const Id v = linear_by(x, "wv", "v_proj");
        const auto mix = [&](Id y, const std::string &conv) {
            if (has(conv + ".bias"))
                y = conv1d(g, y, taps(conv, c), trained(conv + ".bias", {c}), ponder_);
            return rope(g, y, h, 16, 10000);
        };
        q = mix(q, "conv_q");
        k = mix(k, "conv_k");
        const Id lr = sigmoid(g, linear(g, x, rate_weight(h, c), rate_bias(h), none, true, g.wide));
        std::vector<Id> state;
        for (const auto &[name, shape] : state_shapes(h, d))
            state.push_back(broadcast(g, trained(name, shape), per_stream(shape, s)));
        const Id index = trained("learnable_token_idx", {16});
        const Id scale = trained(ponder_ ? "ttt_norm.scale" : "ttt_norm_weight", {h, d});
        const Id shift = trained(ponder_ ? "ttt_norm.bias" : "ttt_norm_bias", {h, d});
        const TttResult scan = ttt_scan(g, q, k, v, lr, index, scale, shift, state, form_);
        Id y = layer_norm(g, scan.y, trained(ponder_ ? "post_norm.scale" : "post_norm.weight", {c}),
                          trained("post_norm.bias", {c}), eps, g.wide);
        if (ponder_ || has("g_proj.weight"))
            y = mul(g, gelu(g, linear_by(x, "wg", "g_proj")), y);
        y = linear_by(y, "wo", "o_proj");

        std::vector<Seed> seeds{{y, data(tensor64("cotangent"), in)}};
        if (ponder_) { // mean(ttt_loss_step_1)
            std::vector<double> mean(size_t(3 * s));
            for (int64_t i = 0; i < s; ++i)
                mean[size_t(3 * i + 2)] = 1 / double(s);
            seeds.push_back({scan.loss, data(mean, {s, 3})});
        }
        std::vector<Id> wanted;
        for (const auto &[name, id] : trained_)
            wanted.push_back(id);
        std::vector<Id> results = gradients(g, seeds, wanted);
        results.push_back(y);
        const std::vector<std::vector<double>> values = run(results);
        EXPECT_LE(relative_error(values.back(), tensor64("output")), 1e-5);
        for (size_t i = 0; i < trained_.size(); ++i)
            compare(trained_[i].first, values[i], h, c, tolerance);
    }

private:
    bool has(const std::string &name) const { return file_.find("param." + name); }
    double number(const char *key, double otherwise) const {
        const auto at = file_.metadata().find(key);
        return at == file_.metadata().end() || at->second == "None" ? otherwise
                                                                    : std::stod(at->second);
    }
    std::vector<double> tensor64(const std::string &name) const {
        const TensorInfo *info = file_.find(name);
        std::vector<double> values(info->count());
        file_.read(name, info->shape, DType::f64, values.data());
        return values;
    }
    Shape shape_of(const std::string &name) const {
        const auto &dims = file_.find(name)->shape;
        return {dims[0], dims[1], dims[2]};
    }
    Id data(std::vector<double> values, Shape shape, bool needs = false) {
        const Id id = graph_.external("data", DType::f64, shape, needs);
        places_.push_back({id, data_.emplace_back(std::move(values)).data()});
        return id;
    }
    Id trained(const std::string &name, Shape shape) {
        const Id id = data(tensor64(name == "input" ? name : "param." + name), shape, true);
        trained_.push_back({name, id});
        return id;
    }
    // [4, C]: PonderTTT's are stored so, the official ones as [C, 1, 4].
    Id taps(const std::string &conv, int64_t c) {
        if (ponder_)
            return trained(conv + ".kernel", {4, c});
        trained_.push_back(
            {conv + ".weight",
             data(turned(tensor64("param." + conv + ".weight"), c, 4), {4, c}, true)});
        return trained_.back().second;
    }
    static std::vector<double> turned(const std::vector<double> &x, int64_t rows, int64_t columns) {
        std::vector<double> y(x.size());
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                y[size_t(j * rows + i)] = x[size_t(i * columns + j)];
        return y;
    }
    // PonderTTT has one layer a head.
    std::vector<double> heads(const std::string &prefix, const char *part, int64_t h) const {
        std::vector<double> all;
        for (int64_t i = 0; i < h; ++i)
            for (double x :
                 tensor64(prefix + "learnable_ttt_lr_layers." + std::to_string(i) + part))
                all.push_back(x);
        return all;
    }
    Id rate_weight(int64_t h, int64_t c) {
        if (!ponder_)
            return trained("learnable_ttt_lr_weight", {h, c});
        trained_.push_back({"heads.kernel", data(heads("param.", ".kernel", h), {h, c}, true)});
        return trained_.back().second;
    }
    Id rate_bias(int64_t h) {
        if (!ponder_)
            return trained("learnable_ttt_lr_bias", {h});
        trained_.push_back({"heads.bias", data(heads("param.", ".bias", h), {h}, true)});
        return trained_.back().second;
    }
    std::vector<std::pair<std::string, Shape>> state_shapes(int64_t h, int64_t d) const {
        if (!form_.mlp)
            return {{"W1", {1, h, d, d}}, {"b1", {1, h, d}}};
        return {{"W1", {1, h, d, 4 * d}},
                {"b1", {1, h, 4 * d}},
                {"W2", {1, h, 4 * d, d}},
                {"b2", {1, h, d}}};
    }
    static Shape per_stream(Shape shape, int64_t streams) {
        shape.dim[0] = streams;
        return shape;
    }
    std::vector<std::vector<double>> run(const std::vector<Id> &results) {
        std::vector<std::vector<double>> values;
        for (Id id : results) {
            graph_.expose(id, "result");
            values.emplace_back(size_t(graph_.shape(id).count()));
        }
        for (size_t i = 0; i < results.size(); ++i)
            places_.push_back({results[i], values[i].data()});
        const auto runtime = make_runtime(1);
        const auto device = std::make_shared<Device>(runtime->backend("reference"), runtime->memory,
                                                     runtime->threads, nullptr);
        const Program program(graph_, {graph_.calls().size()}, device);
        Program::Bindings at(graph_.values().size());
        for (const auto &[id, place] : places_)
            at[size_t(id)] = place;
        std::vector<std::byte> arena(program.arena_bytes() + 64);
        program.run(0, at, arena.data(), nullptr, nullptr);
        return values;
    }
    void compare(const std::string &name, const std::vector<double> &ours, int64_t h, int64_t c,
                 double tolerance) const {
        std::vector<double> theirs;
        if (name.starts_with("heads"))
            theirs = heads("grad.", name.c_str() + 5, h);
        else if (!ponder_ && name.starts_with("conv_") && name.ends_with("weight"))
            theirs = turned(tensor64("grad." + name), c, 4);
        else
            theirs = tensor64("grad." + name);
        double norm = 0;
        for (double x : theirs)
            norm += x * x;
        if (norm > 0) {
            EXPECT_LE(relative_error(ours, theirs), tolerance) << name;
        }
    }

    const SafeTensors file_;
    const bool ponder_;
    TttScan form_;
    Graph graph_;
    std::deque<std::vector<double>> data_;
    std::vector<std::pair<Id, void *>> places_;
    std::vector<std::pair<std::string, Id>> trained_;
};

TEST(Fixtures, GradientsOfTttLayers) {
    for (const char *name :
         {"ponder_ttt_layer_a", "ponder_ttt_layer_b", "ponder_ttt_layer_c", "ttt_official_linear_a",
          "ttt_official_linear_b", "ttt_official_mlp_a", "ttt_official_mlp_b"})
        for (const bool composed : {false, true}) {
            SCOPED_TRACE(std::string(name) + (composed ? ", composed" : ", fused"));
            LayerFixture(name, composed).check(1e-4);
        }
}

} // namespace
} // namespace ponder::test
