// Generating through the C ABI: what is asked for, what is refused, and what stays as it was.
#include "ponder/ponder.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace {

template <class T> T sized() {
    T value{};
    value.struct_size = sizeof value;
    return value;
}

// What the callback got.
struct Heard {
    std::vector<int32_t> ids;
    std::vector<double> logprobs;
    std::vector<std::string> pieces;
    std::vector<uint64_t> at;
    uint64_t stop_after = UINT64_MAX;
    uint32_t stream = 0;
    std::string text() const {
        std::string all;
        for (const std::string &piece : pieces)
            all += piece;
        return all;
    }
};

int32_t hear(void *user_data, const ponder_generated *g) {
    Heard &heard = *static_cast<Heard *>(user_data);
    EXPECT_EQ(g->struct_size, sizeof *g);
    heard.stream = g->stream;
    heard.ids.push_back(g->id);
    heard.logprobs.push_back(g->logprob);
    heard.pieces.emplace_back(g->text, g->text_size);
    heard.at.push_back(g->index);
    return heard.ids.size() >= heard.stop_after;
}

class ApiGenerate : public testing::Test {
protected:
    void SetUp() override {
        auto wish = sized<ponder_runtime_options>();
        wish.threads = 2;
        wish.backend_path = PONDER_TEST_BACKENDS;
        ASSERT_EQ(PONDER_OK, ponder_runtime_create(&runtime, &wish, nullptr));
        ASSERT_EQ(PONDER_OK, ponder_model_load(&model, runtime, PONDER_MODEL_CODE10M, nullptr,
                                               nullptr, nullptr));
        ASSERT_EQ(PONDER_OK, ponder_options_create(&options, nullptr));
        ASSERT_EQ(PONDER_OK, ponder_options_set(options, "chunk", "64", nullptr));
        ASSERT_EQ(PONDER_OK, ponder_session_create(&session, model, options, nullptr));
        prompt = ids_of("for (int i = 0; i <");
        generation = sized<ponder_generation>();
        generation.prompt = prompt.data();
        generation.prompt_count = prompt.size();
        generation.max_tokens = 24;
        generation.user_data = &heard;
        generation.token = hear;
    }
    void TearDown() override {
        ponder_session_destroy(session);
        ponder_options_destroy(options);
        ponder_model_release(model);
        ponder_runtime_destroy(runtime);
    }
    std::vector<int32_t> ids_of(const std::string &text) {
        std::vector<int32_t> ids(text.size());
        size_t count = 0;
        EXPECT_EQ(PONDER_OK, ponder_model_tokenize(model, text.data(), text.size(), ids.data(),
                                                   ids.size(), &count, nullptr));
        ids.resize(count);
        return ids;
    }
    std::string text_of(const std::vector<int32_t> &ids) {
        std::string text;
        for (const int32_t id : ids) {
            const char *bytes = nullptr;
            size_t size = 0;
            if (id >= 0) {
                EXPECT_EQ(PONDER_OK, ponder_model_token_bytes(model, id, &bytes, &size, nullptr));
            }
            text.append(bytes ? bytes : "", size);
        }
        return text;
    }
    void run(ponder_status wanted = PONDER_OK, const char *message = "") {
        auto error = sized<ponder_error>();
        heard.ids.clear(), heard.pieces.clear(), heard.logprobs.clear(), heard.at.clear();
        result = sized<ponder_generation_result>();
        result.tokens = 12345;
        EXPECT_EQ(wanted, ponder_session_generate(session, &generation, &result, nullptr, &error))
            << error.message;
        EXPECT_NE(std::string(error.message).find(message), std::string::npos) << error.message;
        if (wanted != PONDER_OK) {
            EXPECT_EQ(result.tokens, 12345u) << "an output changed";
        }
    }
    ponder_runtime *runtime = nullptr;
    ponder_model *model = nullptr;
    ponder_options *options = nullptr;
    ponder_session *session = nullptr;
    std::vector<int32_t> prompt;
    ponder_generation generation{};
    ponder_generation_result result{};
    Heard heard;
};

TEST_F(ApiGenerate, TellsEveryToken) {
    run();
    EXPECT_EQ(result.reason, PONDER_STOP_LENGTH);
    EXPECT_EQ(result.tokens, 24u);
    EXPECT_EQ(result.prompt_tokens, prompt.size());
    EXPECT_EQ(result.stopped_by, -1);
    EXPECT_GT(result.decode_ns, 0u);
    ASSERT_GE(heard.ids.size(), 24u);
    for (size_t i = 0; i < 24; ++i) {
        EXPECT_EQ(heard.at[i], i);
        EXPECT_TRUE(std::isnan(heard.logprobs[i])) << "not asked for";
    }
    EXPECT_EQ(heard.text(), text_of(heard.ids));
    generation.flags = PONDER_GENERATE_LOGPROBS;
    const std::vector<int32_t> before = heard.ids;
    run();
    EXPECT_EQ(heard.ids, before);
    EXPECT_EQ(result.cached_tokens, prompt.size() - 1); // what followed is other text now
    for (size_t i = 0; i < 24; ++i)
        EXPECT_TRUE(heard.logprobs[i] <= 0 && heard.logprobs[i] > -20) << i;
}

