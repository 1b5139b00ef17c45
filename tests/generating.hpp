// What tests of generating share: texts, and their tokens' probabilities by decoding and by
// scoring.
#pragma once

#include "session/generate.hpp"
#include "support.hpp"

#include <gtest/gtest.h>

namespace ponder::test {

struct Written {
    std::vector<int32_t> ids;
    std::vector<double> log_p;
    ponder_generation_result result{};
};

inline std::vector<Written> generate(const std::vector<Session *> &sessions,
                                     std::vector<Generation> wishes) {
    std::vector<Written> written(sessions.size());
    std::vector<ponder_generation_result> results(sessions.size());
    std::vector<CallGuard> guards;
    for (size_t i = 0; i < sessions.size(); ++i) {
        wishes[i].log_probabilities = true;
        if (!wishes[i].token)
            wishes[i].token = [&w = written[i]](uint64_t, int32_t id, double log_p,
                                                std::string_view) {
                if (id >= 0) {
                    w.ids.push_back(id);
                    w.log_p.push_back(log_p);
                }
                return false;
            };
        guards.push_back(no_limits(*sessions[i]));
    }
    Session::generate(sessions, wishes, results, guards);
    for (size_t i = 0; i < sessions.size(); ++i)
        written[i].result = results[i];
    return written;
}

inline Written generate(Session &session, const Generation &wish) {
    return generate(std::vector<Session *>{&session}, {wish})[0];
}

inline Generation wish(std::vector<int32_t> prompt, uint64_t tokens) {
    Generation g;
    g.prompt = std::move(prompt);
    g.max_tokens = tokens;
    return g;
}

// ln p of tokens [first, end) of the text, each given those before it: one token is generated at a
// time, and a bias makes it the text's own.
inline std::vector<double> decode(Session &session, std::span<const int32_t> text, size_t first,
                                  size_t end, bool keep = false) {
    std::vector<double> log_p;
    for (size_t t = first; t < end; ++t) {
        Generation g = wish({text.begin(), text.begin() + std::ptrdiff_t(t)}, 1);
        g.sampling.bias = {{text[t], 10000.0f}};
        g.keep_cache = keep;
        const Written w = generate(session, g);
        EXPECT_EQ(w.ids, std::vector<int32_t>{text[t]});
        log_p.push_back(w.log_p.at(0));
    }
    return log_p;
}

// What a session's scores say of chunks [first, end), without learning from them (TTT layers do).
inline std::vector<double> score(Session &session, std::span<const int32_t> tokens, size_t chunks) {
    std::vector<double> log_p;
    session.feed(tokens);
    for (size_t i = 0; i < chunks; ++i) {
        EXPECT_TRUE(session.score(no_limits(session)));
        for (const float nll : session.losses())
            log_p.push_back(-double(nll));
        session.learn(0, no_limits(session));
    }
    return log_p;
}

// Chunks [before, end) of 32 tokens, token by token as in one pass, after learning from those
// before.
inline void expect_decoding_is_scoring(Session &session, std::span<const int32_t> text,
                                       size_t before, size_t end, double tolerance) {
    session.feed(text.first(32 * before));
    session.adapt(no_limits(session));
    const auto writer = session.fork();
    const std::vector<double> expected = score(session, text.subspan(32 * before), end - before);
    size_t at = 0;
    for (size_t chunk = before; chunk < end; ++chunk)
        for (const double found : decode(*writer, text, 32 * chunk + 1, 32 * chunk + 32)) {
            ASSERT_NEAR(found, expected[at], tolerance) << "prediction " << at;
            ++at;
        }
}

} // namespace ponder::test
