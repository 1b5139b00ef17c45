// Gradients through the inner loop against finite differences in float64.
#include "small_backbone.hpp"

#include "train/adapter_trainer.hpp"

#include <gtest/gtest.h>

#include <tuple>

namespace ponder::test {
namespace {

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

    explicit Float64Loop(std::initializer_list<Values::value_type> values, size_t count = 40) {
        options = with(make_options({{"chunk", "8"},
                                     {"context", "8"},
                                     {"lora.rank", "2"},
                                     {"lora.layers", "all"},
                                     {"inner.epsilon", "1e-2"},
                                     {"inner.lr", "0.05"},
                                     {"inner.clip", "0.5"},
                                     {"train.higher", "1"}}),
                       values);
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

} // namespace
} // namespace ponder::test