TEST_F(ApiGenerate, EndsWhereItIsTold) {
    run();
    const std::vector<int32_t> ids = heard.ids;
    const std::string text = heard.text();

    // A string that begins inside one token and ends inside another.
    const size_t from = text_of({ids.begin(), ids.begin() + 6}).size() - 1;
    const std::string across = text.substr(from, 4);
    const char *stops[] = {"never in here", across.c_str()};
    generation.stop_strings = stops;
    generation.stop_string_count = 2;
    run();
    EXPECT_EQ(result.reason, PONDER_STOP_STRING);
    EXPECT_EQ(result.stopped_by, 1);
    EXPECT_EQ(heard.text(), text.substr(0, text.find(across)));
    EXPECT_LT(result.tokens, 24u);
    generation.stop_string_count = 0;

    const int32_t stop = ids[7];
    const size_t first = size_t(std::find(ids.begin(), ids.end(), stop) - ids.begin());
    generation.stop_tokens = &stop;
    generation.stop_token_count = 1;
    run();
    EXPECT_EQ(result.reason, PONDER_STOP_TOKEN);
    EXPECT_EQ(result.stopped_by, stop);
    EXPECT_EQ(result.tokens, first);
    EXPECT_EQ(heard.text(), text_of({ids.begin(), ids.begin() + std::ptrdiff_t(first)}));
    generation.stop_token_count = 0;

    heard.stop_after = 5;
    run();
    EXPECT_EQ(result.reason, PONDER_STOP_CALLBACK);
    EXPECT_EQ(heard.ids, std::vector<int32_t>(ids.begin(), ids.begin() + 5));

    // The end of the text, made certain by a bias.
    heard.stop_after = UINT64_MAX;
    auto info = sized<ponder_model_info>();
    ASSERT_EQ(PONDER_OK, ponder_model_get(model, &info, nullptr));
    const float much = 1000;
    generation.bias_ids = &info.end_of_text;
    generation.bias = &much;
    generation.bias_count = 1;
    run();
    EXPECT_EQ(result.reason, PONDER_STOP_TOKEN);
    EXPECT_EQ(result.tokens, 0u);
    generation.flags = PONDER_GENERATE_IGNORE_END;
    run();
    EXPECT_EQ(result.tokens, 24u);
}

TEST_F(ApiGenerate, RefusesWhatMakesNoSense) {
    const ponder_generation good = generation;
    const auto refused = [&](const char *message, auto change,
                             ponder_status status = PONDER_E_ARGUMENT) {
        generation = good;
        change(generation);
        run(status, message);
    };
    const int32_t bad_ids[] = {3, 1 << 30}, negative = -1, fine = 1;
    const float much = 1e9f, nan = std::nanf("");
    const char *empty = "", *null = nullptr;
    const double not_a_number = std::nan("");
    refused("prompt", [](auto &g) { g.prompt_count = 0; });
    refused("prompt", [](auto &g) { g.prompt = nullptr; });
    refused("prompt", [](auto &g) { g.prompt_count = SIZE_MAX; });
    refused("prompt[1]", [&](auto &g) { g.prompt = bad_ids, g.prompt_count = 2; });
    refused("prompt[0]", [&](auto &g) { g.prompt = &negative, g.prompt_count = 1; });
    for (const double x : {-1.0, 1e6, not_a_number, double(INFINITY)})
        refused("temperature", [&](auto &g) { g.temperature = x; });
    for (const double x : {-0.1, 1.5, not_a_number}) {
        refused("top_p", [&](auto &g) { g.top_p = x; });
        refused("min_p", [&](auto &g) { g.min_p = x; });
    }
    for (const double x : {-1.0, 1e-9, 1e9, not_a_number})
        refused("repetition", [&](auto &g) { g.repetition = x; });
    refused("bias_ids", [&](auto &g) { g.bias = &much, g.bias_count = 1; });
    refused("bias_ids[0]",
            [&](auto &g) { g.bias_ids = &negative, g.bias = &much, g.bias_count = 1; });
    for (const float *x : {&much, &nan})
        refused("bias", [&](auto &g) { g.bias_ids = &fine, g.bias = x, g.bias_count = 1; });
    refused("stop_tokens", [](auto &g) { g.stop_token_count = 1; });
    refused("stop_tokens[0]", [&](auto &g) { g.stop_tokens = &negative, g.stop_token_count = 1; });
    refused("stop_strings", [](auto &g) { g.stop_string_count = 1; });
    refused("empty", [&](auto &g) { g.stop_strings = &empty, g.stop_string_count = 1; });
    refused("NULL", [&](auto &g) { g.stop_strings = &null, g.stop_string_count = 1; });
    refused(
        "flags", [](auto &g) { g.flags = 1u << 20; }, PONDER_E_UNSUPPORTED);
    refused("struct_size", [](auto &g) { g.struct_size = 4; });
    generation = good;

    auto error = sized<ponder_error>();
    EXPECT_EQ(PONDER_E_ARGUMENT, ponder_session_generate(nullptr, &good, nullptr, nullptr, &error));
    EXPECT_EQ(PONDER_E_ARGUMENT,
              ponder_session_generate(session, nullptr, nullptr, nullptr, &error));
    const ponder_generation *list[] = {&good, &good};
    ponder_session *twice[] = {session, session};
    EXPECT_EQ(PONDER_E_ARGUMENT, ponder_generate(twice, 2, list, nullptr, nullptr, &error));
    EXPECT_EQ(PONDER_E_ARGUMENT, ponder_generate(twice, 1, nullptr, nullptr, nullptr, &error));
    EXPECT_EQ(PONDER_E_ARGUMENT, ponder_session_accept(session, 0, 1, &error)) << "no text yet";
    ASSERT_EQ(PONDER_OK, ponder_options_set(options, "chunk", "32", nullptr));
    ponder_session *other = nullptr;
    ASSERT_EQ(PONDER_OK, ponder_session_create(&other, model, options, nullptr));
    ponder_session *unequal[] = {session, other};
    EXPECT_EQ(PONDER_E_ARGUMENT, ponder_generate(unequal, 2, list, nullptr, nullptr, &error));
    EXPECT_NE(std::string(error.message).find("sessions[1]"), std::string::npos);
    ponder_session_destroy(other);
    run(); // nothing is broken
    EXPECT_EQ(result.tokens, 24u);
}

