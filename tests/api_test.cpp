// The C ABI as a client sees it: bad arguments, struct sizes, buffers, callbacks, threads, memory
// that runs out. Links the shared library and includes nothing of its inside.
#include "ponder/ponder.h"

#include "temp_dir.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

namespace {

const char *tiny = PONDER_TEST_DATA "/gpt2_tiny";

ponder_error make_error() {
    ponder_error error{};
    error.struct_size = sizeof error;
    return error;
}

// Calls and expects a status, with a message unless it is OK.
#define EXPECT_STATUS(wanted, call, text)                                                          \
    do {                                                                                           \
        ponder_error error = make_error();                                                         \
        ponder_error *e = &error;                                                                  \
        EXPECT_EQ(wanted, (call)) << error.message;                                                \
        EXPECT_EQ(wanted, error.code);                                                             \
        EXPECT_NE(std::string(error.message).find(text), std::string::npos) << error.message;      \
    } while (0)

ponder_runtime *make_runtime(ponder_runtime_options options = {}) {
    options.struct_size = sizeof options;
    if (!options.threads)
        options.threads = 2;
    options.backend_path = PONDER_TEST_BACKENDS;
    ponder_runtime *runtime = nullptr;
    ponder_error error = make_error();
    EXPECT_EQ(PONDER_OK, ponder_runtime_create(&runtime, &options, &error)) << error.message;
    return runtime;
}

ponder_model *make_model(ponder_runtime *runtime, const char *folder = tiny) {
    ponder_model *model = nullptr;
    ponder_error error = make_error();
    EXPECT_EQ(PONDER_OK, ponder_model_load(&model, runtime, folder, nullptr, nullptr, &error))
        << error.message;
    return model;
}

ponder_options *make_options(std::vector<std::pair<const char *, const char *>> values = {}) {
    ponder_options *options = nullptr;
    EXPECT_EQ(PONDER_OK, ponder_options_create(&options, nullptr));
    values.insert(values.begin(), {"chunk", "32"});
    for (const auto &[name, value] : values)
        EXPECT_EQ(PONDER_OK, ponder_options_set(options, name, value, nullptr)) << name;
    return options;
}

std::vector<int32_t> tokens(size_t count) {
    std::vector<int32_t> ids(count);
    for (size_t i = 0; i < count; ++i)
        ids[i] = int32_t((i * i + i / 7) % 23);
    return ids;
}

class Api : public testing::Test {
protected:
    void SetUp() override {
        runtime = make_runtime();
        model = make_model(runtime);
        options = make_options();
        ASSERT_EQ(PONDER_OK, ponder_session_create(&session, model, options, nullptr));
    }
    void TearDown() override {
        ponder_session_destroy(session);
        ponder_options_destroy(options);
        ponder_model_release(model);
        ponder_runtime_destroy(runtime);
    }
    ponder_runtime *runtime = nullptr;
    ponder_model *model = nullptr;
    ponder_options *options = nullptr;
    ponder_session *session = nullptr;
};

TEST_F(Api, NullAndWrongKindHandlesAreErrors) {
    alignas(8) unsigned char junk[4096] = {};
    auto *wrong_session = reinterpret_cast<ponder_session *>(model);
    for (auto *s : {static_cast<ponder_session *>(nullptr), wrong_session,
                    reinterpret_cast<ponder_session *>(junk)}) {
        int32_t id = 1;
        size_t n = 0;
        float f = 0;
        ponder_session_info info{};
        info.struct_size = sizeof info;
        ponder_session *out = nullptr;
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_feed(s, &id, 1, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_adapt(s, &id, 1, nullptr, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_flush(s, nullptr, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_reset(s, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_expect(s, 1, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_fork(&out, s, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_get(s, &info, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_losses(s, &f, 1, &n, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_records(s, 0, nullptr, 0, &n, e),
                      "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_save(s, "/tmp/x", e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_load(s, "/tmp/x", e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_save_memory(s, junk, 1, &n, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_load_memory(s, junk, 1, e), "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_profile(s, 1, nullptr, 0, &n, e),
                      "session");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_score(&s, 1, nullptr, nullptr, e), "sessions");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_learn(&s, 1, nullptr, nullptr, e), "sessions");
        ponder_session_cancel(s);
        EXPECT_EQ(out, nullptr);
    }
    ponder_session_destroy(wrong_session); // left alone
    auto *wrong_model = reinterpret_cast<ponder_model *>(runtime);
    ponder_session *out = nullptr;
    size_t n = 0;
    const char *bytes = nullptr;
    for (ponder_model *m : {static_cast<ponder_model *>(nullptr), wrong_model}) {
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_create(&out, m, nullptr, e), "model");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_model_retain(m, e), "model");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_model_tokenize(m, "x", 1, nullptr, 0, &n, e),
                      "model");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_model_token_bytes(m, 0, &bytes, &n, e), "model");
    }
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_create(nullptr, model, nullptr, e), "out");
    auto *wrong_options = reinterpret_cast<ponder_options *>(model);
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_create(&out, model, wrong_options, e),
                  "options");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_set(wrong_options, "chunk", "2", e), "options");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_set(options, nullptr, "2", e), "name");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_set(options, "chunk", nullptr, e), "value");
    auto *wrong_runtime = reinterpret_cast<ponder_runtime *>(model);
    ponder_model *loaded = nullptr;
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_model_load(&loaded, wrong_runtime, tiny, nullptr, nullptr, e), "runtime");
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_model_load(&loaded, runtime, nullptr, nullptr, nullptr, e), "path");
    EXPECT_EQ(0u, ponder_backend_count(wrong_runtime));
}

