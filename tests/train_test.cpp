// Training: gradients through the inner loop against finite differences in float64, both forms of
// every fused op, fixtures with grad.*, and trainers as a whole.
#include "expect_error.hpp"
#include "free_port.hpp"
#include "support.hpp"

#include "formats/gpt2_write.hpp"
#include "tensor/compose.hpp"
#include "train/adapter_trainer.hpp"
#include "train/backbone_trainer.hpp"

#include <deque>
#include <gtest/gtest.h>

#include <thread>
#include <tuple>

namespace ponder::test {
namespace {

constexpr Gpt2Config small{2, 8, 2, 16, 32, 20, 1e-5, true};

// A folder with random weights.
void write_backbone(const std::string &folder, const Gpt2Config &config, double spread = 0.3) {
    Random random(11);
    Gpt2 shapes(config, DType::f32);
    std::vector<std::vector<float>> values;
    std::vector<Gpt2Tensor> tensors;
    for (const Gpt2::Weight &w : shapes.weights()) {
        std::vector<float> &to = values.emplace_back(size_t(w.shape.count()));
        const bool norm = w.name.find("ln_") != std::string::npos && w.name.ends_with("weight");
        for (float &x : to)
            x = float((norm ? 1.0 : 0.0) + spread * random.normal());
        tensors.push_back({w.name, {w.shape.dim, w.shape.dim + w.shape.rank}, to.data()});
    }
    write_gpt2(folder, config, DType::f32, tensors);
}

// ---- through the inner loop

struct Float64Loop {
    TempDir folder;
    std::shared_ptr<const Runtime> runtime = make_runtime(1);
    std::shared_ptr<const Device> device = std::make_shared<Device>(
        runtime->backend("reference"), runtime->memory, runtime->threads, nullptr);
    Options options;
    std::unique_ptr<Gpt2> model;
    std::shared_ptr<Adapter> adapter;
    std::vector<double> fast, rate, keep;
    std::unique_ptr<Unroll<double>> unroll;
    std::shared_ptr<Unroll<double>::Work> work;
    std::vector<int32_t> tokens;

