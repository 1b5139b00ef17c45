// Trainers as a whole: steps, checkpoints, processes that train together, what is exported.
#include "expect_error.hpp"
#include "free_port.hpp"
#include "small_backbone.hpp"

#include "train/adapter_trainer.hpp"
#include "train/backbone_trainer.hpp"

#include <gtest/gtest.h>

#include <thread>
#include <tuple>

namespace ponder::test {
namespace {

struct Trained {
    TempDir folder;
    std::shared_ptr<const Model> model;
    std::atomic<bool> cancel{false};

    explicit Trained(const char *dtype = "f32", uint32_t threads = 2) {
        write_backbone(folder.path(), {2, 16, 2, 64, 32, 50, 1e-5, true}, 0.1);
        model = load_model(folder.path(), "cpu", dtype, threads);
    }
    Options options(const Values &values = {}) {
        return with(make_options({{"chunk", "8"},
                                  {"context", "8"},
                                  {"lora.rank", "2"},
                                  {"train.lr", "1e-2"},
                                  {"train.warmup", "1"}}),
                    values);
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

// What is trained is exported to the same folder again and again, and measured by sessions there.
TEST(TrainerTest, WhatWasExportedBeforeLeavesTheModel) {
    for (const auto &[kind, adapter, tokens] : kinds) {
        if (kind != PONDER_TRAIN_ADAPTER)
            continue;
        Trained t("f32", 1); // a trainer takes memory for each thread when that gets work
        const TempDir out;
        const auto trainer = make_trainer(t.model, kind, t.options({{"adapter", adapter}}));
        const Options options = t.options({{"adapter", out.path()}, {"policy", "always"}});
        std::vector<std::weak_ptr<const Adapted>> adapted;
        std::vector<uint64_t> in_use, packed;
        std::vector<float> losses;
        for (uint64_t i = 0; i < 5; ++i) {
            t.step(*trainer, i, tokens);
            trainer->export_to(out.path());
            Session session(t.model, options);
            session.feed(Trained::batch(9, 16)[0]);
            session.adapt(no_limits(session));
            losses.assign(session.losses().begin(), session.losses().end());
            adapted.push_back(t.model->adapted(with_stored_options(options)));
            in_use.push_back(t.model->runtime().memory->in_use());
            packed.push_back(t.model->device()->packed_bytes());
        }
        for (size_t i = 0; i < adapted.size(); ++i)
            EXPECT_EQ(adapted[i].expired(), i + 1 < adapted.size()) << adapter << " " << i;
        EXPECT_EQ(in_use[4], in_use[1]) << adapter;
        EXPECT_EQ(packed[4], packed[1]) << adapter;
        // Nothing of an older one is in what the newest does.
        Trained fresh;
        Session session(fresh.model, options);
        session.feed(Trained::batch(9, 16)[0]);
        session.adapt(no_limits(session));
        EXPECT_EQ(std::vector<float>(session.losses().begin(), session.losses().end()), losses)
            << adapter;
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

TEST(TrainerTest, ProgressCancelsWhileThereIsWorkLeft) {
    struct Answer {
        bool stop_at_end;
        int calls;
    };
    Trained t;
    for (const auto &[kind, adapter, tokens] : kinds) {
        const auto trainer = make_trainer(t.model, kind, t.options({{"adapter", adapter}}));
        Answer answer{false, 0};
        ponder_call call{};
        call.struct_size = sizeof call;
        call.user_data = &answer;
        call.progress = [](void *user, uint64_t done, uint64_t total) -> int32_t {
            Answer &a = *static_cast<Answer *>(user);
            ++a.calls;
            return (done == total) == a.stop_at_end;
        };
        EXPECT_EQ(thrown_status([&, tokens = tokens] { t.step(*trainer, 0, tokens, &call); }),
                  PONDER_E_CANCELLED);
        EXPECT_EQ(answer.calls, 1) << adapter;
        EXPECT_EQ(trainer->steps(), 0u);
        answer.stop_at_end = true; // too late: the step is done
        t.step(*trainer, 0, tokens, &call);
        EXPECT_EQ(trainer->steps(), 1u);
    }
}

TEST(TrainerTest, ACheckpointNamesTheOptionThatDiffers) {
    Trained t;
    const TempDir dir;
    const auto with_rate = [&](const char *rate) {
        return make_trainer(t.model, PONDER_TRAIN_ADAPTER, t.options({{"train.lr", rate}}));
    };
    with_rate("3e-3")->save(dir.file("a"), "");
    with_rate("0.0030")->load(dir.file("a"));
    expect_error(PONDER_E_MISMATCH, {"'train.lr'", "\"0.003\"", "\"0.004\""},
                 [&] { with_rate("4e-3")->load(dir.file("a")); });
}

TEST(TrainerTest, ABackboneSaysWhereTextsEnd) {
    Trained t; // without a tokenizer
    const TempDir dir;
    const auto field = [&] {
        const std::string config = read_file(dir.file("config.json"), 1 << 16);
        const size_t at = config.find("eos_token_id");
        return at == config.npos ? "" : config.substr(at, config.find(',', at) - at);
    };
    make_trainer(t.model, PONDER_TRAIN_BACKBONE, t.options({{"adapter", "none"}}))
        ->export_to(dir.path());
    EXPECT_EQ(field(), "");
    write_gpt2(dir.path(), {1, 2, 1, 8, 4, 50, 1e-5, true}, DType::f32, {}, 7);
    EXPECT_EQ(field(), "eos_token_id\": 7");
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