TEST_F(Api, DestroyedHandlesAreErrorsWhileTheirMemoryTells) {
    // A stand-in for freed memory: a block without the word that tells a session.
    alignas(16) unsigned char copy[64] = {};
    std::memcpy(copy + 4, reinterpret_cast<unsigned char *>(session) + 4, 12);
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_session_reset(reinterpret_cast<ponder_session *>(copy), e), "session");
}

TEST_F(Api, StructSizesAreChecked) {
    ponder_session_info info{};
    for (uint32_t size : {0u, 4u, 70000u}) {
        info.struct_size = size;
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_get(session, &info, e), "struct_size");
    }
    // An older client's smaller struct: nothing behind its size is written.
    std::memset(&info, 0x5a, sizeof info);
    info.struct_size = offsetof(ponder_session_info, tokens_waiting);
    EXPECT_STATUS(PONDER_OK, ponder_session_get(session, &info, e), "");
    EXPECT_EQ(info.chunk_tokens, 32u);
    EXPECT_EQ(info.records, 0x5a5a5a5a5a5a5a5aull);

    // A newer client's larger struct: fine while the tail is zero.
    struct {
        ponder_model_options known;
        uint64_t unknown;
    } larger{};
    larger.known.struct_size = sizeof larger;
    ponder_model *loaded = nullptr;
    EXPECT_STATUS(PONDER_OK, ponder_model_load(&loaded, runtime, tiny, &larger.known, nullptr, e),
                  "");
    ponder_model_release(loaded);
    larger.unknown = 1;
    EXPECT_STATUS(PONDER_E_UNSUPPORTED,
                  ponder_model_load(&loaded, runtime, tiny, &larger.known, nullptr, e), "offset");

    // The error struct itself: too small for a message, it is left alone.
    ponder_error small{};
    small.struct_size = 8;
    EXPECT_EQ(PONDER_E_ARGUMENT, ponder_session_reset(nullptr, &small));
    EXPECT_EQ(small.code, 0);
    EXPECT_EQ(PONDER_E_ARGUMENT, ponder_session_reset(nullptr, nullptr));
}

TEST_F(Api, OptionsComeFromOneTable) {
    ASSERT_GT(ponder_option_count(), 20u);
    for (uint32_t i = 0; i < ponder_option_count(); ++i) {
        ponder_option_info info{};
        info.struct_size = sizeof info;
        ASSERT_EQ(PONDER_OK, ponder_option_get(i, &info, nullptr));
        EXPECT_GT(std::strlen(info.doc), 3u) << info.name;
        ponder_options *fresh = nullptr;
        ASSERT_EQ(PONDER_OK, ponder_options_create(&fresh, nullptr));
        const char *value = nullptr;
        EXPECT_EQ(PONDER_OK, ponder_options_value(fresh, info.name, &value, nullptr));
        EXPECT_STREQ(value, info.default_value);
        EXPECT_STATUS(PONDER_OK, ponder_options_set(fresh, info.name, info.default_value, e), "");
        if (info.type != PONDER_OPTION_TEXT)
            for (const char *bad : {"", "x", "1x", "nan", "-1e300", " 1", "1,5", "0x10"})
                EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_set(fresh, info.name, bad, e),
                              info.name);
        ponder_options_destroy(fresh);
    }
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_set(options, "lora.rang", "4", e), "lora.rang");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_set(options, "lora.rank", "0", e), "lora.rank");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_set(options, "lora.rank", "1.5", e), "whole");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_set(options, "inner.optimizer", "lion", e),
                  "adam");
    ponder_option_info info{};
    info.struct_size = sizeof info;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_option_get(9999, &info, e), "9999");
}

TEST_F(Api, OptionsAsASessionTakesThem) {
    const char *value = nullptr;
    ponder_options *found = nullptr;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_resolve(nullptr, options, e), "out");
    ASSERT_EQ(PONDER_OK, ponder_options_resolve(&found, nullptr, nullptr));
    ASSERT_EQ(PONDER_OK, ponder_options_value(found, "adapter", &value, nullptr));
    EXPECT_STREQ(value, "lora");
    ponder_options_destroy(found);

    const TempDir dir;
    ASSERT_EQ(PONDER_OK, ponder_options_set(options, "adapter", dir.path().c_str(), nullptr));
    ponder_options *none = nullptr;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_options_resolve(&none, options, e), "ponder.json");
    EXPECT_EQ(none, nullptr);
    std::ofstream(dir.file("ponder.json"))
        << R"({"format": "ponder-adapter", "version": 1, "kind": "lora", "model": "0",
               "options": {"lora.rank": "3", "inner.lr": "0.5", "inner.beta1": "0.25"}})";
    for (const auto &[name, text] : {std::pair{"lora.rank", "5"}, std::pair{"inner.lr", "0.125"}})
        ASSERT_EQ(PONDER_OK, ponder_options_set(options, name, text, nullptr));
    ASSERT_EQ(PONDER_OK, ponder_options_resolve(&found, options, nullptr));
    for (const auto &[name, text] : {std::pair{"lora.rank", "3"}, std::pair{"inner.lr", "0.125"},
                                     std::pair{"inner.beta1", "0.25"}}) {
        ASSERT_EQ(PONDER_OK, ponder_options_value(found, name, &value, nullptr));
        EXPECT_STREQ(value, text) << name;
    }
    ponder_options_destroy(found);
}

