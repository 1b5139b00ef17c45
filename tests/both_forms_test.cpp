// Both forms of every fused op: as one call with its hand-written gradient, and composed of
// primitives.
#include "support.hpp"

#include "tensor/compose.hpp"

#include <deque>
#include <gtest/gtest.h>

namespace ponder::test {
namespace {

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
    TttScan official, ponder, mlp;
    official.scale = 0.3;
    ponder = {false, true, 0.3, 0.25, 1e-5, 0.4, -1};
    mlp.mlp = true;
    mlp.scale = 0.2;
    for (const int64_t tokens : {12, 10}) {
        same_in_both_forms("official", [&](Recorder &r) { return scan(r, official, tokens); });
        same_in_both_forms("ponder", [&](Recorder &r) { return scan(r, ponder, tokens); });
        same_in_both_forms("mlp", [&](Recorder &r) { return scan(r, mlp, tokens); });
    }
}

} // namespace
} // namespace ponder::test
