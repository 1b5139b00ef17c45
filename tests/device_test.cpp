// Everything above the backends on a device whose memory is not the host's, bit for bit as on the
// reference backend: sessions, snapshots, gates' features, trainers; and what happens when such a
// device runs out of memory or breaks.
#include "device_runs.hpp"
#include "expect_error.hpp"
#include "offset_backend.hpp"
#include "session/generate.hpp"

#include <gtest/gtest.h>

#include <cstring>

namespace ponder::test {
namespace {

std::shared_ptr<const Model> load(const char *backend, const char *dtype, uint64_t limit = 0,
                                  const char *weights = "auto") {
    return load_beside_reference({offset::backend(), "offset", "", ""}, tiny, backend, dtype, limit,
                                 weights);
}

Options options_of(const Values &values) {
    return with(make_options({{"chunk", "16"}, {"context", "32"}, {"lora.rank", "4"}}), values);
}

const std::vector<Values> cases{
    {{"adapter", "lora"}, {"policy", "always"}, {"steps", "2"}},
    {{"adapter", "lora"}, {"policy", "ema:loss:0.5"}, {"record.loss_after", "1"}},
    {{"adapter", "lora"}, {"policy", "threshold:gradient_norm:0.3"}},
    {{"adapter", "lora"}, {"policy", "oracle:0.5"}},
    {{"adapter", "lora"}, {"inner.optimizer", "sgd"}, {"inner.lr", "0.1"}},
    {{"adapter", "lora"}, {"policy", "skip"}},
    {{"adapter", "none"}},
    {{"adapter", "ttt-linear"}, {"policy", "ema:reconstruction:0.5"}},
    {{"adapter", "ttt-linear"}, {"ttt.form", "ponder"}, {"analysis", "1"}},
    {{"adapter", "ttt-mlp"}, {"policy", "every:2"}},
};

// Those whose chunks need nothing of the host between them, and those that do.
const std::vector<Values> ahead_cases{
    {{"adapter", "lora"}, {"policy", "always"}},
    {{"adapter", "lora"}, {"policy", "always"}, {"steps", "3"}},
    {{"adapter", "lora"}, {"policy", "every:2"}, {"inner.optimizer", "sgd"}},
    {{"adapter", "lora"},
     {"policy", "random:0.5"},
     {"steps", "2"},
     {"budget.rate", "0.7"},
     {"budget.burst", "3"}},
    {{"adapter", "lora"}, {"policy", "first:0.5"}},
    {{"adapter", "lora"}, {"policy", "threshold:loss:5.05"}},
    {{"adapter", "lora"}, {"policy", "threshold:entropy:5"}, {"steps", "2"}},
    {{"adapter", "lora"}, {"policy", "threshold:update_norm:0.1"}},
    {{"adapter", "lora"},
     {"policy", "threshold:loss:0"},
     {"steps", "3"},
     {"budget.rate", "1.3"},
     {"budget.burst", "4"}},
    {{"adapter", "lora"}, {"policy", "ema:loss:0.5"}},
    {{"adapter", "lora"}, {"policy", "ema:entropy:0.3"}, {"steps", "2"}},
    {{"adapter", "lora"}, {"policy", "always"}, {"guard.norm", "0.05"}},
    {{"adapter", "lora"}, {"policy", "ema:loss:0.5"}, {"inner.lr", "99"}},
    {{"adapter", "lora"}, {"policy", "skip"}},
    {{"adapter", "none"}},
    {{"adapter", "ttt-linear"}, {"policy", "always"}},
    {{"adapter", "ttt-linear"}, {"policy", "every:3"}, {"ttt.carry", "0"}},
    {{"adapter", "ttt-linear"}, {"policy", "ema:reconstruction:0.5"}},
    {{"adapter", "ttt-linear"}, {"policy", "threshold:loss:5.05"}, {"ttt.form", "ponder"}},
    {{"adapter", "ttt-mlp"}, {"policy", "ema:loss:0.5"}, {"budget.rate", "0.4"}},
    {{"adapter", "none"}, {"policy", "ema:loss:0.5"}},
    {{"adapter", "lora"}, {"policy", "threshold:gradient_norm:0.3"}},
    {{"adapter", "lora"}, {"policy", "ema:loss:0.5"}, {"record.loss_after", "1"}},
    {{"adapter", "lora"}, {"policy", "oracle:0.5"}},
};

// Many chunks in one call, then some by hand, then many again: records without times, then the
// losses of the last chunk, then the snapshot.
std::vector<std::byte> calls(const std::shared_ptr<const Model> &model, const Values &values) {
    Session session(model, options_of(values));
    session.expect(40);
    std::vector<std::byte> all;
    const auto add = [&](const void *data, size_t size) {
        const auto *from = static_cast<const std::byte *>(data);
        all.insert(all.end(), from, from + size);
    };
    for (const uint64_t seed : {21, 22, 23}) {
        session.feed(random_tokens(16 * 12 + 5, seed));
        session.adapt(no_limits(session));
        session.feed(random_tokens(16 * 2, seed + 10));
        for (int i = 0; i < 2; ++i) {
            session.score(no_limits(session));
            session.learn(-1, no_limits(session));
        }
        add(session.losses().data(), session.losses().size_bytes());
    }
    session.flush(no_limits(session));
    const std::vector<std::byte> saved = session.save();
    for (ponder_record r : session.records()) {
        r.score_ns = r.decide_ns = r.learn_ns = r.bytes = 0;
        add(&r, sizeof r);
    }
    add(session.losses().data(), session.losses().size_bytes());
    Session other(model, options_of(values));
    other.load(saved, "snapshot");
    other.feed(random_tokens(16 * 6, 30));
    other.adapt(no_limits(other));
    for (ponder_record r : other.records()) {
        r.score_ns = r.decide_ns = r.learn_ns = r.bytes = 0;
        add(&r, sizeof r);
    }
    return all;
}

// Records without times, then the losses of every chunk, then the snapshot.
std::vector<std::byte> life(const std::shared_ptr<const Model> &model, const Values &values,
                            bool restore) {
    const auto tokens = random_tokens(16 * 6 + 9, 5);
    auto session = std::make_unique<Session>(model, options_of(values));
    session->expect(6);
    session->feed(tokens);
    std::vector<std::byte> all;
    const auto add = [&](const void *data, size_t size) {
        const auto *from = static_cast<const std::byte *>(data);
        all.insert(all.end(), from, from + size);
    };
    for (int chunk = 0; session->score(no_limits(*session)); ++chunk) {
        add(session->losses().data(), session->losses().size_bytes());
        if (restore && chunk == 2) { // with a chunk open
            const std::vector<std::byte> bytes = session->save();
            auto other = std::make_unique<Session>(model, options_of(values));
            other->load(bytes, "snapshot");
            session = std::move(other);
        } else if (restore && chunk == 3) {
            session = session->fork();
        }
        session->learn(-1, no_limits(*session));
    }
    session->flush(no_limits(*session));
    for (ponder_record r : session->records()) {
        r.score_ns = r.decide_ns = r.learn_ns = r.bytes = 0;
        add(&r, sizeof r);
    }
    return all;
}

TEST(DeviceMemory, SessionsAreThoseOfTheHost) {
    for (const char *dtype : {"f32", "bf16"}) {
        const auto host = load("reference", dtype), device = load("offset", dtype);
        for (const Values &values : cases)
            for (const bool restore : {false, true})
                EXPECT_EQ(life(host, values, restore), life(device, values, restore))
                    << values[0].second << " " << values.back().second << " " << dtype;
    }
    const auto host = load("reference", "bf16", 0, "int8"),
               device = load("offset", "bf16", 0, "int8");
    ASSERT_EQ(device->backbone().storage(), Storage::int8);
    for (const Values &values : cases)
        EXPECT_EQ(life(host, values, true), life(device, values, true)) << values[0].second;
    EXPECT_GT(offset::control.replays, 0u);
    EXPECT_GT(offset::control.joined, 0u); // linear and gelu
}

TEST(DeviceMemory, ChunksAheadAreThoseOfTheHost) {
    for (const char *dtype : {"f32", "bf16"}) {
        const auto host = load("reference", dtype), device = load("offset", dtype);
        for (const Values &values : ahead_cases) {
            SCOPED_TRACE(values[0].second + " " + values.back().second + " " + dtype);
            const auto expected = calls(host, values);
            EXPECT_EQ(expected, calls(device, values));
            if (std::string(dtype) != "f32")
                continue;
            offset::control.no_conditions = true; // as with an old driver
            EXPECT_EQ(expected, calls(device, values));
            offset::control.no_conditions = false;
        }
    }
}

TEST(DeviceMemory, NobodyWaitsForAChunk) {
    const auto device = load("offset", "f32");
    const auto waits = [&](const Values &values) {
        Session session(device, options_of(values));
        session.expect(100);
        session.feed(random_tokens(16 * 9, 7));
        session.adapt(no_limits(session)); // both contexts, both sets of fast weights
        offset::Control &c = offset::control;
        const size_t downloads = c.downloads, uploads = c.uploads, replays = c.replays,
                     sent = c.sent, kernels = c.kernels;
        c.most_under_way = 0;
        session.feed(random_tokens(16 * 8, 8));
        session.adapt(no_limits(session));
        EXPECT_EQ(c.sent - sent, 8u);
        EXPECT_EQ(c.replays - replays, 8u);
        EXPECT_EQ(c.uploads - uploads, 9u); // tokens; the policy's state once
        EXPECT_EQ(c.kernels - kernels, 0u);
        EXPECT_EQ(c.most_under_way, 4u);
        return c.downloads - downloads;
    };
    for (const size_t i : {0, 1, 5, 9, 13, 15, 17, 18}) {
        SCOPED_TRACE(ahead_cases[i][0].second + " " + ahead_cases[i].back().second);
        EXPECT_EQ(waits(ahead_cases[i]), 0u);
    }
}

// What was queued before a call is cancelled counts, and nothing else changes.
TEST(DeviceMemory, ACancelledCallKeepsWhatItFinished) {
    const auto host = load("reference", "f32"), device = load("offset", "f32");
    const Values values{{"adapter", "lora"}, {"policy", "ema:loss:0.5"}};
    Session session(device, options_of(values));
    session.feed(random_tokens(16 * 30, 31));
    ponder_call call{};
    call.struct_size = sizeof call;
    call.progress = [](void *, uint64_t done, uint64_t) -> int32_t { return done >= 16 * 10; };
    EXPECT_THROW(session.adapt(CallGuard(session.cancel_flag(), &call)), Error);
    const uint64_t chunks = session.info().chunks_scored;
    EXPECT_GE(chunks, 10u);
    EXPECT_LT(chunks, 20u);
    EXPECT_EQ(session.info().tokens_waiting, 16 * (30 - chunks));
    session.adapt(no_limits(session));
    Session whole(host, options_of(values));
    whole.feed(random_tokens(16 * 30, 31));
    whole.adapt(no_limits(whole));
    for (size_t i = 0; i < 30; ++i)
        EXPECT_EQ(session.records()[i].loss_before, whole.records()[i].loss_before) << i;
}

TEST(DeviceMemory, SnapshotsMove) {
    const auto host = load("reference", "f32"), device = load("offset", "f32");
    const auto tokens = random_tokens(16 * 6, 6);
    for (const Values &values : {cases[0], cases[7]}) {
        const auto half = [&](const auto &model, std::span<const std::byte> from) {
            return three_chunks(model, options_of(values), tokens, from);
        };
        const auto stay = half(host, half(host, {}).first);
        EXPECT_EQ(half(host, half(device, {}).first).second, stay.second);
        EXPECT_EQ(half(device, half(host, {}).first).second, stay.second);
    }
}

// Two streams, after updates, past a full window, with a cache that is computed again.
TEST(DeviceMemory, GeneratingIsThatOfTheHost) {
    for (const char *dtype : {"f32", "bf16"})
        for (const Values &values : cases) {
            const auto write = [&](const char *backend) {
                const auto model = load(backend, dtype);
                std::vector<std::unique_ptr<Session>> sessions;
                std::vector<Session *> list;
                std::vector<CallGuard> guards;
                std::vector<Generation> wishes(2);
                std::vector<double> all;
                for (size_t i = 0; i < 2; ++i) {
                    sessions.push_back(std::make_unique<Session>(model, options_of(values)));
                    list.push_back(sessions[i].get());
                    guards.push_back(no_limits(*list[i]));
                    wishes[i].prompt = random_tokens(5 + 20 * i, 30 + i);
                    wishes[i].max_tokens = 30;
                    wishes[i].log_probabilities = true;
                    wishes[i].token = [&](uint64_t, int32_t id, double log_p, std::string_view) {
                        if (id >= 0)
                            all.insert(all.end(), {double(id), log_p});
                        return false;
                    };
                }
                for (int round = 0; round < 2; ++round) {
                    std::vector<ponder_generation_result> results(2);
                    Session::generate(list, wishes, results, guards);
                    list[0]->feed(random_tokens(16, 40));
                    list[0]->adapt(no_limits(*list[0]));
                }
                std::vector<ponder_generation_result> results(1);
                Session::generate({&list[1], 1}, {&wishes[1], 1}, results, {&guards[1], 1});
                return all;
            };
            EXPECT_EQ(write("reference"), write("offset"))
                << values[0].second << " " << values.back().second << " " << dtype;
        }
}

// What a token of a text costs in calls of the device: its inputs go up in one, its pass is noted
// down and replayed, its logits come back. A layer that learns inside is a second pass.
TEST(DeviceMemory, ATokenIsOneReplay) {
    struct Calls {
        size_t uploads, copies, replays, kernels, downloads;
        bool operator==(const Calls &) const = default;
    };
    const auto calls = [](const Values &values, size_t streams, uint64_t tokens) {
        const auto model = load("offset", "f32");
        std::vector<std::unique_ptr<Session>> sessions;
        std::vector<Session *> list;
        std::vector<CallGuard> guards;
        std::vector<Generation> wishes(streams);
        std::vector<ponder_generation_result> results(streams);
        for (size_t i = 0; i < streams; ++i) {
            sessions.push_back(std::make_unique<Session>(model, options_of(values)));
            list.push_back(sessions[i].get());
            guards.push_back(no_limits(*list[i]));
            wishes[i].prompt = random_tokens(5 + i, 50);
            wishes[i].max_tokens = tokens;
        }
        const offset::Control &c = offset::control;
        const Calls before{c.uploads, c.copies, c.replays, c.kernels, c.downloads};
        Session::generate(list, wishes, results, guards);
        return Calls{c.uploads - before.uploads, c.copies - before.copies,
                     c.replays - before.replays, c.kernels - before.kernels,
                     c.downloads - before.downloads};
    };
    const auto each = [&](const Values &values, size_t streams) {
        const Calls few = calls(values, streams, 8), many = calls(values, streams, 9);
        return Calls{many.uploads - few.uploads, many.copies - few.copies,
                     many.replays - few.replays, many.kernels - few.kernels,
                     many.downloads - few.downloads};
    };
    for (const Values &values :
         std::initializer_list<Values>{{{"adapter", "none"}},
                                       {{"adapter", "lora"}},
                                       {{"adapter", "lora"}, {"lora.layers", "last:1"}},
                                       {{"adapter", "lora"}, {"policy", "skip"}}})
        for (const size_t streams : {1, 3})
            EXPECT_EQ(each(values, streams), (Calls{1, 0, 1, 0, 1})) << values.back().second;
    // Of a mini-batch of two tokens.
    const Calls two = [&] {
        const Values values{{"adapter", "ttt-linear"}, {"ttt.mini_batch", "2"}, {"chunk", "32"}};
        const Calls few = calls(values, 1, 16), many = calls(values, 1, 18);
        return Calls{many.uploads - few.uploads, many.copies - few.copies,
                     many.replays - few.replays, many.kernels - few.kernels,
                     many.downloads - few.downloads};
    }();
    EXPECT_EQ(two.uploads, 2u);
    EXPECT_EQ(two.replays, 4u);
    EXPECT_EQ(two.kernels, 0u);
    EXPECT_EQ(two.downloads, 2u);
}

TEST(DeviceMemory, AnUpdateByHandReadsBackTwice) {
    const auto device = load("offset", "f32");
    Session session(device, options_of({{"adapter", "lora"}, {"policy", "always"}}));
    session.feed(random_tokens(16 * 4, 7));
    session.adapt(no_limits(session));
    session.feed(random_tokens(16, 8));
    const size_t before = offset::control.downloads;
    session.score(no_limits(session));
    session.learn(-1, no_limits(session));
    EXPECT_EQ(offset::control.downloads - before, 2u); // losses; norms
}

std::string trained(const std::shared_ptr<const Model> &model, int32_t kind, const Values &values) {
    const auto trainer = make_trainer(model, kind, options_of(values));
    std::string log;
    const TempDir dir;
    for (const ponder_train_record &r :
         take_steps(*trainer, 3, kind == PONDER_TRAIN_BACKBONE ? 17 : 16 * 5)) {
        char text[128];
        std::snprintf(text, sizeof text, "%.17g %.17g %.17g\n", r.loss, r.loss_first,
                      r.gradient_norm);
        log += text;
    }
    trainer->save(dir.file("checkpoint"), "");
    const auto again = make_trainer(model, kind, options_of(values));
    again->load(dir.file("checkpoint"));
    again->save(dir.file("again"), "");
    const std::string checkpoint = read_file(dir.file("checkpoint"), 1 << 26);
    EXPECT_EQ(checkpoint, read_file(dir.file("again"), 1 << 26));
    trainer->export_to(dir.path());
    const char *name = kind == PONDER_TRAIN_BACKBONE ? "model.safetensors" : "ponder.safetensors";
    return log + checkpoint + read_file(dir.file(name), 1 << 26);
}

TEST(DeviceMemory, TrainersAreThoseOfTheHost) {
    for (const char *dtype : {"f32", "bf16"}) {
        const auto host = load("reference", dtype), device = load("offset", dtype);
        const auto same = [&](int32_t kind, const Values &values) {
            EXPECT_EQ(trained(host, kind, values), trained(device, kind, values))
                << values[0].second << " " << values.back().second << " " << dtype;
        };
        same(PONDER_TRAIN_ADAPTER,
             {{"adapter", "lora"}, {"train.window", "2"}, {"train.average", "0.5"}});
        same(PONDER_TRAIN_ADAPTER, {{"adapter", "lora"}, {"inner.optimizer", "sgd"}});
        same(PONDER_TRAIN_ADAPTER, {{"adapter", "ttt-linear"}, {"train.permute", "0.2"}});
        if (std::string(dtype) == "f32")
            same(PONDER_TRAIN_ADAPTER, {{"adapter", "lora"}, {"train.higher", "1"}});
        same(PONDER_TRAIN_BACKBONE, {{"adapter", "none"}, {"train.dropout", "0.1"}});
        same(PONDER_TRAIN_BACKBONE,
             {{"adapter", "none"}, {"train.attention_dropout", "0.1"}, {"train.recompute", "1"}});
        same(PONDER_TRAIN_BACKBONE,
             {{"adapter", "none"}, {"train.micro", "2"}, {"train.average", "0.5"}});
    }
}

// What lay in the device's memory of a folder's adapter goes when the folder is written again.
TEST(DeviceMemory, AnAdapterThatIsWrittenAgainIsThatOfTheHost) {
    const auto host = load("reference", "f32"), device = load("offset", "f32");
    const TempDir dir;
    const auto trainer = make_trainer(
        host, PONDER_TRAIN_ADAPTER,
        options_of({{"adapter", "ttt-linear"}, {"train.lr", "0.05"}, {"train.warmup", "0"}}));
    const Options options = options_of({{"adapter", dir.path()}, {"policy", "always"}});
    std::vector<uint64_t> in_use;
    for (int i = 0; i < 4; ++i) {
        take_steps(*trainer, 1, 48);
        trainer->export_to(dir.path());
        const auto tokens = random_tokens(48, 5);
        EXPECT_EQ(three_chunks(device, options, tokens, {}).second,
                  three_chunks(host, options, tokens, {}).second);
        in_use.push_back(device->runtime().memory->in_use());
    }
    EXPECT_EQ(in_use[3], in_use[1]);
}

// Layers below watch what a gate reads.
TEST(DeviceMemory, FeaturesAreThoseOfTheHost) {
    const auto features = [&](const std::shared_ptr<const Model> &model, FeatureSet set) {
        Session session(model, options_of({{"adapter", "lora"}, {"policy", "always"}}));
        auto gate = std::make_shared<Gate>();
        gate->form = GateForm::steps;
        gate->features = set;
        const size_t inputs = feature_count(gate->features);
        gate->net = GateNet(inputs, 4, gate_outputs(gate->form));
        Random random(3);
        gate->net.draw(random);
        gate->mean.assign(inputs, 0.0);
        gate->deviation.assign(inputs, 1.0);
        gate->calibration.points = {{0.5, 0.0}};
        gate->seal();
        session.use_gate(gate);
        session.feed(random_tokens(16 * 4, 9));
        std::vector<double> all;
        while (session.score(no_limits(session))) {
            for (double x : session.features())
                all.push_back(std::isnan(x) ? -1 : x);
            session.learn(-1, no_limits(session));
        }
        return all;
    };
    for (const FeatureSet set : {FeatureSet::planned, FeatureSet::ponder})
        EXPECT_EQ(features(load("reference", "bf16"), set), features(load("offset", "bf16"), set));
}

TEST(DeviceMemory, RunningOutLeavesTheSessionAsItWas) {
    const auto device = load("offset", "f32");
    Session session(device, options_of({{"adapter", "lora"}, {"policy", "always"}}));
    session.feed(random_tokens(16 * 3, 10));
    session.adapt(no_limits(session));
    const std::vector<std::byte> before = session.save();
    offset::control.limit = 0;
    EXPECT_THROW(Session(device, options_of({{"adapter", "lora"}})), Error);
    try {
        Session(device, options_of({{"adapter", "ttt-linear"}}));
        FAIL();
    } catch (const Error &e) {
        EXPECT_EQ(e.status(), PONDER_E_NO_MEMORY);
    }
    offset::control.limit = SIZE_MAX;
    EXPECT_EQ(before, session.save());
    session.feed(random_tokens(16, 11));
    session.adapt(no_limits(session));
    // The runtime's limit counts device memory, and all of it comes back.
    const auto memory = device->runtime().memory;
    const uint64_t held = memory->in_use();
    { Session(device, options_of({{"adapter", "lora"}})); }
    EXPECT_EQ(memory->in_use(), held);
    const uint64_t weights = load("offset", "f32")->runtime().memory->in_use();
    const auto tight = load("offset", "f32", weights + (64 << 10));
    EXPECT_THROW(Session(tight, options_of({{"adapter", "lora"}})), Error);
}

TEST(DeviceMemory, AFailureIsAStatus) {
    const auto device = load("offset", "f32");
    Session session(device, options_of({{"adapter", "lora"}, {"policy", "always"}}));
    session.feed(random_tokens(16 * 2, 12));
    offset::control.broken = true;
    try {
        session.adapt(no_limits(session));
        ADD_FAILURE();
    } catch (const Error &e) {
        EXPECT_EQ(e.status(), PONDER_E_BACKEND);
        EXPECT_NE(std::string(e.what()).find("broken on purpose"), std::string::npos);
    }
    offset::control.broken = false;
}

// The device fails while four chunks are under way.
TEST(DeviceMemory, AFailureUnderWayIsAStatusToo) {
    const auto host = load("reference", "f32"), device = load("offset", "f32");
    for (const Values &values :
         std::initializer_list<Values>{{{"adapter", "lora"}, {"policy", "ema:loss:0.5"}},
                                       {{"adapter", "ttt-linear"}, {"policy", "every:2"}}}) {
        Session session(device, options_of(values));
        session.feed(random_tokens(16 * 30, 12));
        ponder_call call{};
        call.struct_size = sizeof call;
        call.progress = [](void *, uint64_t done, uint64_t) -> int32_t {
            offset::control.broken = done >= 16 * 10;
            return 0;
        };
        EXPECT_EQ(PONDER_E_BACKEND,
                  thrown_status([&] { session.adapt(CallGuard(session.cancel_flag(), &call)); }));
        EXPECT_TRUE(offset::control.broken);
        offset::control.broken = false;
        EXPECT_EQ(thrown_status([&] { session.losses(); }), PONDER_E_STATE);
        session.reset();
        const auto tokens = random_tokens(16 * 9, 13);
        Session fresh(host, options_of(values));
        for (Session *const each : {&session, &fresh}) {
            each->feed(tokens);
            each->adapt(no_limits(*each));
        }
        ASSERT_EQ(session.records().size(), fresh.records().size());
        for (size_t i = 0; i < fresh.records().size(); ++i)
            EXPECT_EQ(session.records()[i].loss_before, fresh.records()[i].loss_before) << i;
    }
}

// A pass that the flush of another session's rest has made and lets go again.
TEST(DeviceMemory, AChunksPassOutlivesThoseOfRests) {
    const auto device = load("offset", "f32");
    Session rests(device, options_of({{"adapter", "lora"}, {"chunk", "32"}, {"context", "32"}}));
    const auto flush = [&](size_t tokens) {
        rests.feed(random_tokens(tokens, uint64_t(tokens)));
        rests.flush(no_limits(rests));
    };
    flush(16);
    auto whole = std::make_unique<Session>(
        device, options_of({{"adapter", "lora"}, {"chunk", "16"}, {"context", "16"}}));
    whole->feed(random_tokens(16 * 6, 14));
    whole->adapt(no_limits(*whole));
    for (const size_t tokens : {5, 6, 7, 8, 9, 10})
        flush(tokens);
    whole.reset();
}

} // namespace
} // namespace ponder::test
