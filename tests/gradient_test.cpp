// The tape: gradients of whole recorded passes against central differences in float64, and what a
// pass must not compute.
#include "support.hpp"

#include "tensor/ops.hpp"

#include <gtest/gtest.h>

namespace ponder::test {
namespace {

constexpr Gpt2Config small{3, 16, 2, 32, 24, 40, 1e-5, true};

// A backbone with random weights, all in float64: made in memory as a folder would be.
struct Float64Pass {
    std::shared_ptr<const Runtime> runtime = make_runtime(1);
    std::shared_ptr<const Device> device = std::make_shared<Device>(
        runtime->backend("reference"), runtime->memory, runtime->threads, nullptr);
    std::map<std::string, std::vector<double>> weights;
    std::vector<double> fast, gradient;
    std::vector<int32_t> tokens, targets;
    std::vector<double> nll, entropy;
    std::unique_ptr<Lora> lora;
    Recording recording;
    std::unique_ptr<Program> program;
    std::vector<std::byte> arena;

    Float64Pass(const PassShape &shape, const char *layers, const char *modules)
        : recording{Graph(DType::f64), {}, none, none, none, none, none, {}, {}} {
        Random random(7);
        lora = std::make_unique<Lora>(
            small,
            make_options({{"lora.rank", "3"}, {"lora.layers", layers}, {"lora.modules", modules}}));
        const Gpt2 model(small, DType::f64);
        Recording recorded = record_pass(model, *lora, shape);
        // The recorded constants have no data: give them random values in a copy of the graph.
        Graph graph(DType::f64);
        for (const Value &value : recorded.graph.values()) {
            const void *data = nullptr;
            if (value.kind == Kind::constant) {
                std::vector<double> &w = weights[value.name];
                if (w.empty()) {
                    w.resize(size_t(value.shape.count()));
                    const bool scale = value.name.find("ln_") != std::string::npos &&
                                       value.name.ends_with("weight");
                    for (double &x : w)
                        x = (scale ? 1.0 : 0.0) + 0.3 * random.normal();
                }
                data = w.data();
                graph.constant(value.name, value.type, value.shape, data);
            } else if (value.kind == Kind::external) {
                graph.external(value.name, value.type, value.shape, value.needs_gradient);
            } else {
                graph.temporary(value.type, value.shape, value.needs_gradient);
            }
        }
        for (const Call &call : recorded.graph.calls())
            graph.add_call(*call.rule, call.in, call.out, call.attr);
        recording.tokens = recorded.tokens;
        recording.targets = recorded.targets;
        recording.nll = recorded.nll;
        recording.entropy = recorded.entropy;
        recording.gradient = recorded.gradient;
        program = std::make_unique<Program>(std::move(graph), recorded.segment_ends, device);
        arena.resize(program->arena_bytes());
        fast.resize(lora->fast_count());
        gradient.resize(lora->fast_count());
        for (double &x : fast)
            x = 0.2 * random.normal();
        for (int64_t i = 0; i < shape.tokens; ++i)
            tokens.push_back(int32_t(random.next() % uint64_t(small.vocabulary)));
        targets.assign(tokens.end() - shape.scored + 1, tokens.end());
        targets.push_back(-1);
        nll.resize(size_t(shape.scored));
        entropy.resize(size_t(shape.scored));
    }

