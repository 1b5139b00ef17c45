// Generating: token by token as in one pass, whatever lies between; draws as their distribution
// says; and the stream never notices.
#include "generating.hpp"
#include "session/decoder.hpp"
#include "session/plan.hpp"
#include "session/text_pieces.hpp"

#include <gtest/gtest.h>

#include <cstring>

namespace ponder::test {
namespace {

struct Case {
    std::string name;
    Values options;
    bool inside = false;
};

std::vector<Case> cases() {
    return {
        {"skip", {{"policy", "skip"}}},
        {"lora all", {{"lora.layers", "all"}, {"inner.lr", "0.02"}}},
        {"lora last", {{"lora.layers", "last:1"}, {"inner.lr", "0.02"}}},
        {"ttt-linear", {{"adapter", "ttt-linear"}}, true},
        {"ttt-linear, short last mini-batch",
         {{"adapter", "ttt-linear"}, {"ttt.mini_batch", "12"}},
         true},
        {"ttt-linear, mini-batch of 2", {{"adapter", "ttt-linear"}, {"ttt.mini_batch", "2"}}, true},
        {"ttt-linear, no carry", {{"adapter", "ttt-linear"}, {"ttt.carry", "0"}}, true},
        {"ttt-linear, own keys", {{"adapter", "ttt-linear"}, {"ttt.share_qk", "0"}}, true},
        {"ttt-mlp", {{"adapter", "ttt-mlp"}}, true},
        {"ponder", {{"adapter", "ttt-linear"}, {"ttt.form", "ponder"}}, true},
    };
}

Options options_of(const Case &c) {
    return with(make_options({{"chunk", "32"}, {"context", "64"}, {"lora.rank", "4"}}), c.options);
}

// Positions across chunks, mini-batches and full windows (of 64 tokens), token by token.
TEST(Decode, IsScoringTokenByToken) {
    const std::vector<int32_t> text = random_tokens(32 * 7, 5);
    for (const char *backend : {"cpu", "reference"})
        for (const Case &c : cases()) {
            SCOPED_TRACE(std::string(backend) + " " + c.name);
            Session session(tiny_model(backend), options_of(c));
            // What is learned inside a pass begins with the text; LoRA has learned from three
            // chunks.
            expect_decoding_is_scoring(session, text, c.inside ? 0 : 3, 7, 1e-4);
        }
}

// The same after a snapshot, which holds no caches, and with the whole prompt at once.
TEST(Decode, GoesOnAfterARestore) {
    const std::vector<int32_t> text = random_tokens(150, 6);
    for (const Case &c : cases()) {
        SCOPED_TRACE(c.name);
        Session session(tiny_model("cpu"), options_of(c));
        session.feed(random_tokens(64, 7));
        session.adapt(no_limits(session));
        const std::vector<double> expected = decode(session, text, 1, 150);
        Session other(tiny_model("cpu"), options_of(c));
        other.load(session.save(), "snapshot");
        for (const size_t from : {1, 77, 149}) {
            other.load(session.save(), "snapshot");
            const std::vector<double> found = decode(other, text, from, 150);
            for (size_t i = 0; i < found.size(); ++i)
                ASSERT_NEAR(found[i], expected[from - 1 + i], 1e-4) << from + i;
        }
    }
}

TEST(Decode, ManyStreamsAsEachAlone) {
    for (const Case &c : cases()) {
        SCOPED_TRACE(c.name);
        std::vector<std::unique_ptr<Session>> sessions;
        std::vector<Session *> list;
        std::vector<Generation> wishes;
        std::vector<Written> alone;
        for (size_t i = 0; i < 3; ++i) {
            sessions.push_back(std::make_unique<Session>(tiny_model("cpu"), options_of(c)));
            list.push_back(sessions.back().get());
            list[i]->feed(random_tokens(32 * (i + 1), 11 + i)); // other fast weights each
            list[i]->adapt(no_limits(*list[i]));
            wishes.push_back(wish(random_tokens(3 + 25 * i, 21 + i), 30 + 20 * i));
            wishes[i].sampling.temperature = 1;
            wishes[i].sampling.seed = i;
            alone.push_back(generate(*list[i]->fork(), wishes[i]));
        }
        const std::vector<Written> together = generate(list, wishes);
        for (size_t i = 0; i < 3; ++i) {
            EXPECT_EQ(alone[i].ids, together[i].ids) << i;
            for (size_t t = 0; t < alone[i].ids.size(); ++t)
                ASSERT_NEAR(alone[i].log_p[t], together[i].log_p[t], 1e-4) << i << " " << t;
        }
        // Apart again, and in another order: the caches follow their sessions.
        Generation more = wishes[1];
        more.prompt.insert(more.prompt.end(), together[1].ids.begin(), together[1].ids.end());
        const Written apart = generate(*list[1], more);
        EXPECT_GE(apart.result.cached_tokens + 1, c.inside ? 1 : 32u);
        EXPECT_EQ(apart.ids, generate(*list[1]->fork(), more).ids);
        const auto turned = generate({list[2], list[0]}, {wishes[2], wishes[0]});
        EXPECT_EQ(turned[0].ids, alone[2].ids);
        EXPECT_EQ(turned[1].ids, alone[0].ids);
    }
}

// Nothing of the stream changes: with a scored chunk open, between chunks, with tokens waiting.
TEST(Decode, TheStreamNeverNotices) {
    const std::vector<int32_t> tokens = random_tokens(32 * 5 + 9, 8);
    for (const char *dtype : {"f32", "bf16"})
        for (const Case &c : cases()) {
            SCOPED_TRACE(c.name);
            const auto run = [&](bool writes) {
                Session session(tiny_model("cpu", dtype), options_of(c));
                const auto write = [&] {
                    if (writes)
                        generate(session,
                                 wish(random_tokens(40, session.info().chunks_scored), 40));
                };
                session.feed(tokens);
                while (session.score(no_limits(session))) {
                    write();
                    session.learn(-1, no_limits(session));
                    write();
                }
                return std::pair(session.save(), session.records());
            };
            auto a = run(false), b = run(true);
            ASSERT_EQ(a.first.size(), b.first.size());
            ASSERT_EQ(a.second.size(), b.second.size());
            // All but the records, whose times differ.
            const SafeTensors x = SafeTensors::view(a.first, "a"),
                              y = SafeTensors::view(b.first, "b");
            for (const char *name : {"fast", "state", "policy", "random", "history", "waiting",
                                     "open", "losses", "entropies"})
                EXPECT_EQ(x.raw(name), y.raw(name)) << name;
            for (size_t i = 0; i < a.second.size(); ++i) {
                for (ponder_record *r : {&a.second[i], &b.second[i]})
                    r->score_ns = r->decide_ns = r->learn_ns = 0;
                EXPECT_EQ(0, std::memcmp(&a.second[i], &b.second[i], sizeof(ponder_record)));
            }
        }
}

TEST(Decode, AcceptedTextIsRead) {
    Session session(tiny_model("cpu"), options_of(cases()[1]));
    const Written w = generate(session, wish({1, 2, 3}, 40));
    EXPECT_EQ(session.info().tokens_fed, 0u);
    session.accept_text(3, 40);
    EXPECT_EQ(session.info().tokens_fed, 40u);
    EXPECT_THROW(session.accept_text(4, 40), Error);
    EXPECT_THROW(session.accept_text(1, UINT64_MAX), Error);
    Session other(tiny_model("cpu"), options_of(cases()[1]));
    other.feed(w.ids);
    for (Session *s : {&session, &other})
        s->flush(no_limits(*s));
    EXPECT_EQ(session.records().back().loss_before, other.records().back().loss_before);
}

// After an update: as if all were computed anew, or with what was there.
TEST(Cache, AfterAnUpdate) {
    const std::vector<int32_t> text = random_tokens(60, 9);
    for (const char *layers : {"all", "last:1"}) {
        SCOPED_TRACE(layers);
        Case c{"", {{"lora.layers", layers}, {"inner.lr", "0.05"}}};
        Session session(tiny_model("cpu"), options_of(c)), keeps(tiny_model("cpu"), options_of(c));
        for (Session *s : {&session, &keeps}) {
            decode(*s, text, 50, 51);
            s->feed(random_tokens(64, 10));
            s->adapt(no_limits(*s));
        }
        const std::vector<double> again = decode(session, text, 51, 60);
        const std::vector<double> fresh = decode(*session.fork(), text, 51, 60);
        const std::vector<double> kept = decode(keeps, text, 51, 60, true);
        double difference = 0;
        for (size_t i = 0; i < again.size(); ++i) {
            EXPECT_NEAR(again[i], fresh[i], 1e-4) << i;
            difference = std::max(difference, std::abs(kept[i] - fresh[i]));
        }
        EXPECT_GT(difference, 1e-4) << "nothing was kept";
        // What was kept does not count as new later.
        EXPECT_NEAR(decode(keeps, text, 59, 60)[0], fresh.back(), 1e-4);
    }
}

TEST(Cache, OnlyWhatIsNewIsComputed) {
    Session session(tiny_model("cpu"), options_of(cases()[0]));
    const std::vector<int32_t> text = random_tokens(50, 12);
    const auto cached = [&](size_t n) {
        return generate(session, wish({text.begin(), text.begin() + std::ptrdiff_t(n)}, 1))
            .result.cached_tokens;
    };
    EXPECT_EQ(cached(40), 0u);
    EXPECT_EQ(cached(50), 40u);
    EXPECT_EQ(cached(50), 50u);
    EXPECT_EQ(cached(30), 29u);
    session.reset();
    EXPECT_EQ(cached(30), 0u);
}

// What is allocated for generating is what the plan says: exactly on the reference backend, whose
// kernels have no workspace, and within the plan's workspace on the other.
TEST(Cache, IsInTheMemoryPlan) {
    for (const char *dtype : {"f32", "bf16"})
        for (const char *backend : {"reference", "cpu"})
            for (const Case &c : cases()) {
                SCOPED_TRACE(std::string(backend) + " " + dtype + " " + c.name);
                const auto &on = tiny_model(backend, dtype);
                const ponder_memory_plan plan =
                    plan_memory(on->runtime(), tiny, backend, dtype, "auto", options_of(c));
                Session session(on, options_of(c));
                const auto use = [&] {
                    generate(session, wish(random_tokens(100, 2), 20));
                    return on->runtime().memory->in_use();
                };
                use(); // packs and records what the model keeps
                session.reset();
                const uint64_t before = on->runtime().memory->in_use(), used = use() - before;
                EXPECT_LE(used, plan.generation);
                EXPECT_GE(used, plan.generation - plan.workspace); // is 0 on the reference backend
            }
}

// Sessions that generated together do not keep the memory of all of them when they part.
TEST(Cache, OfAGroupGoesWithIt) {
    for (const Case &c : {cases()[1], cases()[3]}) {
        SCOPED_TRACE(c.name);
        const auto &model = tiny_model("reference");
        const auto memory = model->runtime().memory;
        constexpr size_t count = 8;
        std::vector<std::unique_ptr<Session>> sessions;
        std::vector<Session *> list;
        for (size_t i = 0; i < count; ++i) {
            sessions.push_back(std::make_unique<Session>(model, options_of(c)));
            list.push_back(sessions.back().get());
        }
        const std::vector<Generation> wishes(count, wish(random_tokens(10, 2), 4));
        const uint64_t before = memory->in_use();
        const std::vector<Written> together = generate(list, wishes);
        const uint64_t all = memory->in_use() - before;
        for (size_t left = count - 1; left > 0; --left) {
            list.pop_back(); // stays alive, and its text with it
            const auto again = generate(list, {wishes.begin(), wishes.begin() + long(left)});
            EXPECT_EQ(again[0].ids, together[0].ids);
            EXPECT_EQ(again.back().result.cached_tokens, again[0].result.cached_tokens);
            EXPECT_LE(memory->in_use() - before, 4 * all) << left;
        }
        EXPECT_EQ(generate(*sessions.back(), wishes[0]).ids, together[0].ids);
    }
}

TEST(Decode, ThreadsDoNotMatter) {
    for (const char *dtype : {"f32", "bf16"}) {
        std::vector<Written> all;
        for (const uint32_t threads : {1u, 2u, 3u, 7u}) {
            Session session(tiny_model("cpu", dtype, threads), options_of(cases()[1]));
            session.feed(random_tokens(96, 3));
            session.adapt(no_limits(session));
            Generation g = wish(random_tokens(20, 4), 100);
            g.sampling.temperature = 0.9;
            g.sampling.seed = 77;
            all.push_back(generate(session, g));
        }
        for (const Written &w : all) {
            EXPECT_EQ(w.ids, all[0].ids);
            EXPECT_EQ(w.log_p, all[0].log_p);
        }
    }
}

// ---- sampling

// The distribution by the definition, over a few tokens.
std::vector<double> exact(const std::vector<float> &logits, const Sampling &s,
                          const std::vector<int32_t> &seen) {
    const size_t n = logits.size();
    std::vector<double> l(logits.begin(), logits.end());
    for (const auto &[id, bias] : s.bias)
        l[size_t(id)] += double(bias);
    for (const int32_t id : seen)
        l[size_t(id)] =
            l[size_t(id)] > 0 ? l[size_t(id)] / s.repetition : l[size_t(id)] * s.repetition;
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; ++i)
        order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return l[a] > l[b]; });
    std::vector<double> p(n, 0.0);
    double sum = 0;
    for (size_t i = 0; i < n; ++i)
        if (s.top_k == 0 || int64_t(i) < s.top_k)
            sum += p[order[i]] = std::exp((l[order[i]] - l[order[0]]) / s.temperature);
    double reached = 0;
    for (size_t i = 0; i < n; ++i) {
        const double mine = p[order[i]] / sum;
        if (i > 0 && reached >= s.top_p)
            p[order[i]] = 0;
        reached += mine;
    }
    double left = 0;
    for (double &x : p)
        left += x = x >= s.min_p ? x : 0; // the largest is 1
    for (double &x : p)
        x /= left;
    return p;
}

