// The CUDA module: that it loads anywhere and says why it cannot run; and, where there is a device,
// whole sessions and trainers against the reference backend and other implementations.
// PONDER_CUDA_MODULE in the environment names another build of it.
#include "device_runs.hpp"
#include "generating.hpp"

#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <gtest/gtest.h>

namespace ponder::test {
namespace {

Backend module() {
    const char *path = std::getenv("PONDER_CUDA_MODULE");
    path = path ? path : PONDER_CUDA_MODULE;
    Backend backend{nullptr, "cuda", path, ""};
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        backend.reason = dlerror();
        return backend;
    }
    backend.descriptor =
        reinterpret_cast<ponder_backend_query_fn>(dlsym(library, "ponder_backend_query_v1"))();
    char why[256] = "";
    if (!backend.descriptor->probe(why, sizeof why))
        backend.reason = why;
    return backend;
}

std::shared_ptr<const Model> load(const std::string &folder, const char *backend,
                                  const char *dtype, uint64_t limit = 0) {
    return load_beside_reference(module(), folder, backend, dtype, limit);
}

TEST(CudaModule, LoadsAndSaysWhatIsMissing) {
    const Backend backend = module();
    ASSERT_NE(backend.descriptor, nullptr) << backend.reason;
    EXPECT_STREQ(backend.descriptor->name, "cuda");
    EXPECT_EQ(backend.descriptor->host_memory, 0);
    if (!backend.available()) {
        EXPECT_TRUE(backend.reason.starts_with("no device: ")) << backend.reason;
        try {
            load(tiny, "cuda", "f32");
            ADD_FAILURE();
        } catch (const Error &e) {
            EXPECT_EQ(e.status(), PONDER_E_NOT_FOUND);
            EXPECT_NE(std::string(e.what()).find("no device"), std::string::npos);
        }
    }
}

class Cuda : public testing::Test {
protected:
    void SetUp() override {
        if (const Backend backend = module(); !backend.available())
            GTEST_SKIP() << backend.reason;
    }
};

Options options_of(const Values &values) {
    return with(make_options({{"chunk", "32"}, {"context", "64"}, {"lora.rank", "4"}}), values);
}

const std::vector<Values> cases{
    {{"adapter", "lora"}, {"policy", "always"}, {"steps", "2"}, {"record.loss_after", "1"}},
    {{"adapter", "lora"}, {"policy", "threshold:gradient_norm:0.001"}},
    {{"adapter", "lora"}, {"inner.optimizer", "sgd"}, {"inner.lr", "0.1"}},
    {{"adapter", "none"}},
    {{"adapter", "ttt-linear"}},
    {{"adapter", "ttt-linear"}, {"ttt.form", "ponder"}},
    {{"adapter", "ttt-mlp"}},
};

// For generating: where fast weights enter, and how they learn.
const std::vector<Values> forms{
    {{"adapter", "none"}},
    {{"adapter", "lora"}, {"inner.lr", "0.02"}, {"lora.layers", "all"}},
    {{"adapter", "lora"}, {"inner.lr", "0.02"}, {"lora.layers", "last:1"}},
    {{"adapter", "ttt-linear"}},
    {{"adapter", "ttt-linear"}, {"ttt.form", "ponder"}},
    {{"adapter", "ttt-mlp"}},
};

std::vector<float> life(Session &session, std::span<const int32_t> tokens) {
    session.feed(tokens);
    std::vector<float> losses;
    const auto take = [&] {
        losses.insert(losses.end(), session.losses().begin(), session.losses().end());
    };
    while (session.score(no_limits(session))) {
        session.learn(-1, no_limits(session));
        take();
    }
    session.flush(no_limits(session));
    take();
    return losses;
}

TEST_F(Cuda, SessionsAreNearTheReferences) {
    const auto tokens = random_tokens(32 * 6 + 9, 5);
    for (const char *dtype : {"f32", "bf16"}) {
        const auto reference = load(tiny, "reference", dtype), device = load(tiny, "cuda", dtype);
        for (const Values &values : cases) {
            Session a(reference, options_of(values)), b(device, options_of(values)),
                c(device, options_of(values));
            const auto expected = life(a, tokens), ours = life(b, tokens);
            EXPECT_LE(relative_error(ours, expected), dtype[0] == 'f' ? 2e-4 : 2e-2)
                << values[0].second << " " << values.back().second << " " << dtype;
            EXPECT_EQ(ours, life(c, tokens)) << values[0].second; // the same bits again
        }
    }
}

// Many chunks in one call, decided on the device, are those that the host decided one by one.
TEST_F(Cuda, ChunksAheadAreThoseByHand) {
    const std::vector<Values> policies{
        {{"adapter", "lora"}, {"policy", "always"}, {"steps", "3"}},
        {{"adapter", "lora"}, {"policy", "every:2"}, {"inner.optimizer", "sgd"}},
        {{"adapter", "lora"}, {"policy", "threshold:entropy:5"}, {"steps", "2"}},
        {{"adapter", "lora"}, {"policy", "threshold:loss:0"}, {"steps", "3"}, {"budget.rate", "1.3"}},
        {{"adapter", "lora"}, {"policy", "threshold:loss:99"}},
        {{"adapter", "lora"}, {"policy", "ema:loss:0.5"}},
        {{"adapter", "lora"}, {"policy", "ema:loss:0.5"}, {"guard.norm", "0.05"}},
        {{"adapter", "none"}},
        {{"adapter", "ttt-linear"}, {"policy", "always"}},
        {{"adapter", "ttt-linear"}, {"policy", "ema:reconstruction:0.5"}},
        {{"adapter", "ttt-mlp"}, {"policy", "threshold:loss:5.05"}},
    };
    for (const char *dtype : {"f32", "bf16"}) {
        const auto device = load(tiny, "cuda", dtype);
        for (const Values &values : policies) {
            SCOPED_TRACE(values[0].second + " " + values.back().second + " " + dtype);
            Session together(device, options_of(values)), apart(device, options_of(values));
            for (const uint64_t seed : {11, 12}) {
                const auto tokens = random_tokens(32 * 12, seed);
                together.feed(tokens);
                together.adapt(no_limits(together));
                life(apart, tokens);
            }
            ASSERT_EQ(together.records().size(), apart.records().size());
            for (size_t i = 0; i < apart.records().size(); ++i) {
                const ponder_record &a = together.records()[i], &b = apart.records()[i];
                EXPECT_EQ(a.loss_before, b.loss_before) << i;
                EXPECT_EQ(a.flags, b.flags) << i;
                EXPECT_EQ(a.steps, b.steps) << i;
                EXPECT_EQ(a.steps_wanted, b.steps_wanted) << i;
                EXPECT_EQ(a.flops, b.flops) << i;
                EXPECT_TRUE(a.update_norm == b.update_norm ||
                            (std::isnan(a.update_norm) && std::isnan(b.update_norm)))
                    << i << " " << a.update_norm << " " << b.update_norm;
            }
            EXPECT_TRUE(std::equal(together.losses().begin(), together.losses().end(),
                                   apart.losses().begin()));
        }
    }
}

TEST_F(Cuda, SnapshotsMoveBothWays) {
    const auto host = load(tiny, "reference", "f32"), device = load(tiny, "cuda", "f32");
    const auto tokens = random_tokens(32 * 6, 6);
    for (const Values &values : {cases[0], cases[4]}) {
        const auto half = [&](const auto &model, std::span<const std::byte> from) {
            return three_chunks(model, options_of(values), tokens, from);
        };
        const auto stay = half(host, half(host, {}).first);
        EXPECT_LE(relative_error(half(host, half(device, {}).first).second, stay.second), 1e-4);
        EXPECT_LE(relative_error(half(device, half(host, {}).first).second, stay.second), 1e-4);
        // Restored on the device it goes on bit for bit.
        Session whole(device, options_of(values));
        whole.feed(tokens);
        std::unique_ptr<Session> other;
        for (int i = 0; i < 6; ++i) {
            for (Session *s : {&whole, other.get()})
                if (s) {
                    s->score(no_limits(*s));
                    s->learn(-1, no_limits(*s));
                }
            if (i == 2)
                other = whole.fork();
        }
        EXPECT_TRUE(std::equal(whole.losses().begin(), whole.losses().end(),
                               other->losses().begin()));
    }
}

// A device on which the layer has never run when chunks that it may take part in are recorded.
TEST_F(Cuda, ARestoredLayerIsRecordedUnseen) {
    const auto tokens = random_tokens(32 * 24, 16);
    for (const char *policy : {"threshold:loss:1e6", "ema:loss:0.3"}) {
        const Options options = options_of({{"adapter", "ttt-linear"}, {"policy", policy}});
        Session whole(load(tiny, "cuda", "bf16"), options),
            other(load(tiny, "cuda", "bf16"), options);
        const auto half = std::span(tokens).first(32 * 12);
        whole.feed(half);
        whole.adapt(no_limits(whole));
        other.load(whole.save(), "snapshot");
        for (Session *const each : {&whole, &other}) {
            each->feed(std::span(tokens).subspan(half.size()));
            each->adapt(no_limits(*each));
        }
        ASSERT_EQ(other.records().size(), 24u);
        for (size_t i = 0; i < 24; ++i) {
            EXPECT_EQ(whole.records()[i].loss_before, other.records()[i].loss_before) << i;
            EXPECT_EQ(whole.records()[i].steps, other.records()[i].steps) << i;
        }
    }
}

// LoRA-TTT on code-10m as PyTorch ran it; the adapter as in parity_test.cpp.
TEST_F(Cuda, LoraTttMatchesPyTorch) {
    const auto fixture = SafeTensors::open(PONDER_TEST_DATA "/lora_ttt_code10m.safetensors");
    const std::vector<int32_t> tokens = ids(fixture, "input_ids");
    for (const auto &[dtype, tolerance] : {std::pair("f32", 1e-3), {"bf16", 3e-2}}) {
        const auto model = load(PONDER_MODEL_CODE10M, "cuda", dtype);
        const TempDir dir;
        const Options all = make_options({{"lora.layers", "all"}});
        const auto lora = make_adapter(model->backbone().config(), all, "");
        std::vector<float> fast(lora->fast_count(), 0.0f);
        for (const FastTensor &t : lora->fast_tensors())
            if (t.name.ends_with(".lora_a")) {
                const auto a =
                    tensor(fixture, "lora_a." + t.name.substr(0, t.name.size() - 7));
                std::copy(a.begin(), a.end(), fast.begin() + std::ptrdiff_t(t.offset));
            }
        save_adapter(dir.path(), "lora", model->backbone().hash(), all, *lora, fast);
        Session adapted(model, make_options({{"adapter", dir.path()}})),
            frozen(model, make_options({{"policy", "skip"}}));
        const std::vector<float> skip = tensor(fixture, "skip_loss"),
                                 adapt = tensor(fixture, "adapted_loss");
        for (size_t i = 0; i < 10; ++i) {
            for (Session *session : {&adapted, &frozen}) {
                session->feed(std::span(tokens).subspan(i * 512, 512));
                session->adapt(no_limits(*session));
            }
            EXPECT_NEAR(frozen.records().back().loss_before, skip[i], tolerance) << dtype << i;
            EXPECT_NEAR(adapted.records().back().loss_before, adapt[i], tolerance) << dtype << i;
        }
    }
}

std::vector<double> trained(const std::shared_ptr<const Model> &model, int32_t kind,
                            const Values &values) {
    const auto trainer = make_trainer(model, kind, options_of(values));
    std::vector<double> log;
    for (const ponder_train_record &r :
         take_steps(*trainer, 4, kind == PONDER_TRAIN_BACKBONE ? 33 : 32 * 4)) {
        log.push_back(r.loss);
        log.push_back(r.gradient_norm);
    }
    return log;
}

TEST_F(Cuda, TrainersAreNearTheReferences) {
    for (const char *dtype : {"f32", "bf16"}) {
        const auto reference = load(tiny, "reference", dtype), device = load(tiny, "cuda", dtype);
        const auto near = [&](int32_t kind, const Values &values) {
            const auto expected = trained(reference, kind, values), ours = trained(device, kind, values);
            EXPECT_LE(relative_error(ours, expected), dtype[0] == 'f' ? 1e-3 : 3e-2)
                << values[0].second << " " << values.back().second << " " << dtype;
            EXPECT_EQ(ours, trained(device, kind, values));
        };
        near(PONDER_TRAIN_ADAPTER, {{"adapter", "lora"}});
        near(PONDER_TRAIN_ADAPTER, {{"adapter", "ttt-linear"}});
        if (dtype[0] == 'f')
            near(PONDER_TRAIN_ADAPTER, {{"adapter", "lora"}, {"train.higher", "1"}});
        near(PONDER_TRAIN_BACKBONE, {{"adapter", "none"}, {"train.dropout", "0.1"}});
        near(PONDER_TRAIN_BACKBONE,
             {{"adapter", "none"}, {"train.attention_dropout", "0.1"}, {"train.recompute", "1"}});
        near(PONDER_TRAIN_BACKBONE,
             {{"adapter", "none"}, {"train.micro", "2"}, {"train.average", "0.5"}});
    }
}

// Token by token as in one pass, across chunks, mini-batches and full windows.
TEST_F(Cuda, DecodingIsScoring) {
    const auto text = random_tokens(32 * 6, 8);
    for (const auto &[dtype, tolerance] : {std::pair("f32", 1e-4), {"bf16", 3e-2}}) {
        const auto device = load(tiny, "cuda", dtype);
        for (const Values &values : forms) {
            SCOPED_TRACE(std::string(dtype) + " " + values.back().second);
            Session session(device, options_of(values));
            // What is learned inside a pass begins with the text; LoRA has learned before.
            const size_t before = values[0].second == "lora" ? 2 : 0;
            expect_decoding_is_scoring(session, text, before, 6, tolerance);
        }
    }
}

// One session and several, past a full window, some ending before others; the caches follow a
// session that goes on alone.
TEST_F(Cuda, TextIsTheReferences) {
    const auto host = load(tiny, "reference", "f32"), device = load(tiny, "cuda", "f32");
    for (const Values &values : forms) {
        SCOPED_TRACE(values.back().second);
        std::vector<std::vector<Written>> all;
        for (const auto &model : {host, device}) {
            std::vector<std::unique_ptr<Session>> sessions;
            std::vector<Session *> list;
            std::vector<Generation> wishes;
            for (size_t i = 0; i < 3; ++i) {
                sessions.push_back(std::make_unique<Session>(model, options_of(values)));
                list.push_back(sessions[i].get());
                list[i]->feed(random_tokens(32 * (i + 1), 11 + i)); // other fast weights each
                list[i]->adapt(no_limits(*list[i]));
                wishes.push_back(wish(random_tokens(3 + 25 * i, 21 + i), 60 - 15 * i));
            }
            std::vector<Written> written{generate(*list[0]->fork(), wishes[0])};
            for (const Written &w : generate(list, wishes))
                written.push_back(w);
            Generation more = wishes[1];
            more.prompt.insert(more.prompt.end(), written[2].ids.begin(), written[2].ids.end());
            written.push_back(generate(*list[1], more));
            EXPECT_EQ(written[0].ids, written[1].ids);
            all.push_back(written);
        }
        for (size_t i = 0; i < all[0].size(); ++i) {
            EXPECT_EQ(all[1][i].ids, all[0][i].ids) << i;
            // Learned weights differ a little already.
            const double tolerance = values[0].second == "lora" ? 3e-3 : 1e-4;
            EXPECT_LE(relative_error(all[1][i].log_p, all[0][i].log_p), tolerance) << i;
            EXPECT_EQ(all[1][i].result.cached_tokens, all[0][i].result.cached_tokens) << i;
        }
    }
}

// The text goes on on the device and on the host.
TEST_F(Cuda, TextGoesOnAfterARestore) {
    const auto host = load(tiny, "reference", "f32"), device = load(tiny, "cuda", "f32");
    for (const Values &values : forms) {
        SCOPED_TRACE(values.back().second);
        Session session(device, options_of(values));
        session.feed(random_tokens(64, 13));
        session.adapt(no_limits(session));
        Generation g = wish(random_tokens(20, 14), 40);
        const Written whole = generate(session, g);
        g.prompt.insert(g.prompt.end(), whole.ids.begin(), whole.ids.begin() + 17);
        g.max_tokens = 40 - 17;
        const std::vector<int32_t> rest(whole.ids.begin() + 17, whole.ids.end());
        for (const auto &model : {host, device}) {
            Session other(model, options_of(values));
            other.load(session.save(), "snapshot");
            EXPECT_EQ(generate(other, g).ids, rest) << model->device()->backend().name;
        }
    }
}

// Fast weights change between two texts: what depends on them is computed again, or kept.
TEST_F(Cuda, CachesAfterAnUpdate) {
    const auto device = load(tiny, "cuda", "f32");
    const auto text = random_tokens(60, 15);
    for (const Values &values : {forms[1], forms[2]}) {
        SCOPED_TRACE(values.back().second);
        Session session(device, options_of(values)), keeps(device, options_of(values));
        for (Session *s : {&session, &keeps}) {
            decode(*s, text, 50, 51);
            s->feed(random_tokens(64, 16));
            s->adapt(no_limits(*s));
        }
        const std::vector<double> again = decode(session, text, 51, 60),
                                  fresh = decode(*session.fork(), text, 51, 60);
        EXPECT_LE(relative_error(again, fresh), 1e-5);
        EXPECT_GT(relative_error(decode(keeps, text, 51, 60, true), fresh), 1e-4);
    }
}

TEST_F(Cuda, HasNoInt8Weights) {
    const auto runtime = std::make_shared<Runtime>(load(tiny, "cuda", "f32")->runtime());
    try {
        Model(runtime, tiny, "cuda", "f32", [](uint64_t, uint64_t) {}, "int8");
        ADD_FAILURE();
    } catch (const Error &e) {
        EXPECT_EQ(e.status(), PONDER_E_UNSUPPORTED);
        EXPECT_NE(std::string(e.what()).find("'cuda' has no int8 weights"), std::string::npos);
    }
}

TEST_F(Cuda, MemoryThatRunsOutIsAStatus) {
    const auto device = load(tiny, "cuda", "f32");
    Session session(device, options_of(cases[0]));
    const auto losses = life(session, random_tokens(32 * 3, 7));
    const uint64_t held = device->runtime().memory->in_use();
    const auto tight = load(tiny, "cuda", "f32", held);
    try {
        std::vector<std::unique_ptr<Session>> many;
        for (int i = 0; i < 64; ++i)
            many.push_back(std::make_unique<Session>(tight, options_of(cases[0])));
        ADD_FAILURE();
    } catch (const Error &e) {
        EXPECT_EQ(e.status(), PONDER_E_NO_MEMORY);
    }
    session.reset();
    EXPECT_EQ(life(session, random_tokens(32 * 3, 7)), losses);
}

} // namespace
} // namespace ponder::test
