// Adapter folders through the C ABI: PEFT's format and merged backbones, measured by sessions.
#include "temp_dir.hpp"

#include <ponder/ponder.h>

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <random>
#include <sstream>
#include <vector>

namespace {

namespace fs = std::filesystem;

ponder_error last_error;

#define OK(call) ASSERT_EQ(call, PONDER_OK) << last_error.message

ponder_error *error() {
    last_error = {};
    last_error.struct_size = sizeof last_error;
    return &last_error;
}

std::string content(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

void replace(const std::string &path, const std::string &from, const std::string &to) {
    std::string text = content(path);
    const size_t at = text.find(from);
    ASSERT_NE(at, text.npos) << from;
    std::ofstream(path, std::ios::binary) << text.replace(at, from.size(), to);
}

class AdapterFolder : public testing::Test {
protected:
    void SetUp() override {
        ponder_runtime_options options{};
        options.struct_size = sizeof options;
        options.threads = 1;
        options.backend_path = PONDER_TEST_BACKENDS;
        OK(ponder_runtime_create(&runtime, &options, error()));
        std::mt19937 random(1);
        for (int i = 0; i < 400; ++i)
            ids.push_back(int32_t(random() % 257));
        make_model(base(), "3");
        load(base(), &model);
    }
    void TearDown() override {
        ponder_model_release(model);
        ponder_runtime_destroy(runtime);
    }

    std::string path(const char *name) const { return folder.file(name); }
    std::string base() const { return path("base"); }

    void make_model(const std::string &at, const char *seed) {
        fs::create_directory(at);
        OK(ponder_tokenizer_train(
            at.c_str(), 257, [](void *, const char **, size_t *) { return 0; }, nullptr, error()));
        ponder_options *options = make_options({{"seed", seed},
                                                {"model.layers", "3"},
                                                {"model.width", "32"},
                                                {"model.heads", "2"},
                                                {"model.context", "32"}});
        OK(ponder_backbone_create(at.c_str(), options, error()));
        ponder_options_destroy(options);
    }
    void load(const std::string &at, ponder_model **out) {
        OK(ponder_model_load(out, runtime, at.c_str(), nullptr, nullptr, error()));
    }
    ponder_options *
    make_options(std::initializer_list<std::pair<const char *, std::string>> values) {
        ponder_options *options = nullptr;
        EXPECT_EQ(ponder_options_create(&options, error()), PONDER_OK);
        for (const auto &[name, value] : values)
            EXPECT_EQ(ponder_options_set(options, name, value.c_str(), error()), PONDER_OK)
                << last_error.message;
        return options;
    }
    // A few outer steps at a rate that makes B matter.
    void train(const std::string &out, const std::string &kind = "lora") {
        ponder_options *options = make_options({{"adapter", kind},
                                                {"chunk", "16"},
                                                {"context", "16"},
                                                {"lora.rank", "4"},
                                                {"lora.layers", "0,2"},
                                                {"train.warmup", "0"},
                                                {"train.lr", "0.05"}});
        ponder_trainer *trainer = nullptr;
        OK(ponder_trainer_create(&trainer, model, PONDER_TRAIN_ADAPTER, options, error()));
        const ponder_stream stream{ids.data(), 64};
        for (int i = 0; i < 3; ++i)
            OK(ponder_trainer_step(trainer, &stream, 1, nullptr, nullptr, error()));
        OK(ponder_trainer_export(trainer, out.c_str(), error()));
        ponder_trainer_destroy(trainer);
        ponder_options_destroy(options);
    }
    // Losses of one chunk with the adapter as it starts.
    std::vector<float> losses(const ponder_model *of, const std::string &adapter) {
        ponder_options *options = make_options(
            {{"adapter", adapter}, {"policy", "skip"}, {"chunk", "32"}, {"context", "32"}});
        ponder_session *session = nullptr;
        EXPECT_EQ(ponder_session_create(&session, of, options, error()), PONDER_OK)
            << last_error.message;
        std::vector<float> nll(31);
        size_t count = 0;
        EXPECT_EQ(ponder_session_adapt(session, ids.data(), 32, nullptr, error()), PONDER_OK);
        EXPECT_EQ(ponder_session_losses(session, nll.data(), nll.size(), &count, error()),
                  PONDER_OK);
        ponder_session_destroy(session);
        ponder_options_destroy(options);
        return nll;
    }
    static double furthest(const std::vector<float> &a, const std::vector<float> &b) {
        double most = 0;
        for (size_t i = 0; i < a.size(); ++i)
            most = std::max(most, std::fabs(double(a[i]) - double(b[i])));
        return most;
    }

    TempDir folder;
    ponder_runtime *runtime = nullptr;
    ponder_model *model = nullptr;
    std::vector<int32_t> ids;
};

TEST_F(AdapterFolder, MergedModelIsTheStaticAdapter) {
    const std::string adapter = path("adapter"), merged = path("merged");
    train(adapter);
    fs::create_directory(merged); // as one that was killed leaves it
    std::ofstream(merged + "/config.json") << "{}";
    OK(ponder_adapter_merge(base().c_str(), adapter.c_str(), merged.c_str(), error()));
    ponder_model *alone = nullptr;
    load(merged, &alone);
    const std::vector<float> expected = losses(model, adapter);
    EXPECT_LT(furthest(losses(alone, "none"), expected), 1e-5);
    EXPECT_GT(furthest(losses(model, "none"), expected), 1e-2);
    ponder_model_release(alone);
    EXPECT_EQ(content(merged + "/tokenizer.json"), content(base() + "/tokenizer.json"));

    EXPECT_EQ(ponder_adapter_merge(base().c_str(), adapter.c_str(), merged.c_str(), error()),
              PONDER_E_STATE);
    make_model(path("other"), "4");
    EXPECT_EQ(
        ponder_adapter_merge(path("other").c_str(), adapter.c_str(), path("no").c_str(), error()),
        PONDER_E_MISMATCH);
    EXPECT_FALSE(fs::exists(path("no")));
}

TEST_F(AdapterFolder, PeftAndBackIsExact) {
    const std::string adapter = path("adapter"), peft = path("peft"), back = path("back"),
                      again = path("again");
    train(adapter);
    OK(ponder_adapter_to_peft(adapter.c_str(), peft.c_str(), error()));
    OK(ponder_adapter_from_peft(model, peft.c_str(), back.c_str(), error()));
    OK(ponder_adapter_to_peft(back.c_str(), again.c_str(), error()));
    for (const char *file : {"/adapter_model.safetensors", "/adapter_config.json"})
        EXPECT_EQ(content(peft + file), content(again + file));
    EXPECT_EQ(losses(model, back), losses(model, adapter));
    const std::string config = content(peft + "/adapter_config.json");
    for (const char *part :
         {"\"r\": 4,", "\"lora_alpha\": 4,", "\"fan_in_fan_out\": true",
          "\"layers_to_transform\": [0, 2]", "\"attn.c_attn\"", "\"peft_type\": \"LORA\""})
        EXPECT_NE(config.find(part), config.npos) << part;
    const std::string tensors = content(peft + "/adapter_model.safetensors");
    for (const char *part : {"base_model.model.transformer.h.2.mlp.c_fc.lora_A.weight\":{\"dtype\":"
                             "\"F32\",\"shape\":[4, 32]",
                             "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight\":{"
                             "\"dtype\":\"F32\",\"shape\":[96, 4]"})
        EXPECT_NE(tensors.find(part), tensors.npos) << part;
}

TEST_F(AdapterFolder, ScaleOfPeftCounts) {
    const std::string adapter = path("adapter"), peft = path("peft");
    train(adapter);
    OK(ponder_adapter_to_peft(adapter.c_str(), peft.c_str(), error()));
    replace(peft + "/adapter_config.json", "\"lora_alpha\": 4,", "\"lora_alpha\": 0,");
    OK(ponder_adapter_from_peft(model, peft.c_str(), path("zero").c_str(), error()));
    EXPECT_EQ(furthest(losses(model, path("zero")), losses(model, "none")), 0);
    replace(peft + "/adapter_config.json", "\"lora_alpha\": 0,", "\"lora_alpha\": 8,");
    replace(peft + "/adapter_config.json", "\"use_rslora\": false", "\"use_rslora\": true");
    OK(ponder_adapter_from_peft(model, peft.c_str(), path("four").c_str(), error()));
    EXPECT_GT(furthest(losses(model, path("four")), losses(model, adapter)), 1e-2);
}

TEST_F(AdapterFolder, WhatDoesNotFitIsRefused) {
    const std::string adapter = path("adapter"), peft = path("peft"), out = path("out");
    const auto from_peft = [&] {
        return ponder_adapter_from_peft(model, peft.c_str(), out.c_str(), error());
    };
    EXPECT_EQ(ponder_adapter_to_peft(nullptr, "x", error()), PONDER_E_ARGUMENT);
    EXPECT_EQ(ponder_adapter_merge("x", nullptr, "x", error()), PONDER_E_ARGUMENT);
    EXPECT_EQ(ponder_adapter_from_peft(nullptr, "x", "x", error()), PONDER_E_ARGUMENT);
    EXPECT_EQ(ponder_adapter_to_peft(path("none").c_str(), out.c_str(), error()),
              PONDER_E_NOT_FOUND);
    EXPECT_EQ(from_peft(), PONDER_E_NOT_FOUND);

    train(path("ttt"), "ttt-linear");
    EXPECT_EQ(ponder_adapter_to_peft(path("ttt").c_str(), out.c_str(), error()),
              PONDER_E_UNSUPPORTED);

    train(adapter);
    OK(ponder_adapter_to_peft(adapter.c_str(), peft.c_str(), error()));
    const std::string config = peft + "/adapter_config.json", good = content(config);
    for (const auto &[from, to, status] :
         {std::tuple{"\"use_dora\": false", "\"use_dora\": true", PONDER_E_UNSUPPORTED},
          std::tuple{"\"bias\": \"none\"", "\"bias\": \"all\"", PONDER_E_UNSUPPORTED},
          std::tuple{"\"rank_pattern\": {}", "\"rank_pattern\": {\"x\": 3}", PONDER_E_UNSUPPORTED},
          std::tuple{"\"LORA\"", "\"IA3\"", PONDER_E_UNSUPPORTED},
          std::tuple{"{", "{\"init_lora_weights\": \"pissa_niter_4\",", PONDER_E_UNSUPPORTED},
          std::tuple{"\"r\": 4", "\"r\": 5", PONDER_E_FORMAT},
          std::tuple{"\"lora_alpha\": 4", "\"lora_alpha\": \"4\"", PONDER_E_FORMAT},
          std::tuple{"{", "[", PONDER_E_FORMAT}}) {
        std::ofstream(config, std::ios::binary) << good;
        replace(config, from, to);
        EXPECT_EQ(from_peft(), status) << to << ": " << last_error.message;
    }
    std::ofstream(config, std::ios::binary) << good;
    const std::string weights = peft + "/adapter_model.safetensors", whole = content(weights);
    for (const auto &[from, to] : {std::pair{"h.2.mlp.c_fc.lora_A", "h.2.mlp.c_fx.lora_A"},
                                   std::pair{"h.2.mlp.c_fc.lora_A", "h.7.mlp.c_fc.lora_A"},
                                   std::pair{"h.2.mlp.c_fc.lora_A", "h.x.mlp.c_fc.lora_A"},
                                   std::pair{"c_fc.lora_A.weight", "c_fc.lora_M.weight"}}) {
        std::ofstream(weights, std::ios::binary) << whole;
        replace(weights, from, to);
        EXPECT_NE(from_peft(), PONDER_OK) << to;
    }
    EXPECT_FALSE(fs::exists(out));
}

} // namespace