    void run(size_t segment) {
        Program::Bindings at(program->graph().values().size());
        for (size_t i = 0; i < lora->fast_tensors().size(); ++i) {
            at[i] = fast.data() + lora->fast_tensors()[i].offset;
            at[size_t(recording.gradient[i])] = gradient.data() + lora->fast_tensors()[i].offset;
        }
        at[size_t(recording.tokens)] = tokens.data();
        at[size_t(recording.targets)] = targets.data();
        at[size_t(recording.nll)] = nll.data();
        at[size_t(recording.entropy)] = entropy.data();
        program->run(segment, at, arena.data(), nullptr, nullptr);
    }
    double loss() {
        run(score_segment);
        double sum = 0;
        for (size_t i = 0; i + 1 < nll.size(); ++i)
            sum += nll[i];
        return sum / double(nll.size() - 1);
    }
};

void check_differences(const PassShape &shape, const char *layers, const char *modules) {
    Float64Pass pass(shape, layers, modules);
    pass.loss();
    pass.run(learn_segment);
    const std::vector<double> analytic = pass.gradient;
    std::vector<double> numeric(analytic.size());
    constexpr double h = 1e-5;
    for (size_t i = 0; i < analytic.size(); ++i) {
        const double x = pass.fast[i];
        pass.fast[i] = x + h;
        const double above = pass.loss();
        pass.fast[i] = x - h;
        const double below = pass.loss();
        pass.fast[i] = x;
        numeric[i] = (above - below) / (2 * h);
    }
    EXPECT_LE(relative_error(analytic, numeric), 1e-7);
}

TEST(Tape, WholePassMatchesFiniteDifferences) {
    check_differences({9, 9, true, false}, "all", "all");
}

TEST(Tape, GradientsFlowThroughTheContext) {
    check_differences({14, 6, true, false}, "0,2", "all");
}

TEST(Tape, SomeModulesOnly) {
    check_differences({7, 7, true, false}, "1", "attn.c_attn,mlp.c_proj");
}

std::map<std::string, int> count_ops(const Recording &r, size_t segment) {
    std::map<std::string, int> counts;
    const size_t begin = segment == 0 ? 0 : r.segment_ends[segment - 1];
    for (size_t i = begin; i < r.segment_ends[segment]; ++i)
        ++counts[r.graph.calls()[i].rule->name];
    return counts;
}

TEST(Tape, StopsAtTheLowestAdaptedLayer) {
    const Lora lora(small, make_options({{"lora.layers", "last:1"}}));
    const Recording r = record_pass(Gpt2(small, DType::f32), lora, {8, 8, true, false});
    const auto ops = count_ops(r, learn_segment);
    EXPECT_EQ(ops.at("attention_vjp"), 1);
    EXPECT_EQ(ops.at("lora_linear_vjp"), 4);
    EXPECT_EQ(ops.count("linear"), 0u); // no frozen linear below is differentiated
    EXPECT_EQ(ops.at("matmul_tn"), 8);
    // ln_2 and ln_f; the norm before the lowest adapted product leads to nothing adapted ... but
    // the product's own input gradient is part of its fused kernel.
    EXPECT_LE(ops.at("layer_norm_vjp"), 3);
}

TEST(Tape, ScoringAloneKeepsNoProbabilities) {
    const Adapter plain;
    const Recording r = record_pass(Gpt2(small, DType::f32), plain, {8, 8, false, false});
    for (const Call &call : r.graph.calls()) {
        if (std::string(call.rule->name) != "cross_entropy")
            continue;
        EXPECT_EQ(call.out[2], none);
    }
}

TEST(Arena, NothingAliveOverlaps) {
    const Lora lora(small, make_options({{"lora.layers", "all"}}));
    const Recording r = record_pass(Gpt2(small, DType::f32), lora, {16, 8, true, false});
    const std::vector<Group> groups = schedule(r.graph, r.segment_ends);
    const ArenaPlan plan = plan_arena(r.graph, groups);
    const size_t n = r.graph.values().size();
    std::vector<size_t> first(n, SIZE_MAX), last(n, 0);
    size_t total = 0, calls = 0;
    for (size_t g = 0; g < groups.size(); ++g)
        for (size_t c : groups[g].calls) {
            ++calls;
            for (const auto *list : {&r.graph.calls()[c].in, &r.graph.calls()[c].out})
                for (Id id : *list)
                    if (id != none && r.graph.value(id).kind == Kind::temporary) {
                        first[size_t(id)] = std::min(first[size_t(id)], g);
                        last[size_t(id)] = std::max(last[size_t(id)], g);
                    }
        }
    EXPECT_EQ(calls, r.graph.calls().size());
    for (size_t a = 0; a < n; ++a) {
        if (first[a] == SIZE_MAX)
            continue;
        total += r.graph.value(Id(a)).bytes();
        EXPECT_LE(plan.offset[a] + r.graph.value(Id(a)).bytes(), plan.bytes);
        for (size_t b = a + 1; b < n; ++b) {
            if (first[b] == SIZE_MAX || last[a] < first[b] || last[b] < first[a])
                continue;
            const bool apart = plan.offset[a] + r.graph.value(Id(a)).bytes() <= plan.offset[b] ||
                               plan.offset[b] + r.graph.value(Id(b)).bytes() <= plan.offset[a];
            EXPECT_TRUE(apart) << a << " and " << b;
        }
    }
    EXPECT_LT(plan.bytes, total); // places are used again
}

} // namespace
} // namespace ponder::test