TEST_F(Api, SessionsRefuseOptionsThatDoNotFit) {
    const std::vector<std::pair<const char *, const char *>> bad = {
        {"policy", "sometimes"},
        {"policy", "every:0"},
        {"policy", "every:1.5"},
        {"policy", "first:2"},
        {"policy", "threshold:loss"},
        {"policy", "threshold:luck:1"},
        {"policy", "ema:loss:1.5"},
        {"policy", "ema:reconstruction:0.5"},
        {"lora.layers", "last:3"},
        {"lora.layers", "2"},
        {"lora.layers", "last:-1"},
        {"lora.layers", ""},
        {"lora.modules", "attn"},
        {"adapter", "/nonexistent"},
        {"chunk", "129"},
        {"context", "4096"},
    };
    for (const auto &[name, value] : bad) {
        ponder_options *o = make_options({{name, value}});
        ponder_session *out = nullptr;
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_create(&out, model, o, e), "");
        EXPECT_EQ(out, nullptr) << name << "=" << value;
        ponder_options_destroy(o);
    }
    ponder_options *o = make_options({{"adapter", "ttt-linear"}, {"ttt.heads", "3"}});
    ponder_session *out = nullptr;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_create(&out, model, o, e), "ttt.heads");
    ponder_options_destroy(o);
}

TEST_F(Api, TokensOutOfRangeRefuseTheWholeCall) {
    ponder_session_info info{};
    info.struct_size = sizeof info;
    for (int32_t bad : {-1, 320, 2147483647, -2147483647 - 1}) {
        std::vector<int32_t> ids = tokens(40);
        ids[39] = bad;
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_feed(session, ids.data(), 40, e),
                      "ids[39]");
        EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_adapt(session, ids.data(), 40, nullptr, e),
                      "ids[39]");
    }
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_session_feed(session, nullptr, 3, e), "ids");
    EXPECT_EQ(PONDER_OK, ponder_session_get(session, &info, nullptr));
    EXPECT_EQ(info.tokens_fed, 0u);
    // More than may wait.
    const std::vector<int32_t> many(1 << 20, 1);
    for (int i = 0; i < 16; ++i)
        EXPECT_EQ(PONDER_OK, ponder_session_feed(session, many.data(), many.size(), nullptr));
    EXPECT_STATUS(PONDER_E_BUFFER, ponder_session_feed(session, many.data(), 1, e), "wait");
}

TEST_F(Api, OrderOfCalls) {
    const auto ids = tokens(96);
    uint8_t done = 9;
    size_t count = 0;
    float losses[32];
    EXPECT_STATUS(PONDER_E_STATE, ponder_session_losses(session, losses, 32, &count, e), "scored");
    EXPECT_STATUS(PONDER_E_STATE, ponder_session_profile(session, 1, nullptr, 0, &count, e),
                  "scored");
    EXPECT_STATUS(PONDER_OK, ponder_score(&session, 1, &done, nullptr, e), "");
    EXPECT_EQ(done, 0);
    EXPECT_STATUS(PONDER_OK, ponder_learn(&session, 1, nullptr, nullptr, e), "");
    ASSERT_EQ(PONDER_OK, ponder_session_feed(session, ids.data(), 96, nullptr));
    EXPECT_STATUS(PONDER_OK, ponder_score(&session, 1, &done, nullptr, e), "");
    EXPECT_EQ(done, 1);
    EXPECT_STATUS(PONDER_E_STATE, ponder_score(&session, 1, &done, nullptr, e), "learned");
    EXPECT_STATUS(PONDER_E_BUFFER, ponder_session_losses(session, losses, 30, &count, e), "31");
    EXPECT_EQ(count, 31u);
    EXPECT_STATUS(PONDER_OK, ponder_session_losses(session, losses, 32, &count, e), "");
    int32_t steps = -2;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_learn(&session, 1, &steps, nullptr, e), "steps[0]");
    steps = 2;
    EXPECT_STATUS(PONDER_OK, ponder_learn(&session, 1, &steps, nullptr, e), "");
    ponder_record records[4];
    records[0].struct_size = sizeof records[0];
    ASSERT_EQ(PONDER_OK, ponder_session_records(session, 0, records, 4, &count, nullptr));
    ASSERT_EQ(count, 1u);
    EXPECT_EQ(records[0].steps, 2);
    EXPECT_TRUE(records[0].flags & PONDER_RECORD_UPDATED);
    ponder_session *twice[2] = {session, session};
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_score(twice, 2, nullptr, nullptr, e), "twice");
    // A policy that needs the length of the stream says so.
    ponder_options *o = make_options({{"policy", "first:0.5"}});
    ponder_session *first = nullptr;
    ASSERT_EQ(PONDER_OK, ponder_session_create(&first, model, o, nullptr));
    EXPECT_STATUS(PONDER_E_STATE, ponder_session_adapt(first, ids.data(), 96, nullptr, e),
                  "expect");
    EXPECT_EQ(PONDER_OK, ponder_session_expect(first, 3, nullptr));
    EXPECT_STATUS(PONDER_OK, ponder_session_adapt(first, nullptr, 0, nullptr, e), "");
    ponder_session_destroy(first);
    ponder_options_destroy(o);
}