    explicit Float64Loop(std::initializer_list<std::pair<const char *, std::string>> values,
                         size_t count = 40) {
        options = make_options({{"chunk", "8"},
                                {"context", "8"},
                                {"lora.rank", "2"},
                                {"lora.layers", "all"},
                                {"inner.epsilon", "1e-2"},
                                {"inner.lr", "0.05"},
                                {"inner.clip", "0.5"},
                                {"train.higher", "1"}});
        for (const auto &[name, value] : values)
            options.set(name, value);
        write_backbone(folder.path(), small);
        model = std::make_unique<Gpt2>(Gpt2Folder(folder.path()), DType::f64, runtime->memory,
                                       [](uint64_t, uint64_t) {});
        adapter = make_adapter(small, options, "");
        Random random(5);
        const size_t n = adapter->fast_count();
        for (size_t i = 0; i < n; ++i) {
            fast.push_back(0.3 * random.normal());
            rate.push_back(0.05 * (1 + random.uniform()));
            keep.push_back(0.9 + 0.1 * random.uniform());
        }
        make();
        tokens = uniform_tokens(count, small.vocabulary, 3);
    }
    void make() {
        unroll = std::make_unique<Unroll<double>>(
            *model, *adapter, options, device,
            LearnedRates<double>{rate.data(), keep.data(), fast.data()});
        work = unroll->make_work();
    }
    Unroll<double>::Result run() { return unroll->run(tokens, *work, nullptr); }
    // The objective: the outer loss, and for a TTT layer the reconstruction loss beside it.
    double value() {
        const auto r = run();
        const double beta = adapter->learns_inside() && options.boolean("train.inner")
                                ? options.number("train.reconstruction")
                                : 0;
        return r.loss + beta * r.reconstruction;
    }
    // Central differences of every `stride`-th element, fourth order.
    template <class V>
    std::pair<std::vector<double>, std::vector<double>>
    compare(V &values, const std::vector<double> &gradient, size_t stride, double h) {
        std::vector<double> analytic, numeric;
        for (size_t i = 0; i < values.size(); i += stride) {
            const auto x = values[i];
            const auto at = [&](double offset) {
                values[i] = x;
                values[i] += offset;
                return value();
            };
            numeric.push_back((8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h));
            values[i] = x;
            analytic.push_back(gradient[i]);
        }
        return {analytic, numeric};
    }
    void check(double tolerance) {
        const auto r = run();
        const size_t stride = fast.size() / 40 + 1;
        for (const auto &[values, gradient, name] :
             {std::tuple(&fast, &r.fast, "fast"), std::tuple(&rate, &r.rate, "rate"),
              std::tuple(&keep, &r.keep, "keep")}) {
            if (adapter->learns_inside() && values != &fast)
                continue;
            const auto [analytic, numeric] = compare(*values, *gradient, stride, 1e-4);
            EXPECT_LE(relative_error(analytic, numeric), tolerance) << name;
        }
    }
};

TEST(Unrolled, AdamThroughTimeMatchesDifferences) { Float64Loop({}).check(1e-6); }
TEST(Unrolled, SgdThroughTimeMatchesDifferences) {
    Float64Loop({{"inner.optimizer", "sgd"}}).check(1e-6);
}
TEST(Unrolled, SeveralStepsAChunk) { Float64Loop({{"steps", "3"}}, 24).check(1e-6); }
TEST(Unrolled, WithContextBeforeTheChunk) { Float64Loop({{"context", "24"}}).check(1e-6); }
TEST(Unrolled, SomeLayersAndModules) {
    Float64Loop({{"lora.layers", "1"}, {"lora.modules", "attn.c_attn,mlp.c_fc"}}).check(1e-6);
}
TEST(Unrolled, StaticAdapter) {
    Float64Loop loop({{"train.inner", "0"}});
    const auto r = loop.run();
    EXPECT_EQ(r.steps, 0u);
    const auto [analytic, numeric] = loop.compare(loop.fast, r.fast, 9, 1e-4);
    EXPECT_LE(relative_error(analytic, numeric), 1e-7);
}
// A step size of zero leaves nothing for the second order: both modes agree, and with the truth.
TEST(Unrolled, FirstOrderIsExactWhereNothingMoves) {
    Float64Loop loop({{"train.higher", "0"}});
    std::fill(loop.rate.begin(), loop.rate.end(), 0.0);
    const auto r = loop.run();
    const auto [analytic, numeric] = loop.compare(loop.fast, r.fast, 9, 1e-4);
    EXPECT_LE(relative_error(analytic, numeric), 1e-7);
    // The rates' own first-order gradient is exact where only the last step counts.
    Float64Loop last({{"train.higher", "0"}}, 16);
    const auto first = last.run();
    const auto [a, n] = last.compare(last.rate, first.rate, 9, 1e-4);
    EXPECT_LE(relative_error(a, n), 1e-6);
}
TEST(Unrolled, KeptActivationsChangeNothing) {
    Float64Loop again({}), kept({{"train.keep", "1"}});
    const auto a = again.run(), b = kept.run();
    EXPECT_EQ(a.fast, b.fast);
    EXPECT_EQ(a.rate, b.rate);
    EXPECT_EQ(a.keep, b.keep);
    EXPECT_LT(b.flops, a.flops);
}
TEST(Unrolled, WindowsCutTheGradientAndNothingElse) {
    Float64Loop whole({}, 48), cut({{"train.window", "2"}}, 48);
    const auto a = whole.run(), b = cut.run();
    EXPECT_EQ(a.loss, b.loss);
    EXPECT_EQ(a.steps, b.steps);
    EXPECT_GT(relative_error(b.fast, a.fast), 1e-3);
}

// Slow parameters are f32: steps that f32 holds exactly.
void check_slow(Float64Loop &loop, double tolerance) {
    const auto r = loop.run();
    size_t offset = 0;
    for (const auto &[name, slow] : loop.adapter->slow()) {
        const std::span<float> values = loop.adapter->slow_values(name);
        const std::vector<double> gradient(r.slow.begin() + std::ptrdiff_t(offset),
                                           r.slow.begin() + std::ptrdiff_t(offset + values.size()));
        offset += values.size();
        for (float &x : values)
            x = float(std::round(double(x) * 4096) / 4096);
        const auto again = loop.run();
        std::vector<double> now(again.slow.begin() + std::ptrdiff_t(offset - values.size()),
                                again.slow.begin() + std::ptrdiff_t(offset));
        const auto [analytic, numeric] =
            loop.compare(values, now, values.size() / 5 + 1, 1.0 / 1024);
        double norm = 0;
        for (double x : numeric)
            norm += x * x;
        if (norm > 1e-16) {
            EXPECT_LE(relative_error(analytic, numeric), tolerance) << name;
        }
    }
}

TEST(Unrolled, TttLinearCarriedOverChunks) {
    Float64Loop loop({{"adapter", "ttt-linear"}, {"ttt.mini_batch", "4"}});
    loop.check(1e-6);
    check_slow(loop, 1e-5);
}
TEST(Unrolled, PonderTttLayer) {
    Float64Loop loop({{"adapter", "ttt-linear"},
                      {"ttt.form", "ponder"},
                      {"ttt.mini_batch", "4"},
                      {"ttt.decay", "0.2"},
                      {"ttt.max_gradient_norm", "0.5"}});
    loop.check(1e-6);
}
TEST(Unrolled, TttMlpWithoutCarry) {
    Float64Loop loop(
        {{"adapter", "ttt-mlp"}, {"ttt.mini_batch", "3"}, {"ttt.carry", "0"}, {"ttt.gate", "0"}},
        24);
    loop.check(1e-6);
    check_slow(loop, 1e-5);
}

// ---- both forms of a fused op

// One recording run on the reference backend in f64: externals in, exposed values out.
class Recorder {
public:
    explicit Recorder(bool higher, bool differentiable = true)
        : graph(DType::f64, Mode{.higher = higher}), differentiable_(differentiable) {}
    Graph graph;

