// Whole passes against other implementations' outputs (tests/data/README.md).
#include "support.hpp"

#include <gtest/gtest.h>

namespace ponder::test {
namespace {

// An adapter folder with the fixture's A for all layers and B = 0.
std::string fixture_adapter(const TempDir &dir, const Model &model, const SafeTensors &fixture) {
    const Options options = make_options({{"lora.layers", "all"}});
    const auto lora = make_adapter(model.backbone().config(), options, "");
    std::vector<float> fast(lora->fast_count(), 0.0f);
    for (const FastTensor &t : lora->fast_tensors())
        if (t.name.ends_with(".lora_a")) {
            const std::string place = t.name.substr(0, t.name.size() - 7);
            const std::vector<float> a = tensor(fixture, "lora_a." + place);
            std::copy(a.begin(), a.end(), fast.begin() + std::ptrdiff_t(t.offset));
        }
    save_adapter(dir.path(), "lora", model.backbone().hash(), options, *lora, fast);
    return dir.path();
}

void check_lora_ttt(const char *backend, const char *dtype, size_t chunks, double tolerance) {
    const auto fixture = SafeTensors::open(PONDER_TEST_DATA "/lora_ttt_code10m.safetensors");
    const auto model = load_model(PONDER_MODEL_CODE10M, backend, dtype);
    const TempDir dir;
    Options options = make_options({{"adapter", fixture_adapter(dir, *model, fixture)}});
    Session adapted(model, options), frozen(model, make_options({{"policy", "skip"}}));
    const std::vector<int32_t> tokens = ids(fixture, "input_ids");
    const std::vector<float> skip = tensor(fixture, "skip_loss"),
                             adapt = tensor(fixture, "adapted_loss");
    for (size_t i = 0; i < chunks; ++i) {
        for (Session *session : {&adapted, &frozen}) {
            session->feed(std::span(tokens).subspan(i * 512, 512));
            session->adapt(no_limits(*session));
        }
        EXPECT_NEAR(frozen.records().back().loss_before, skip[i], tolerance) << "chunk " << i;
        EXPECT_NEAR(adapted.records().back().loss_before, adapt[i], tolerance) << "chunk " << i;
        if (i == 0) {
            const std::vector<float> nll = tensor(fixture, "token_nll_chunk0");
            EXPECT_LE(relative_error(frozen.losses(), nll), tolerance);
        }
    }
}

TEST(LoraTtt, CpuMatchesPyTorch) { check_lora_ttt("cpu", "f32", 10, 1e-3); }
TEST(LoraTtt, ReferenceMatchesPyTorch) { check_lora_ttt("reference", "f32", 2, 1e-3); }
TEST(LoraTtt, CpuInBf16StaysNear) { check_lora_ttt("cpu", "bf16", 10, 3e-2); }

TEST(Gpt2Tiny, TokenLossesMatchTransformers) {
    const std::string folder = PONDER_TEST_DATA "/gpt2_tiny";
    const auto expected = SafeTensors::open(folder + "/expected.safetensors");
    const std::vector<int32_t> tokens = ids(expected, "input_ids");
    const std::vector<float> nll = tensor(expected, "token_nll");
    for (const char *backend : {"cpu", "reference"}) {
        const auto model = load_model(folder, backend);
        for (size_t row = 0; row < 2; ++row) {
            Session session(model,
                            make_options({{"adapter", "none"}, {"context", "0"}, {"chunk", "80"}}));
            session.feed(std::span(tokens).subspan(row * 80, 80));
            ASSERT_TRUE(session.score(no_limits(session)));
            EXPECT_LE(relative_error(session.losses(), std::span(nll).subspan(row * 79, 79)), 1e-5)
                << backend;
        }
    }
}

} // namespace
} // namespace ponder::test