TEST(Sampler, DrawsAsTheDistributionSays) {
    const std::vector<float> logits = {1.2f,  -0.5f, 0.3f, 2.0f,  2.0f,
                                       -3.0f, 0.0f,  0.9f, -1.1f, 1.7f};
    std::vector<std::pair<std::string, Sampling>> forms;
    const auto form = [&](const char *name, auto change) {
        Sampling s;
        s.temperature = 1;
        change(s);
        forms.emplace_back(name, s);
    };
    form("plain", [](Sampling &) {});
    form("temperature", [](Sampling &s) { s.temperature = 0.6; });
    form("hot", [](Sampling &s) { s.temperature = 3; });
    form("top k", [](Sampling &s) { s.top_k = 4; });
    form("top k between equals", [](Sampling &s) { s.top_k = 1; });
    form("top p", [](Sampling &s) { s.top_p = 0.8; });
    form("top p, tiny", [](Sampling &s) { s.top_p = 0.01; });
    form("min p", [](Sampling &s) { s.min_p = 0.2; });
    form("repetition", [](Sampling &s) { s.repetition = 1.5; });
    form("bias", [](Sampling &s) { s.bias = {{5, 4.0f}, {3, -2.0f}, {5, 1.0f}}; });
    form("all", [](Sampling &s) {
        s.temperature = 1.3;
        s.top_k = 8;
        s.top_p = 0.9;
        s.min_p = 0.15;
        s.repetition = 1.2;
        s.bias = {{1, 1.5f}};
    });
    const std::vector<int32_t> seen = {3, 8, 3};
    for (auto &[name, s] : forms) {
        SCOPED_TRACE(name);
        const std::vector<double> p = exact(
            logits, s, s.repetition == 1 ? std::vector<int32_t>() : std::vector<int32_t>{3, 8});
        s.seed = 12345;
        Sampler sampler(s, logits.size());
        for (const int32_t id : seen)
            sampler.saw(id);
        std::vector<double> said(logits.size());
        for (const auto &[id, x] : sampler.distribution(logits))
            said[size_t(id)] = x;
        for (size_t i = 0; i < p.size(); ++i)
            EXPECT_NEAR(said[i], p[i], 1e-6) << i;
        constexpr int draws = 40000;
        std::vector<int> count(logits.size());
        for (int i = 0; i < draws; ++i)
            ++count[size_t(sampler.next(logits, uint64_t(i)))];
        double chi = 0, freedom = -1;
        for (size_t i = 0; i < p.size(); ++i) {
            if (p[i] == 0) {
                EXPECT_EQ(count[i], 0) << i;
                continue;
            }
            const double expected = p[i] * draws;
            chi += (count[i] - expected) * (count[i] - expected) / expected;
            freedom += 1;
        }
        // Beyond it by chance once in about a million.
        if (freedom > 0)
            EXPECT_LT(chi, freedom + 5 * std::sqrt(2 * freedom) + 12) << "of " << freedom;
        else
            EXPECT_EQ(chi, 0);
    }
}