    Id input(Shape shape, double spread = 0.5, double centre = 0) {
        const Id id = graph.external("input", DType::f64, shape, differentiable_);
        std::vector<double> &values = doubles_.emplace_back(size_t(shape.count()));
        for (double &x : values)
            x = centre + spread * random_.normal();
        places_.push_back({id, values.data()});
        inputs.push_back(id);
        return id;
    }
    Id targets(Shape shape, int64_t vocabulary) {
        const Id id = graph.external("targets", DType::i32, shape);
        std::vector<int32_t> &values = ints_.emplace_back(size_t(shape.count()));
        for (int32_t &x : values)
            x = int32_t(random_.next() % uint64_t(vocabulary));
        values.back() = -1;
        places_.push_back({id, values.data()});
        return id;
    }
    // Values of `outputs`, then, where inputs are differentiable, the gradients of
    // sum(outputs * random weights) for every input.
    std::vector<std::vector<double>> run(const std::vector<Id> &outputs) {
        std::vector<Id> results = outputs;
        if (differentiable_) {
            const std::vector<Id> wanted = inputs;
            std::vector<Seed> seeds;
            for (Id out : outputs)
                seeds.push_back({out, input(graph.shape(out))});
            const std::vector<Id> gradient = gradients(graph, seeds, wanted);
            results.insert(results.end(), gradient.begin(), gradient.end());
        }
        std::vector<std::vector<double>> values;
        for (Id id : results) {
            graph.expose(id, "result");
            values.emplace_back(size_t(graph.shape(id).count()));
        }
        for (size_t i = 0; i < results.size(); ++i)
            places_.push_back({results[i], values[i].data()});
        const auto runtime = make_runtime(1);
        const auto device = std::make_shared<Device>(runtime->backend("reference"), runtime->memory,
                                                     runtime->threads, nullptr);
        const size_t end = graph.calls().size(), count = graph.values().size();
        const Program program(graph, {end}, device);
        Program::Bindings at(count);
        for (const auto &[id, place] : places_)
            at[size_t(id)] = place;
        std::vector<std::byte> arena(program.arena_bytes() + 64);
        program.run(0, at, arena.data(), nullptr, nullptr);
        return values;
    }
    std::vector<Id> inputs;

private:
    const bool differentiable_;
    Random random_{17};
    std::deque<std::vector<double>> doubles_;
    std::deque<std::vector<int32_t>> ints_;
    std::vector<std::pair<Id, void *>> places_;
};

void same_in_both_forms(const char *name, const std::function<std::vector<Id>(Recorder &)> &build) {
    Recorder fused(false), composed(true);
    const auto a = fused.run(build(fused)), b = composed.run(build(composed));
    EXPECT_LT(fused.graph.calls().size(), composed.graph.calls().size()) << name;
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i)
        EXPECT_LE(relative_error(a[i], b[i]), 1e-10) << name << ", result " << i;
}

TEST(BothForms, OfEveryFusedOp) {
    same_in_both_forms("layer_norm", [](Recorder &r) {
        const Id x = r.input({2, 5, 8});
        return std::vector{layer_norm(r.graph, x, r.input({8}), r.input({8}), 1e-5, DType::f64)};
    });
    same_in_both_forms("gelu", [](Recorder &r) {
        return std::vector{mul(r.graph, gelu(r.graph, r.input({2, 5, 8})), r.input({8}))};
    });
    same_in_both_forms("lora_linear", [](Recorder &r) {
        Graph &g = r.graph;
        const Id w = g.literal({6, 7}, std::vector<double>(42, 0.1));
        return std::vector{lora_linear(g, r.input({2, 5, 6}), w, none, r.input({2, 6, 3}),
                                       r.input({2, 3, 7}), r.input({2, 5, 7}), 0.5, DType::f64)};
    });
    same_in_both_forms("attention", [](Recorder &r) {
        return std::vector{attention(r.graph, r.input({2, 6, 24}), 2, 0)};
    });
    same_in_both_forms("cross_entropy", [](Recorder &r) {
        const Id h = r.input({2, 5, 8}), table = r.input({11, 8});
        return std::vector{cross_entropy(r.graph, h, table, r.targets({2, 5}, 11), true).nll};
    });
    for (const int64_t shift : {0, 1})
        same_in_both_forms("conv1d", [=](Recorder &r) {
            const Id x = r.input({2, 7, 6});
            return std::vector{conv1d(r.graph, x, r.input({4, 6}), r.input({6}), shift)};
        });
}

std::vector<Id> scan(Recorder &r, const TttScan &form, int64_t tokens) {
    const int64_t heads = 2, d = 4, width = heads * d, inner = form.mlp ? 4 * d : d;
    Graph &g = r.graph;
    const Id q = r.input({2, tokens, width}), k = r.input({2, tokens, width}),
             v = r.input({2, tokens, width});
    const Id lr = sigmoid(g, r.input({2, tokens, heads}));
    const Id index = r.input({4}, 0.1), scale = r.input({heads, d}, 0.2, 1),
             shift = r.input({heads, d});
    std::vector<Id> state{r.input({2, heads, d, inner}), r.input({2, heads, inner})};
    if (form.mlp) {
        state.push_back(r.input({2, heads, inner, d}));
        state.push_back(r.input({2, heads, d}));
    }
    const TttResult result = ttt_scan(g, q, k, v, lr, index, scale, shift, state, form);
    std::vector<Id> out{result.y, result.loss};
    out.insert(out.end(), result.state.begin(), result.state.end());
    return out;
}

TEST(BothForms, OfTheTttScan) {
    TttScan official, ponder;
    official.scale = 0.3;
    ponder = {false, true, 0.3, 0.25, 1e-5, 0.4, -1};
    for (const int64_t tokens : {12, 10}) {
        same_in_both_forms("official", [&](Recorder &r) { return scan(r, official, tokens); });
        same_in_both_forms("ponder", [&](Recorder &r) { return scan(r, ponder, tokens); });
    }
}

// The MLP's forward kernel against its composition, which is all that its gradient is made of.
TEST(BothForms, TttMlpForward) {
    TttScan form;
    form.mlp = true;
    form.scale = 0.2;
    Recorder composed(true), fused(false, false);
    const auto expected = composed.run(scan(composed, form, 10));
    const auto values = fused.run(scan(fused, form, 10));
    EXPECT_LT(fused.graph.calls().size(), size_t(8));
    for (size_t i = 0; i < values.size(); ++i)
        EXPECT_LE(relative_error(values[i], expected[i]), 1e-12);
}

// ---- fixtures of other implementations

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

// ---- backbones

// The pass that trains a backbone, in float64.
struct BackbonePass {
    BackbonePass(const Gpt2Config &config, Mode mode, int64_t streams, int64_t length)
        : config_(config), runtime_(make_runtime(1)),
          device_(std::make_shared<Device>(runtime_->backend("reference"), runtime_->memory,
                                           runtime_->threads, nullptr)) {
        write_backbone(folder_.path(), config);
        model = std::make_unique<Gpt2>(Gpt2Folder(folder_.path()), DType::f64, runtime_->memory,
                                       [](uint64_t, uint64_t) {});
        mode.train_backbone = true;
        Graph g(DType::f64, mode);
        const Id tokens = g.external("tokens", DType::i32, {streams, length});
        const Id targets = g.external("targets", DType::i32, {streams, length});
        const Id seed = g.mode.dropout_seed = g.external("seed", DType::i32, {2});
        const Id hidden = model->hidden(g, tokens, length, Adapter(), g.act);
        const Id loss =
            mean(g, cross_entropy(g, hidden, model->head(g), targets, true).nll, streams * length);
        std::vector<size_t> ends = {g.calls().size()};
        std::vector<Id> wanted;
        for (const Gpt2::Weight &w : model->weights())
            wanted.push_back(g.weight(w.name, w.type, w.shape, w.data, true));
        const std::vector<Id> ids = ponder::gradients(g, loss, wanted);
        g.expose(loss, "loss");
        for (Id id : ids)
            g.expose(id, "gradient");
        ends.insert(ends.end(), g.breaks().begin(), g.breaks().end());
        ends.push_back(g.calls().size());
        tokens_ = uniform_tokens(size_t(streams * length) + 1, config.vocabulary, 3);
        at_.resize(g.values().size());
        at_[size_t(tokens)] = tokens_.data();
        at_[size_t(targets)] = tokens_.data() + 1;
        at_[size_t(seed)] = seeds_;
        at_[size_t(loss)] = &loss_;
        for (Id id : ids)
            at_[size_t(id)] = gradients.emplace_back(size_t(g.shape(id).count())).data();
        program = std::make_unique<const Program>(std::move(g), std::move(ends), device_);
        arena_.resize(program->arena_bytes());
    }
    double loss() {
        program->run(0, at_, arena_.data(), nullptr, nullptr);
        return loss_;
    }
    void differentiate() {
        for (size_t i = 0; i < program->segments(); ++i)
            program->run(i, at_, arena_.data(), nullptr, nullptr);
    }