TEST_F(Api, ManySessionsAtOnceEqualOneByOne) {
    const auto ids = tokens(32 * 4);
    std::vector<ponder_session *> many;
    for (int i = 0; i < 3; ++i) {
        ponder_session *s = nullptr;
        ASSERT_EQ(PONDER_OK, ponder_session_create(&s, model, options, nullptr));
        ASSERT_EQ(PONDER_OK, ponder_session_feed(s, ids.data(), 32 * size_t(i + 2), nullptr));
        many.push_back(s);
    }
    for (int round = 0; round < 5; ++round) {
        uint8_t done[3];
        ASSERT_EQ(PONDER_OK, ponder_score(many.data(), 3, done, nullptr, nullptr));
        for (int i = 0; i < 3; ++i)
            EXPECT_EQ(done[i], round < i + 2);
        ASSERT_EQ(PONDER_OK, ponder_learn(many.data(), 3, nullptr, nullptr, nullptr));
    }
    ASSERT_EQ(PONDER_OK, ponder_session_adapt(session, ids.data(), ids.size(), nullptr, nullptr));
    const auto last_loss = [](ponder_session *s, uint64_t chunk) {
        ponder_record r{};
        r.struct_size = sizeof r;
        size_t n = 0;
        EXPECT_EQ(PONDER_OK, ponder_session_records(s, chunk, &r, 1, &n, nullptr));
        return r.loss_before;
    };
    EXPECT_EQ(last_loss(many[2], 3), last_loss(session, 3));
    EXPECT_EQ(last_loss(many[0], 1), last_loss(session, 1));
    for (ponder_session *s : many)
        ponder_session_destroy(s);
}

TEST_F(Api, ConcurrentSessionsOfOneModelGiveTheSame) {
    const auto ids = tokens(32 * 12);
    std::vector<std::vector<double>> losses(4);
    std::vector<std::thread> threads;
    for (auto &out : losses)
        threads.emplace_back([&, this] {
            ponder_session *s = nullptr;
            if (ponder_session_create(&s, model, options, nullptr) != PONDER_OK)
                return;
            ponder_session_adapt(s, ids.data(), ids.size(), nullptr, nullptr);
            std::vector<ponder_record> records(12);
            records[0].struct_size = sizeof(ponder_record);
            size_t n = 0;
            ponder_session_records(s, 0, records.data(), 12, &n, nullptr);
            for (size_t i = 0; i < n; ++i)
                out.push_back(records[i].loss_before);
            ponder_session_destroy(s);
        });
    for (std::thread &t : threads)
        t.join();
    for (const auto &out : losses) {
        ASSERT_EQ(out.size(), 12u);
        EXPECT_EQ(out, losses[0]);
    }
}

TEST_F(Api, CancelDeadlineAndProgress) {
    const auto ids = tokens(32 * 6);
    ponder_call call{};
    call.struct_size = sizeof call;
    struct Seen {
        uint64_t calls = 0, last = 0;
    } seen;
    call.user_data = &seen;
    call.progress = [](void *user, uint64_t done, uint64_t total) -> int32_t {
        auto *s = static_cast<Seen *>(user);
        s->calls += 1;
        s->last = done;
        return total == 32 * 6 && s->calls == 2;
    };
    EXPECT_STATUS(PONDER_E_CANCELLED,
                  ponder_session_adapt(session, ids.data(), ids.size(), &call, e), "progress");
    EXPECT_EQ(seen.last, 64u);
    ponder_session_info info{};
    info.struct_size = sizeof info;
    ASSERT_EQ(PONDER_OK, ponder_session_get(session, &info, nullptr));
    EXPECT_EQ(info.chunks_scored, 2u);
    EXPECT_EQ(info.tokens_waiting, 32u * 4); // the rest waits
    call = {};
    call.struct_size = sizeof call;
    call.timeout_ns = 1;
    EXPECT_STATUS(PONDER_E_DEADLINE, ponder_session_adapt(session, nullptr, 0, &call, e),
                  "deadline");
    EXPECT_STATUS(PONDER_OK, ponder_session_adapt(session, nullptr, 0, nullptr, e), "");
    ASSERT_EQ(PONDER_OK, ponder_session_get(session, &info, nullptr));
    EXPECT_EQ(info.chunks_scored, 6u);
    // Cancel from another thread while a long call runs.
    const std::vector<int32_t> many = tokens(32 * 20000);
    std::atomic<bool> running{true};
    std::thread canceller([&] {
        while (running) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            ponder_session_cancel(session);
        }
    });
    EXPECT_STATUS(PONDER_E_CANCELLED,
                  ponder_session_adapt(session, many.data(), many.size(), nullptr, e), "cancelled");
    running = false;
    canceller.join();
}

TEST_F(Api, SnapshotsThroughFilesAndMemory) {
    const auto ids = tokens(32 * 4 + 5);
    ASSERT_EQ(PONDER_OK, ponder_session_adapt(session, ids.data(), ids.size(), nullptr, nullptr));
    const TempDir dir;
    const std::string path = dir.file("session.safetensors");
    ASSERT_EQ(PONDER_OK, ponder_session_save(session, path.c_str(), nullptr));
    size_t size = 0, again = 0;
    EXPECT_STATUS(PONDER_E_BUFFER, ponder_session_save_memory(session, nullptr, 0, &size, e),
                  "bytes");
    std::vector<unsigned char> memory(size);
    ASSERT_EQ(PONDER_OK, ponder_session_save_memory(session, memory.data(), size, &again, nullptr));
    EXPECT_EQ(size, again);
    ponder_session *other = nullptr;
    ASSERT_EQ(PONDER_OK, ponder_session_create(&other, model, options, nullptr));
    EXPECT_STATUS(PONDER_OK, ponder_session_load(other, path.c_str(), e), "");
    EXPECT_STATUS(PONDER_OK, ponder_session_load_memory(other, memory.data(), size, e), "");
    EXPECT_STATUS(PONDER_E_NOT_FOUND, ponder_session_load(other, dir.file("no").c_str(), e), "no");
    EXPECT_STATUS(PONDER_E_IO, ponder_session_save(other, "/nonexistent/folder/file", e), "file");
    // Any damage is refused or harmless, never a crash; what was there stays.
    for (size_t i = 0; i < size; i += 1 + size / 4000) {
        std::vector<unsigned char> damaged = memory;
        damaged[i] ^= 0x41;
        ponder_session_load_memory(other, damaged.data(), damaged.size(), nullptr);
    }
    EXPECT_STATUS(PONDER_OK, ponder_session_load_memory(other, memory.data(), size, e), "");
    std::vector<unsigned char> final_state(size);
    ASSERT_EQ(PONDER_OK,
              ponder_session_save_memory(other, final_state.data(), size, &again, nullptr));
    EXPECT_EQ(final_state, memory);
    ponder_session_destroy(other);
}