TEST(Sampler, GreedyTakesTheFirstOfEquals) {
    Sampler sampler({}, 4);
    EXPECT_EQ(sampler.next(std::vector<float>{1, 3, 3, 2}, 0), 1);
}

TEST(Sampler, AnotherSeedIsAnotherText) {
    Session session(tiny_model("cpu"), options_of(cases()[0]));
    Generation g = wish({1, 2}, 30);
    g.sampling.temperature = 1;
    const auto with = [&](uint64_t seed) {
        g.sampling.seed = seed;
        return generate(session, g).ids;
    };
    EXPECT_EQ(with(1), with(1));
    EXPECT_NE(with(1), with(2));
}

TEST(Sampler, CountedDrawsAreUniform) {
    constexpr int cells = 64, draws = 64000;
    for (const uint64_t seed : {uint64_t(0), uint64_t(1), UINT64_MAX}) {
        std::vector<int> count(cells);
        double both = 0; // neighbours are independent
        for (int i = 0; i < draws; ++i) {
            const double x = uniform_at(seed, uint64_t(i));
            ASSERT_TRUE(x >= 0 && x < 1);
            ++count[size_t(x * cells)];
            both += (x - 0.5) * (uniform_at(seed, uint64_t(i) + 1) - 0.5);
        }
        double chi = 0;
        for (const int n : count)
            chi += (n - draws / cells) * double(n - draws / cells) / (draws / cells);
        EXPECT_LT(chi, 63 + 5 * std::sqrt(126.0));
        EXPECT_LT(std::abs(both / draws), 5 / 12.0 / std::sqrt(double(draws)));
    }
}