TEST_F(ApiGenerate, ASmallerStructAndNoResultWillDo) {
    generation.struct_size = offsetof(ponder_generation, max_tokens);
    EXPECT_EQ(PONDER_OK, ponder_session_generate(session, &generation, nullptr, nullptr, nullptr));
}

TEST_F(ApiGenerate, ManySessionsTellTheirStream) {
    constexpr size_t count = 3;
    ponder_session *sessions[count] = {session};
    for (size_t i = 1; i < count; ++i)
        ASSERT_EQ(PONDER_OK, ponder_session_create(&sessions[i], model, options, nullptr));
    Heard each[count];
    std::vector<ponder_generation> wishes(count, generation);
    std::vector<const ponder_generation *> list;
    ponder_generation_result found[count] = {};
    ponder_generation_result *results[count] = {&found[0], nullptr, &found[2]};
    for (size_t i = 0; i < count; ++i) {
        wishes[i].user_data = &each[i];
        wishes[i].max_tokens = 5 + 3 * i;
        found[i].struct_size = sizeof found[i];
        list.push_back(&wishes[i]);
    }
    ASSERT_EQ(PONDER_OK, ponder_generate(sessions, count, list.data(), results, nullptr, nullptr));
    run();
    for (size_t i = 0; i < count; ++i) {
        EXPECT_EQ(each[i].stream, i);
        ASSERT_GE(each[i].ids.size(), 5 + 3 * i);
        for (size_t t = 0; t < 5 + 3 * i; ++t)
            EXPECT_EQ(each[i].ids[t], heard.ids[t]); // equal prompts, equal weights
    }
    EXPECT_EQ(found[2].tokens, 11u);
    for (size_t i = 1; i < count; ++i)
        ponder_session_destroy(sessions[i]);
}

TEST_F(ApiGenerate, StopsWhenCancelledOrLate) {
    const auto cancel = [](void *, uint64_t done, uint64_t total) -> int32_t {
        EXPECT_EQ(total, 24u);
        return done >= 3;
    };
    auto limits = sized<ponder_call>();
    limits.progress = cancel;
    auto error = sized<ponder_error>();
    EXPECT_EQ(PONDER_E_CANCELLED,
              ponder_session_generate(session, &generation, nullptr, &limits, &error));
    EXPECT_EQ(heard.ids.size(), 3u);
    limits = sized<ponder_call>();
    limits.timeout_ns = 1;
    EXPECT_EQ(PONDER_E_DEADLINE,
              ponder_session_generate(session, &generation, nullptr, &limits, &error));
    run();
    EXPECT_EQ(result.tokens, 24u);
    EXPECT_EQ(PONDER_OK, ponder_session_accept(session, prompt.size(), 24, nullptr));
    auto info = sized<ponder_session_info>();
    ASSERT_EQ(PONDER_OK, ponder_session_get(session, &info, nullptr));
    EXPECT_EQ(info.tokens_fed, 24u);
}

} // namespace