TEST(ApiMemory, EveryAllocationMayFail) {
    struct Allocator {
        std::atomic<int64_t> left{-1};
        std::atomic<int64_t> live{0};
    } allocator;
    ponder_runtime_options options{};
    options.user_data = &allocator;
    options.allocate = [](void *user, size_t size, size_t alignment) -> void * {
        auto *a = static_cast<Allocator *>(user);
        if (a->left.load() >= 0 && a->left.fetch_sub(1) <= 0)
            return nullptr;
        a->live += 1;
        return std::aligned_alloc(alignment, size);
    };
    options.release = [](void *user, void *block) {
        static_cast<Allocator *>(user)->live -= 1;
        std::free(block);
    };
    ponder_runtime *runtime = make_runtime(options);
    ponder_options *o = make_options();
    const auto ids = tokens(32 * 3);
    bool succeeded = false;
    int failures = 0;
    for (int64_t k = 0; !succeeded && k < 2000; ++k) {
        allocator.left = k;
        ponder_model *model = nullptr;
        ponder_session *session = nullptr;
        ponder_status status = ponder_model_load(&model, runtime, tiny, nullptr, nullptr, nullptr);
        if (status == PONDER_OK)
            status = ponder_session_create(&session, model, o, nullptr);
        if (status == PONDER_OK)
            status = ponder_session_adapt(session, ids.data(), ids.size(), nullptr, nullptr);
        succeeded = status == PONDER_OK;
        failures += !succeeded;
        EXPECT_TRUE(succeeded || status == PONDER_E_NO_MEMORY || status == PONDER_E_BACKEND)
            << status;
        allocator.left = -1;
        ponder_session_destroy(session);
        ponder_model_release(model);
        EXPECT_EQ(allocator.live, 0) << "after failing allocation " << k;
    }
    EXPECT_TRUE(succeeded);
    EXPECT_GT(failures, 3);
    ponder_options_destroy(o);
    ponder_runtime_destroy(runtime);
}

// On the reference backend, whose plan has no reserve.
TEST(ApiMemory, TheLimitHoldsAndThePlanIsKept) {
    ponder_model_options reference{};
    reference.struct_size = sizeof reference;
    reference.backend = "reference";
    const TempDir trained;
    {
        ponder_runtime *runtime = make_runtime();
        ponder_model *model = make_model(runtime);
        ponder_options *o = make_options({{"chunk", "8"}, {"context", "16"}});
        ponder_trainer *trainer = nullptr;
        ASSERT_EQ(PONDER_OK,
                  ponder_trainer_create(&trainer, model, PONDER_TRAIN_ADAPTER, o, nullptr));
        ASSERT_EQ(PONDER_OK, ponder_trainer_export(trainer, trained.path().c_str(), nullptr));
        ponder_trainer_destroy(trainer);
        ponder_options_destroy(o);
        ponder_model_release(model);
        ponder_runtime_destroy(runtime);
    }
    const std::string folder = trained.path();
    for (const auto &values :
         std::initializer_list<std::vector<std::pair<const char *, const char *>>>{
             {},
             {{"chunk", "24"},
              {"context", "64"}}, // the end of a stream reads 64 tokens, a chunk 48
             {{"adapter", folder.c_str()}}}) {
        ponder_runtime *runtime = make_runtime();
        ponder_options *o = make_options(values);
        ponder_memory_plan plan{};
        plan.struct_size = sizeof plan;
        EXPECT_STATUS(PONDER_OK, ponder_plan_memory(runtime, tiny, &reference, o, &plan, e), "");
        EXPECT_GT(plan.total, plan.weights);
        EXPECT_GT(plan.flops_step, 0u);
        ponder_runtime_destroy(runtime);
        ponder_runtime_options options{};
        options.memory_limit = plan.total;
        runtime = make_runtime(options);
        ponder_model *model = nullptr;
        EXPECT_STATUS(PONDER_OK, ponder_model_load(&model, runtime, tiny, &reference, nullptr, e),
                      "");
        ponder_session *session = nullptr;
        EXPECT_STATUS(PONDER_OK, ponder_session_create(&session, model, o, e), "");
        const auto ids = tokens(24 * 32 + 16);
        EXPECT_STATUS(PONDER_OK, ponder_session_adapt(session, ids.data(), ids.size(), nullptr, e),
                      "");
        EXPECT_STATUS(PONDER_OK, ponder_session_flush(session, nullptr, e), "");
        ponder_session_destroy(session);
        ponder_model_release(model);
        ponder_runtime_destroy(runtime);

        options.memory_limit = plan.weights / 2;
        runtime = make_runtime(options);
        EXPECT_STATUS(PONDER_E_NO_MEMORY,
                      ponder_model_load(&model, runtime, tiny, &reference, nullptr, e), "limit");
        ponder_runtime_destroy(runtime);
        ponder_options_destroy(o);
    }
    ponder_runtime *runtime = make_runtime();
    ponder_options *o = make_options({{"chunk", "1000"}});
    ponder_memory_plan plan{};
    plan.struct_size = sizeof plan;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_plan_memory(runtime, tiny, nullptr, o, &plan, e),
                  "positions");
    ponder_options_destroy(o);
    ponder_runtime_destroy(runtime);
}