// ---- text

TEST(TextPieces, HoldBackWhatIsNotCertain) {
    TextPieces text({"stop", "end\n"});
    EXPECT_EQ(text.add("abc s"), "abc ");
    EXPECT_EQ(text.add("to"), "");
    EXPECT_EQ(text.add("r\xc3"), "stor");
    EXPECT_EQ(text.add("\xa9 en"), "\xc3\xa9 ");
    EXPECT_EQ(text.add("d of"), "end of");
    EXPECT_EQ(text.add(" sto"), " ");
    EXPECT_EQ(text.add("p and more"), "");
    EXPECT_EQ(text.stopped(), 0);
    EXPECT_EQ(text.add("more"), "");
    EXPECT_EQ(text.finish(), "");
}

TEST(TextPieces, AnyCutGivesTheSameText) {
    const std::string all = "a\xe2\x82\xac stosend\xf0\x9f\x98\x80 \xff\xc3 sstop rest";
    for (size_t step = 1; step <= all.size(); ++step) {
        TextPieces text({"sto p", "stop"});
        std::string joined;
        for (size_t at = 0; at < all.size(); at += step)
            joined += text.add(std::string_view(all).substr(at, step));
        joined += text.finish();
        EXPECT_EQ(joined, all.substr(0, all.find("stop"))) << step;
        EXPECT_EQ(text.stopped(), 1);
    }
}

TEST(TextPieces, WhatWasHeldComesInTheEnd) {
    TextPieces text({"xyz"});
    EXPECT_EQ(text.add("ab xy"), "ab ");
    EXPECT_EQ(text.finish(), "xy");
    EXPECT_EQ(text.stopped(), -1);
}

} // namespace
} // namespace ponder::test