    std::unique_ptr<Gpt2> model;
    std::unique_ptr<const Program> program;
    std::deque<std::vector<double>> gradients; // one for each of the model's weights

private:
    const TempDir folder_;
    const Gpt2Config config_;
    const std::shared_ptr<const Runtime> runtime_;
    const std::shared_ptr<Device> device_;
    std::vector<int32_t> tokens_;
    int32_t seeds_[2] = {7, 1};
    double loss_ = 0;
    Program::Bindings at_;
    std::vector<std::byte> arena_;
};

const Mode plain_mode, dropping{.dropout = 0.25, .attention_dropout = 0.3};
const Mode dropping_again{.dropout = 0.25, .attention_dropout = 0.3, .recompute = true};

// Every weight of a backbone, against differences in float64.
TEST(Backbone, EveryWeightMatchesDifferences) {
    for (const Mode &mode : {plain_mode, dropping, dropping_again}) {
        BackbonePass pass(small, mode, 2, 6);
        pass.differentiate();
        const auto weights = pass.model->weights();
        for (size_t w = 0; w < weights.size(); ++w) {
            double *x = reinterpret_cast<double *>(weights[w].data);
            const std::vector<double> &analytic = pass.gradients[w];
            std::vector<double> a, n;
            for (size_t i = 0; i < analytic.size(); i += analytic.size() / 7 + 1) {
                const double kept = x[i], h = 1e-5;
                x[i] = kept + h;
                const double above = pass.loss();
                x[i] = kept - h;
                n.push_back((above - pass.loss()) / (2 * h));
                x[i] = kept;
                a.push_back(analytic[i]);
            }
            double norm = 0;
            for (double d : n)
                norm += d * d;
            if (norm > 1e-18) {
                EXPECT_LE(relative_error(a, n), 1e-6) << weights[w].name;
            }
        }
    }
}

// Activations that are computed again: the same numbers, less memory, and no more work than the
// blocks' own forward pass.
TEST(Backbone, RecomputingChangesNothingButMemory) {
    const Gpt2Config deep{8, 16, 2, 64, 32, 20, 1e-5, true};
    BackbonePass kept(deep, dropping, 2, 24), again(deep, dropping_again, 2, 24);
    kept.differentiate();
    again.differentiate();
    EXPECT_EQ(kept.gradients, again.gradients);
    EXPECT_LT(again.program->arena_bytes(), kept.program->arena_bytes() / 3);
    const auto flops = [](const Program &p) {
        uint64_t sum = 0;
        for (size_t i = 0; i < p.segments(); ++i)
            sum += p.flops(i);
        return sum;
    };
    EXPECT_GT(flops(*again.program), flops(*kept.program));
    EXPECT_LT(flops(*again.program), flops(*kept.program) + kept.program->flops(0));
}

// ---- trainers as a whole

struct Trained {
    TempDir folder;
    std::shared_ptr<const Model> model;
    std::atomic<bool> cancel{false};