TEST(ApiThreads, TheHostsOwnPoolDoesTheWork) {
    struct Host {
        std::atomic<int> regions{0};
    } host;
    ponder_runtime_options options{};
    options.user_data = &host;
    options.threads = 3;
    options.parallel_for = [](void *user, uint32_t count, void (*task)(void *, uint32_t),
                              void *context) {
        static_cast<Host *>(user)->regions += 1;
        std::atomic<uint32_t> next{0};
        std::vector<std::thread> workers;
        for (int w = 0; w < 3; ++w)
            workers.emplace_back([&] {
                for (uint32_t i; (i = next++) < count;)
                    task(context, i);
            });
        for (std::thread &w : workers)
            w.join();
    };
    const auto ids = tokens(32 * 3);
    const auto loss = [&](ponder_runtime *runtime) {
        ponder_model *model = make_model(runtime);
        ponder_options *o = make_options();
        ponder_session *session = nullptr;
        EXPECT_EQ(PONDER_OK, ponder_session_create(&session, model, o, nullptr));
        EXPECT_EQ(PONDER_OK,
                  ponder_session_adapt(session, ids.data(), ids.size(), nullptr, nullptr));
        ponder_record r{};
        r.struct_size = sizeof r;
        size_t n = 0;
        EXPECT_EQ(PONDER_OK, ponder_session_records(session, 2, &r, 1, &n, nullptr));
        ponder_session_destroy(session);
        ponder_options_destroy(o);
        ponder_model_release(model);
        ponder_runtime_destroy(runtime);
        return r.loss_before;
    };
    EXPECT_EQ(loss(make_runtime(options)), loss(make_runtime()));
    EXPECT_GT(host.regions, 10);
}

TEST(ApiBackends, AreListedWithReasons) {
    ponder_runtime *runtime = make_runtime();
    const uint32_t count = ponder_backend_count(runtime);
    ASSERT_GE(count, 1u);
    bool reference = false;
    for (uint32_t i = 0; i < count; ++i) {
        ponder_backend_info info{};
        info.struct_size = sizeof info;
        ASSERT_EQ(PONDER_OK, ponder_backend_get(runtime, i, &info, nullptr));
        reference = reference || std::string(info.name) == "reference";
        EXPECT_NE(info.available == 1, info.reason[0] != 0) << info.name;
    }
    EXPECT_TRUE(reference);
    ponder_backend_info info{};
    info.struct_size = sizeof info;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_backend_get(runtime, count, &info, e), "index");
    ponder_model *model = nullptr;
    ponder_model_options wanted{};
    wanted.struct_size = sizeof wanted;
    wanted.backend = "tpu";
    EXPECT_STATUS(PONDER_E_NOT_FOUND, ponder_model_load(&model, runtime, tiny, &wanted, nullptr, e),
                  "tpu");
    wanted.backend = nullptr;
    wanted.dtype = "f16";
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_model_load(&model, runtime, tiny, &wanted, nullptr, e),
                  "f16");
    ponder_runtime_destroy(runtime);

    // A folder with something that is no module: the reason is kept.
    const TempDir dir;
    dir.write("ponder-broken.so", "no ELF");
    ponder_runtime_options options{};
    options.struct_size = sizeof options;
    options.backend_path = dir.path().c_str();
    ASSERT_EQ(PONDER_OK, ponder_runtime_create(&runtime, &options, nullptr));
    bool found = false;
    for (uint32_t i = 0; i < ponder_backend_count(runtime); ++i) {
        ASSERT_EQ(PONDER_OK, ponder_backend_get(runtime, i, &info, nullptr));
        if (std::string(info.name) != "ponder-broken.so")
            continue;
        found = true;
        EXPECT_EQ(info.available, 0);
        EXPECT_GT(std::strlen(info.reason), 5u);
    }
    EXPECT_TRUE(found);
    ponder_runtime_destroy(runtime);
    options.backend_path = "/nonexistent";
    EXPECT_STATUS(PONDER_E_NOT_FOUND, ponder_runtime_create(&runtime, &options, e), "backend_path");
}

