// Gradients of every weight of a backbone against finite differences in float64.
#include "small_backbone.hpp"

#include "train/backbone_trainer.hpp"

#include <deque>
#include <gtest/gtest.h>

namespace ponder::test {
namespace {

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

} // namespace
} // namespace ponder::test