    explicit Trained(const char *dtype = "f32", uint32_t threads = 2) {
        write_backbone(folder.path(), {2, 16, 2, 64, 32, 50, 1e-5, true}, 0.1);
        model = load_model(folder.path(), "cpu", dtype, threads);
    }
    Options options(std::initializer_list<std::pair<const char *, std::string>> values = {}) {
        Options o = make_options({{"chunk", "8"},
                                  {"context", "8"},
                                  {"lora.rank", "2"},
                                  {"train.lr", "1e-2"},
                                  {"train.warmup", "1"}});
        for (const auto &[name, value] : values)
            o.set(name, value);
        return o;
    }
    static std::vector<std::vector<int32_t>> batch(uint64_t seed, size_t tokens) {
        std::vector<std::vector<int32_t>> streams;
        for (uint64_t s = 0; s < 3; ++s) {
            // A pattern to be learned, and some noise.
            std::vector<int32_t> ids = uniform_tokens(tokens, 50, seed * 16 + s);
            for (size_t i = 0; i < ids.size(); ++i)
                if (ids[i] % 4 != 0)
                    ids[i] = int32_t(i * 7 % 13);
            streams.push_back(ids);
        }
        return streams;
    }
    ponder_train_record step(Trainer &trainer, uint64_t seed, size_t tokens,
                             const ponder_call *limits = nullptr) {
        const auto streams = batch(seed, tokens);
        std::vector<ponder_stream> given;
        for (const auto &s : streams)
            given.push_back({s.data(), s.size()});
        return trainer.step(given, CallGuard(cancel, limits));
    }
};

const std::initializer_list<std::tuple<int32_t, const char *, size_t>> kinds{
    {PONDER_TRAIN_ADAPTER, "lora", 40},
    {PONDER_TRAIN_ADAPTER, "ttt-linear", 40},
    {PONDER_TRAIN_ADAPTER, "ttt-mlp", 40},
    {PONDER_TRAIN_BACKBONE, "none", 17}};

TEST(TrainerTest, LossFalls) {
    for (const char *dtype : {"f32", "bf16"}) {
        Trained t(dtype);
        for (const auto &[kind, adapter, tokens] : kinds) {
            const auto trainer = make_trainer(t.model, kind, t.options({{"adapter", adapter}}));
            const double first = t.step(*trainer, 0, tokens).loss;
            double last = 0;
            for (int i = 0; i < 40; ++i)
                last = t.step(*trainer, 0, tokens).loss;
            EXPECT_LT(last, first - 0.1) << adapter << " " << dtype;
            EXPECT_EQ(trainer->steps(), 41u);
        }
    }
}

TEST(TrainerTest, ABackboneWithDropoutLearnsAndMayRecompute) {
    for (const char *dtype : {"f32", "bf16"}) {
        Trained t(dtype);
        std::vector<double> losses[2];
        for (const bool again : {false, true}) {
            const auto trainer = make_trainer(t.model, PONDER_TRAIN_BACKBONE,
                                              t.options({{"adapter", "none"},
                                                         {"train.dropout", "0.05"},
                                                         {"train.attention_dropout", "0.1"},
                                                         {"train.recompute", again ? "1" : "0"}}));
            for (int i = 0; i < 40; ++i)
                losses[again].push_back(t.step(*trainer, 0, 17).loss);
        }
        EXPECT_EQ(losses[0], losses[1]) << dtype;
        EXPECT_LT(losses[0].back(), losses[0].front() - 0.1) << dtype;
    }
}

TEST(TrainerTest, ACheckpointGoesOnBitForBit) {
    Trained t;
    for (const auto &[kind, adapter, tokens] : kinds) {
        const Options options = t.options({{"adapter", adapter},
                                           {"train.dropout", "0.1"},
                                           {"train.permute", "0.2"},
                                           {"train.average", "0.6"}});
        const auto whole = make_trainer(t.model, kind, options);
        const TempDir dir;
        std::vector<double> losses;
        for (uint64_t i = 0; i < 4; ++i) {
            losses.push_back(t.step(*whole, i, tokens).loss);
            if (i == 1)
                whole->save(dir.file("at-2.ckpt"), "position 2");
        }
        const auto resumed = make_trainer(t.model, kind, options);
        resumed->load(dir.file("at-2.ckpt"));
        EXPECT_EQ(resumed->note(), "position 2");
        EXPECT_EQ(resumed->steps(), 2u);
        for (uint64_t i = 2; i < 4; ++i)
            EXPECT_EQ(t.step(*resumed, i, tokens).loss, losses[i]) << adapter;
        whole->save(dir.file("a.ckpt"), "");
        resumed->save(dir.file("b.ckpt"), "");
        EXPECT_EQ(read_file(dir.file("a.ckpt"), 1 << 24), read_file(dir.file("b.ckpt"), 1 << 24));
        // Another kind, other options, a damaged file: refused, and nothing has changed.
        const auto other =
            make_trainer(t.model, kind, t.options({{"adapter", adapter}, {"train.lr", "2e-2"}}));
        EXPECT_THROW(other->load(dir.file("a.ckpt")), Error);
        std::string bytes = read_file(dir.file("a.ckpt"), 1 << 24);
        bytes.resize(bytes.size() - 5);
        dir.write("cut.ckpt", bytes);
        EXPECT_THROW(resumed->load(dir.file("cut.ckpt")), Error);
        EXPECT_EQ(resumed->steps(), 4u);
    }
}

TEST(TrainerTest, ThreadsDoNotMatter) {
    for (const auto &[kind, adapter, tokens] : kinds) {
        std::vector<std::string> files;
        for (const uint32_t threads : {1u, 3u}) {
            Trained t("f32", threads);
            const auto trainer = make_trainer(t.model, kind, t.options({{"adapter", adapter}}));
            for (uint64_t i = 0; i < 3; ++i)
                t.step(*trainer, i, tokens);
            const TempDir dir;
            trainer->save(dir.file("x"), "");
            files.push_back(read_file(dir.file("x"), 1 << 24));
        }
        EXPECT_EQ(files[0], files[1]) << adapter;
    }
}

// Three processes (threads stand for them) on a batch of three: each has the same values, bit for
// bit, and those are one process's up to the order of a sum; any number goes on from a checkpoint.
TEST(TrainerTest, ProcessesTakeOneStepTogether) {
    for (const auto &[kind, adapter, tokens] : kinds) {
        SCOPED_TRACE(adapter);
        const TempDir dir;
        std::vector<ponder_train_record> records[4];
        const auto train = [&](size_t at, Trained &t, const Options &options) {
            const auto trainer = make_trainer(t.model, kind, options);
            for (uint64_t i = 0; i < 3; ++i)
                records[at].push_back(t.step(*trainer, i, tokens));
            trainer->save(dir.file(std::to_string(at)), "");
        };
        Trained alone;
        train(3, alone, alone.options({{"adapter", adapter}}));
        const std::string address = free_address();
        std::vector<std::thread> processes;
        for (size_t r = 0; r < 3; ++r)
            processes.emplace_back([&, r] {
                Trained t;
                train(r, t,
                      t.options({{"adapter", adapter},
                                 {"train.world", "3"},
                                 {"train.rank", std::to_string(r)},
                                 {"train.address", address}}));
            });
        for (std::thread &p : processes)
            p.join();
        const SafeTensors whole = SafeTensors::open(dir.file("3"));
        const std::vector<float> wanted = tensor(whole, "outer.values");
        for (size_t r = 0; r < 3; ++r) {
            EXPECT_EQ(read_file(dir.file(std::to_string(r)), 1 << 24),
                      read_file(dir.file("0"), 1 << 24));
            ASSERT_EQ(records[r].size(), 3u);
            for (size_t i = 0; i < 3; ++i) {
                EXPECT_NEAR(records[r][i].loss, records[3][i].loss, 1e-4);
                EXPECT_EQ(records[r][i].tokens, records[3][i].tokens);
                EXPECT_EQ(records[r][i].flops, records[3][i].flops);
            }
        }
        const SafeTensors shared = SafeTensors::open(dir.file("0"));
        EXPECT_LE(relative_error(tensor(shared, "outer.values"), wanted), 1e-3);
        const auto resumed = make_trainer(alone.model, kind, alone.options({{"adapter", adapter}}));
        resumed->load(dir.file("0"));
        EXPECT_EQ(resumed->steps(), 3u);
    }
}

// What fails in one process fails in all, and changes none.
TEST(TrainerTest, ProcessesFailTogether) {
    const std::string address = free_address();
    const TempDir dir;
    ponder_status status[2] = {};
    std::vector<std::thread> processes;
    for (size_t r = 0; r < 2; ++r)
        processes.emplace_back([&, r] {
            Trained t;
            const auto trainer = make_trainer(t.model, PONDER_TRAIN_ADAPTER,
                                              t.options({{"train.world", "2"},
                                                         {"train.rank", std::to_string(r)},
                                                         {"train.address", address}}));
            t.step(*trainer, 0, 40);
            ponder_call late{};
            late.struct_size = sizeof late;
            late.timeout_ns = 1;
            status[r] = thrown_status([&] { t.step(*trainer, 1, 40, r == 1 ? &late : nullptr); });
            EXPECT_EQ(trainer->steps(), 1u);
            t.step(*trainer, 1, 40); // and they go on
            trainer->save(dir.file(std::to_string(r)), "");
        });
    for (std::thread &p : processes)
        p.join();
    EXPECT_EQ(status[0], PONDER_E_CANCELLED);
    EXPECT_EQ(status[1], PONDER_E_DEADLINE);
    EXPECT_EQ(read_file(dir.file("0"), 1 << 24), read_file(dir.file("1"), 1 << 24));
}

TEST(TrainerTest, CancelledAndRefusedStepsChangeNothing) {
    Trained t;
    const auto trainer = make_trainer(t.model, PONDER_TRAIN_ADAPTER, t.options());
    const TempDir dir;
    t.step(*trainer, 0, 40);
    trainer->save(dir.file("a"), "");
    ponder_call late{};
    late.struct_size = sizeof late;
    late.timeout_ns = 1;
    const auto ids = Trained::batch(1, 40)[0];
    const ponder_stream stream{ids.data(), ids.size()};
    EXPECT_THROW(trainer->step({&stream, 1}, CallGuard(t.cancel, &late)), Error);
    const ponder_stream small_stream{ids.data(), 12};
    EXPECT_THROW(trainer->step({&small_stream, 1}, CallGuard(t.cancel, nullptr)), Error);
    std::vector<int32_t> bad = ids;
    bad[3] = 50;
    const ponder_stream wrong{bad.data(), bad.size()};
    EXPECT_THROW(trainer->step({&wrong, 1}, CallGuard(t.cancel, nullptr)), Error);
    trainer->save(dir.file("b"), "");
    EXPECT_EQ(read_file(dir.file("a"), 1 << 24), read_file(dir.file("b"), 1 << 24));
}

// Without inner steps a TTT layer is static, in training and where it is used.
TEST(TrainerTest, AStaticTttLayerTakesNoSteps) {
    Trained t;
    const auto trainer = make_trainer(t.model, PONDER_TRAIN_ADAPTER,
                                      t.options({{"adapter", "ttt-linear"}, {"train.inner", "0"}}));
    EXPECT_EQ(t.step(*trainer, 0, 40).cost, 0);
    const TempDir dir;
    trainer->export_to(dir.path());
    Session session(t.model,
                    make_options({{"adapter", dir.path()}, {"chunk", "8"}, {"context", "8"}}));
    session.feed(Trained::batch(9, 40)[1]);
    session.adapt(no_limits(session));
    for (const ponder_record &r : session.records())
        EXPECT_EQ(r.update_norm, 0);
}

// Exported is the mean of the first two steps, then what fades by half with each one; the steps
// themselves are the same without it.
TEST(TrainerTest, ExportsTheAverageOfItsSteps) {
    Trained t;
    const auto exported = [&](const Trainer &trainer, bool adapter) {
        const TempDir dir;
        trainer.export_to(dir.path());
        const SafeTensors file =
            SafeTensors::open(dir.file(adapter ? "ponder.safetensors" : "model.safetensors"));
        std::vector<float> all;
        for (const auto &[name, tensor] : file.tensors()) {
            const size_t before = all.size();
            all.resize(before + tensor.count());
            file.read(name, tensor.shape, DType::f32, all.data() + before);
        }
        return all;
    };
    for (const auto &[kind, adapter, tokens] : kinds) {
        const bool is_adapter = kind == PONDER_TRAIN_ADAPTER;
        const auto plain = make_trainer(t.model, kind, t.options({{"adapter", adapter}}));
        const auto averaging = make_trainer(
            t.model, kind, t.options({{"adapter", adapter}, {"train.average", "0.5"}}));
        EXPECT_EQ(exported(*averaging, is_adapter), exported(*plain, is_adapter));
        std::vector<double> mean;
        for (uint64_t i = 1; i <= 4; ++i) {
            EXPECT_EQ(t.step(*averaging, i, tokens).loss, t.step(*plain, i, tokens).loss);
            const std::vector<float> now = exported(*plain, is_adapter);
            mean.resize(now.size());
            for (size_t j = 0; j < now.size(); ++j)
                mean[j] += (double(now[j]) - mean[j]) * (i == 1 ? 1.0 : 0.5);
            const std::vector<float> found = exported(*averaging, is_adapter);
            ASSERT_EQ(found.size(), mean.size());
            double moved = 0;
            for (size_t j = 0; j < mean.size(); ++j) {
                ASSERT_NEAR(found[j], mean[j], 1e-6) << adapter << " step " << i;
                moved = std::max(moved, std::abs(double(now[j]) - mean[j]));
            }
            EXPECT_EQ(moved > 1e-4, i > 1) << adapter;
        }
    }
}

// An exported adapter gives a session the losses that the trainer saw.
TEST(TrainerTest, ExportsWhatASessionRuns) {
    Trained t;
    for (const char *adapter : {"lora", "ttt-linear", "ttt-mlp"}) {
        const auto trainer =
            make_trainer(t.model, PONDER_TRAIN_ADAPTER, t.options({{"adapter", adapter}}));
        for (uint64_t i = 0; i < 5; ++i)
            t.step(*trainer, i, 40);
        const TempDir dir;
        trainer->export_to(dir.path());
        const auto ids = Trained::batch(9, 40)[1];
        const ponder_stream stream{ids.data(), ids.size()};
        const double expected = trainer->step({&stream, 1}, CallGuard(t.cancel, nullptr)).loss;
        Session session(t.model,
                        make_options({{"adapter", dir.path()}, {"chunk", "8"}, {"context", "8"}}));
        session.feed(ids);
        session.adapt(no_limits(session));
        double sum = 0;
        const size_t first = std::string(adapter) == "lora" ? 1 : 0;
        for (size_t c = first; c < 5; ++c)
            sum += session.records()[c].loss_before;
        EXPECT_NEAR(sum / double(5 - first), expected, 1e-5) << adapter;
    }
    // A backbone's folder loads, and has the weights that were trained.
    const auto trainer = make_trainer(t.model, PONDER_TRAIN_BACKBONE, t.options());
    t.step(*trainer, 0, 17);
    const TempDir dir;
    trainer->export_to(dir.path());
    const auto again =
        make_trainer(load_model(dir.path(), "cpu"), PONDER_TRAIN_BACKBONE, t.options());
    EXPECT_EQ(t.step(*again, 1, 17).loss, t.step(*trainer, 1, 17).loss);
}

} // namespace
} // namespace ponder::test