TEST(ApiModel, Int8Weights) {
    ponder_runtime *runtime = make_runtime();
    TempDir dir;
    const std::string out = dir.file("int8");
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_model_convert(nullptr, tiny, out.c_str(), "int8", nullptr, e), "runtime");
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_model_convert(runtime, nullptr, out.c_str(), "int8", nullptr, e), "path");
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_model_convert(runtime, tiny, nullptr, "int8", nullptr, e), "out");
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_model_convert(runtime, tiny, out.c_str(), nullptr, nullptr, e), "weights");
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_model_convert(runtime, tiny, out.c_str(), "int4", nullptr, e), "int4");
    ponder_call cancelling{};
    cancelling.struct_size = sizeof cancelling;
    cancelling.progress = [](void *, uint64_t, uint64_t) -> int32_t { return 1; };
    EXPECT_STATUS(PONDER_E_CANCELLED,
                  ponder_model_convert(runtime, tiny, out.c_str(), "int8", &cancelling, e), "");
    EXPECT_FALSE(std::filesystem::exists(out));
    EXPECT_STATUS(PONDER_OK, ponder_model_convert(runtime, tiny, out.c_str(), "int8", nullptr, e),
                  "");
    EXPECT_STATUS(PONDER_E_STATE,
                  ponder_model_convert(runtime, tiny, out.c_str(), "int8", nullptr, e), "weights");

    ponder_model_options options{};
    options.struct_size = sizeof options;
    const auto loaded = [&](const char *folder, const char *weights) {
        options.weights = weights;
        ponder_model *model = nullptr;
        EXPECT_STATUS(PONDER_OK, ponder_model_load(&model, runtime, folder, &options, nullptr, e),
                      "");
        ponder_model_info info{};
        info.struct_size = sizeof info;
        EXPECT_EQ(PONDER_OK, ponder_model_get(model, &info, nullptr));
        std::string text = info.weights;
        for (const char *part : {info.dtype, info.hash})
            text.append(1, ' ').append(part);
        ponder_model_release(model);
        return text;
    };
    const std::string plain = loaded(tiny, nullptr), int8 = loaded(tiny, "int8");
    EXPECT_EQ(plain.substr(0, 10), "float f32 ");
    EXPECT_EQ(int8.substr(0, 9), "int8 f32 ");
    EXPECT_EQ(plain.substr(10), int8.substr(9)); // the hash
    EXPECT_EQ(loaded(tiny, "auto"), plain);
    EXPECT_EQ(loaded(out.c_str(), "auto"), int8);
    EXPECT_EQ(loaded(out.c_str(), nullptr), int8);
    EXPECT_EQ(loaded(out.c_str(), "float"), plain);
    ponder_model *none = nullptr;
    options.weights = "int2";
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_model_load(&none, runtime, tiny, &options, nullptr, e),
                  "int2");

    // A caller from before there was a choice.
    options.struct_size = offsetof(ponder_model_options, weights);
    EXPECT_STATUS(PONDER_OK, ponder_model_load(&none, runtime, tiny, &options, nullptr, e), "");
    ponder_model_release(none);

    ponder_options *o = make_options();
    ponder_memory_plan wide{}, narrow{};
    wide.struct_size = narrow.struct_size = sizeof wide;
    options.struct_size = sizeof options;
    options.weights = "float";
    EXPECT_STATUS(PONDER_OK, ponder_plan_memory(runtime, out.c_str(), &options, o, &wide, e), "");
    options.weights = "auto";
    EXPECT_STATUS(PONDER_OK, ponder_plan_memory(runtime, out.c_str(), &options, o, &narrow, e), "");
    EXPECT_LT(narrow.weights * 2, wide.weights);
    EXPECT_LE(narrow.packed_weights * 2, wide.packed_weights);

    // It runs within its plan.
    ponder_runtime_options limited{};
    limited.memory_limit = narrow.total;
    ponder_runtime *small = make_runtime(limited);
    ponder_model *model = nullptr;
    EXPECT_STATUS(PONDER_OK, ponder_model_load(&model, small, out.c_str(), &options, nullptr, e),
                  "");
    ponder_session *session = nullptr;
    EXPECT_STATUS(PONDER_OK, ponder_session_create(&session, model, o, e), "");
    const auto ids = tokens(32 * 5 + 3);
    EXPECT_STATUS(PONDER_OK, ponder_session_adapt(session, ids.data(), ids.size(), nullptr, e), "");
    EXPECT_STATUS(PONDER_OK, ponder_session_flush(session, nullptr, e), "");
    ponder_session_destroy(session);
    ponder_model_release(model);
    ponder_runtime_destroy(small);
    ponder_options_destroy(o);
    ponder_runtime_destroy(runtime);
}

TEST(ApiModel, TokenizesAnyBytes) {
    ponder_runtime *runtime = make_runtime();
    ponder_model *model = make_model(runtime, PONDER_MODEL_CODE10M);
    ponder_model_info info{};
    info.struct_size = sizeof info;
    ASSERT_EQ(PONDER_OK, ponder_model_get(model, &info, nullptr));
    EXPECT_EQ(info.parameters, 10257408u);
    EXPECT_EQ(info.end_of_text, 0);
    for (const std::string &text :
         {std::string("def f(x):\n    return x"), std::string("\0\xff\xc3(\0", 5), std::string(),
          std::string("\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf")}) {
        size_t count = 0;
        const ponder_status status =
            ponder_model_tokenize(model, text.data(), text.size(), nullptr, 0, &count, nullptr);
        EXPECT_EQ(status, text.empty() ? PONDER_OK : PONDER_E_BUFFER);
        std::vector<int32_t> ids(count);
        ASSERT_EQ(PONDER_OK, ponder_model_tokenize(model, text.data(), text.size(), ids.data(),
                                                   count, &count, nullptr));
        std::string back;
        for (int32_t id : ids) {
            const char *bytes = nullptr;
            size_t size = 0;
            ASSERT_EQ(PONDER_OK, ponder_model_token_bytes(model, id, &bytes, &size, nullptr));
            back.append(bytes, size);
        }
        EXPECT_EQ(back, text);
    }
    const char *bytes = nullptr;
    size_t size = 0;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_model_token_bytes(model, -1, &bytes, &size, e), "-1");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_model_token_bytes(model, 8192, &bytes, &size, e),
                  "8192");
    // The model outlives its runtime handle and goes with its last owner.
    EXPECT_EQ(PONDER_OK, ponder_model_retain(model, nullptr));
    ponder_runtime_destroy(runtime);
    ponder_model_release(model);
    EXPECT_EQ(PONDER_OK, ponder_model_get(model, &info, nullptr));
    ponder_model_release(model);
}

TEST(ApiText, StatusNamesAndVersion) {
    EXPECT_STREQ(ponder_version(), PONDER_VERSION);
    EXPECT_EQ(ponder_abi_version(), uint32_t(PONDER_ABI));
    for (int32_t s = 0; s <= 13; ++s)
        EXPECT_EQ(std::string(ponder_status_name(s)).rfind("PONDER_", 0), 0u);
    EXPECT_STREQ(ponder_status_name(99), "unknown");
}

// ---- trainers

class Trainers : public Api {
protected:
    void SetUp() override {
        Api::SetUp();
        training = make_options({{"context", "32"},
                                 {"lora.rank", "2"},
                                 {"lora.layers", "last:1"},
                                 {"train.warmup", "0"}});
        ids = tokens(200);
        ASSERT_EQ(PONDER_OK,
                  ponder_trainer_create(&trainer, model, PONDER_TRAIN_ADAPTER, training, nullptr));
    }
    void TearDown() override {
        ponder_trainer_destroy(trainer);
        ponder_options_destroy(training);
        Api::TearDown();
    }
    ponder_options *training = nullptr;
    ponder_trainer *trainer = nullptr;
    std::vector<int32_t> ids;
};

TEST_F(Trainers, StepsSaveAndGoOn) {
    const ponder_stream streams[2] = {{ids.data(), 96}, {ids.data() + 64, 130}};
    ponder_train_record record{};
    record.struct_size = sizeof record;
    EXPECT_STATUS(PONDER_OK, ponder_trainer_step(trainer, streams, 2, nullptr, &record, e), "");
    EXPECT_EQ(record.step, 1u);
    EXPECT_EQ(record.tokens, 31u * (2 + 3)); // chunks after the first of each stream
    EXPECT_GT(record.loss, 0);
    EXPECT_GT(record.gradient_norm, 0);
    EXPECT_GT(record.flops, 0u);
    EXPECT_TRUE(std::isnan(record.reconstruction));
    EXPECT_EQ(ponder_trainer_steps(trainer), 1u);

    const TempDir dir;
    EXPECT_STATUS(PONDER_OK,
                  ponder_trainer_save(trainer, dir.file("a").c_str(), "{\"position\": 2}", e), "");
    ponder_trainer *other = nullptr;
    EXPECT_STATUS(PONDER_OK,
                  ponder_trainer_create(&other, model, PONDER_TRAIN_ADAPTER, training, e), "");
    EXPECT_STREQ(ponder_trainer_note(other), "");
    EXPECT_STATUS(PONDER_OK, ponder_trainer_load(other, dir.file("a").c_str(), e), "");
    EXPECT_STREQ(ponder_trainer_note(other), "{\"position\": 2}");
    ponder_train_record again = record;
    EXPECT_STATUS(PONDER_OK, ponder_trainer_step(trainer, streams, 2, nullptr, &record, e), "");
    EXPECT_STATUS(PONDER_OK, ponder_trainer_step(other, streams, 2, nullptr, &again, e), "");
    EXPECT_EQ(record.loss, again.loss);
    EXPECT_EQ(record.gradient_norm, again.gradient_norm);
    ponder_trainer_destroy(other);

    // What is exported, a session runs.
    const std::string folder = dir.file("adapter");
    EXPECT_STATUS(PONDER_OK, ponder_trainer_export(trainer, folder.c_str(), e), "");
    ponder_options *with = make_options({{"context", "32"}, {"adapter", folder.c_str()}});
    ponder_session *adapted = nullptr;
    EXPECT_STATUS(PONDER_OK, ponder_session_create(&adapted, model, with, e), "");
    EXPECT_STATUS(PONDER_OK, ponder_session_adapt(adapted, ids.data(), 96, nullptr, e), "");
    ponder_session_destroy(adapted);
    ponder_options_destroy(with);
}

TEST_F(Trainers, RefuseWhatTheyCannotUse) {
    ponder_trainer *none = nullptr;
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_trainer_create(&none, model, 9, training, e), "kind");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_trainer_create(nullptr, model, 0, training, e), "out");
    ponder_options *nothing = make_options({{"adapter", "none"}});
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_trainer_create(&none, model, 0, nothing, e),
                  "nothing to train");
    ponder_options_destroy(nothing);
    EXPECT_EQ(none, nullptr);

    const ponder_stream short_one{ids.data(), 40}, null_one{nullptr, 96};
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_trainer_step(trainer, &short_one, 1, nullptr, nullptr, e), "two chunks");
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_trainer_step(trainer, &null_one, 1, nullptr, nullptr, e),
                  "streams[0].ids");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_trainer_step(trainer, nullptr, 1, nullptr, nullptr, e),
                  "streams");
    EXPECT_STATUS(PONDER_E_ARGUMENT,
                  ponder_trainer_step(trainer, &short_one, 0, nullptr, nullptr, e), "no streams");
    EXPECT_STATUS(PONDER_E_ARGUMENT, ponder_trainer_save(trainer, nullptr, nullptr, e), "path");
    EXPECT_STATUS(PONDER_E_NOT_FOUND, ponder_trainer_load(trainer, "/nowhere/x.ckpt", e),
                  "/nowhere/x.ckpt");
    EXPECT_STATUS(PONDER_E_IO, ponder_trainer_export(trainer, "/nowhere/x/y", e), "/nowhere/x/y");
    ponder_call late{};
    late.struct_size = sizeof late;
    late.timeout_ns = 1;
    const ponder_stream good{ids.data(), 96};
    EXPECT_STATUS(PONDER_E_DEADLINE, ponder_trainer_step(trainer, &good, 1, &late, nullptr, e), "");
    EXPECT_EQ(ponder_trainer_steps(trainer), 0u);
    ponder_trainer_destroy(nullptr);
    EXPECT_EQ(ponder_trainer_steps(nullptr), 0u);
    EXPECT_STREQ(ponder_trainer_note(nullptr), "");
}

} // namespace
