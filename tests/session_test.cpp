// Sessions: causality, determinism, transactions, snapshots, budgets, policies.
#include "expect_error.hpp"
#include "support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ponder::test {
namespace {

// Every score of a stream, token by token.
struct Trace {
    std::vector<float> losses;
    std::vector<ponder_record> records;
};

void take_chunk(Session &session, Trace &trace) {
    const auto losses = session.losses();
    trace.losses.insert(trace.losses.end(), losses.begin(), losses.end());
    trace.records.push_back(session.records().back());
}

Trace run(Session &session, std::span<const int32_t> tokens) {
    Trace trace;
    session.feed(tokens);
    for (;;) {
        if (!session.score(no_limits(session)))
            break;
        session.learn(-1, no_limits(session));
        take_chunk(session, trace);
    }
    return trace;
}

void expect_same_records(const std::vector<ponder_record> &a, const std::vector<ponder_record> &b) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
        ponder_record x = a[i], y = b[i];
        for (ponder_record *r : {&x, &y})
            r->score_ns = r->decide_ns = r->learn_ns = 0;
        EXPECT_EQ(std::memcmp(&x, &y, sizeof x), 0) << "record " << i;
    }
}

struct Case {
    const char *name;
    Values options;
};

std::vector<Case> cases() {
    std::vector<Case> list;
    for (const char *policy :
         {"always", "every:2", "random:0.5", "threshold:loss:2.0", "ema:entropy:0.5",
          "threshold:gradient_norm:0.3", "ema:update_norm:0.5", "skip", "first:0.5"})
        list.push_back({"lora", {{"adapter", "lora"}, {"policy", policy}, {"steps", "2"}}});
    list.push_back({"lora sgd", {{"inner.optimizer", "sgd"}, {"inner.lr", "0.1"}}});
    for (const char *adapter : {"ttt-linear", "ttt-mlp"})
        for (const char *policy : {"always", "every:3", "ema:reconstruction:0.5"})
            list.push_back({adapter, {{"adapter", adapter}, {"policy", policy}}});
    list.push_back({"ponder", {{"adapter", "ttt-linear"}, {"ttt.form", "ponder"}}});
    return list;
}

Options options_of(const Case &c, const char *context = "64") {
    return with(
        make_options(
            {{"chunk", "32"}, {"context", context}, {"lora.rank", "4"}, {"lora.layers", "all"}}),
        c.options);
}

TEST(Causality, NoScoreReadsALaterToken) {
    constexpr size_t tokens_count = 32 * 6, changed = 32 * 3 + 17;
    for (const char *dtype : {"f32", "bf16"})
        for (const Case &c : cases()) {
            std::vector<int32_t> tokens = random_tokens(tokens_count, 3);
            Session session(tiny_model("cpu", dtype), options_of(c));
            session.expect(6);
            const Trace before = run(session, tokens);
            tokens[changed] = (tokens[changed] + 131) % 320;
            session.reset();
            session.expect(6);
            const Trace after = run(session, tokens);
            // losses[chunk * 31 + t] is that of token t + 1 of the chunk.
            const size_t first_touched = 3 * 31 + 17 - 1;
            for (size_t i = 0; i < first_touched; ++i)
                ASSERT_EQ(before.losses[i], after.losses[i])
                    << c.name << " " << c.options.back().second << " loss " << i;
            EXPECT_NE(before.losses[first_touched], after.losses[first_touched]);
        }
}

TEST(Determinism, SameSeedSameRecords) {
    for (const Case &c : cases()) {
        Session a(tiny_model("cpu", "f32"), options_of(c)),
            b(tiny_model("cpu", "f32"), options_of(c));
        a.expect(5);
        b.expect(5);
        const auto tokens = random_tokens(32 * 5, 4);
        const Trace x = run(a, tokens), y = run(b, tokens);
        expect_same_records(x.records, y.records);
        EXPECT_EQ(x.losses, y.losses);
    }
}

TEST(Determinism, ThreadsDoNotMatter) {
    for (const char *dtype : {"f32", "bf16"})
        for (const Case &c : cases()) {
            std::vector<Trace> traces;
            for (uint32_t threads : {1u, 3u}) {
                Session session(tiny_model("cpu", dtype, threads), options_of(c));
                session.expect(5);
                traces.push_back(run(session, random_tokens(32 * 5, 5)));
                for (ponder_record &r : traces.back().records)
                    r.bytes = 0; // workspace of more workers
            }
            expect_same_records(traces[0].records, traces[1].records);
            EXPECT_EQ(traces[0].losses, traces[1].losses) << c.name;
        }
}

TEST(Snapshot, ForkAndRestoreContinueBitForBit) {
    const auto tokens = random_tokens(32 * 8 + 11, 6);
    for (const Case &c : cases()) {
        Session whole(tiny_model("cpu", "f32"), options_of(c));
        whole.expect(8);
        const Trace expected = run(whole, tokens);
        for (const bool between : {false, true}) { // cut after learn, or between score and learn
            Session first(tiny_model("cpu", "f32"), options_of(c));
            first.expect(8);
            Trace trace = run(first, std::span(tokens).first(32 * 3 + 7));
            std::span<const int32_t> rest = std::span(tokens).subspan(32 * 3 + 7);
            if (between) {
                first.feed(rest.first(32));
                rest = rest.subspan(32);
                ASSERT_TRUE(first.score(no_limits(first)));
            }
            auto fork = first.fork();
            Session restored(tiny_model("cpu", "f32"), options_of(c));
            restored.load(first.save(), "snapshot");
            for (Session *session : {&first, fork.get(), &restored}) {
                Trace all = trace;
                if (between) {
                    session->learn(-1, no_limits(*session));
                    take_chunk(*session, all);
                }
                const Trace more = run(*session, rest);
                all.losses.insert(all.losses.end(), more.losses.begin(), more.losses.end());
                all.records.insert(all.records.end(), more.records.begin(), more.records.end());
                EXPECT_EQ(all.losses, expected.losses) << c.name;
                expect_same_records(all.records, expected.records);
            }
        }
    }
}

TEST(Snapshot, RefusesAnotherModelOptionsOrFormat) {
    const Case c{"lora", {}};
    Session session(tiny_model("cpu", "f32"), options_of(c));
    run(session, random_tokens(64, 1));
    std::vector<std::byte> bytes = session.save();
    const auto refuses = [&](Session &other, ponder_status wanted, const char *text) {
        const std::vector<std::byte> before = other.save();
        try {
            other.load(bytes, "snap");
            ADD_FAILURE() << "accepted";
        } catch (const Error &e) {
            EXPECT_EQ(e.status(), wanted) << e.what();
            EXPECT_NE(std::string(e.what()).find(text), std::string::npos) << e.what();
        }
        EXPECT_EQ(other.save(), before); // nothing changed
    };
    Options different = options_of(c);
    different.set("inner.lr", "1e-4");
    Session other_options(tiny_model("cpu", "f32"), different);
    refuses(other_options, PONDER_E_MISMATCH, "options");
    Session other_dtype(tiny_model("cpu", "bf16"), options_of(c));
    refuses(other_dtype, PONDER_E_MISMATCH, "dtype");
    Session other_model(load_model(PONDER_MODEL_CODE10M, "cpu"), options_of(c));
    refuses(other_model, PONDER_E_MISMATCH, "model");

    Session same(tiny_model("cpu", "f32"), options_of(c));
    const std::vector<std::byte> good = bytes;
    for (size_t cut = 0; cut < good.size(); cut += 1 + cut / 7) {
        bytes.assign(good.begin(), good.begin() + std::ptrdiff_t(cut));
        refuses(same, PONDER_E_FORMAT, "snap");
    }
}

// The controller's third value says how many first chunks it has seen; two signals follow.
TEST(Snapshot, RefusesAStateThatIsNotThePolicys) {
    const Options options = options_of({"lora", {{"policy", "ema:entropy:0.5"}}});
    Session session(tiny_model("cpu", "f32"), options);
    run(session, random_tokens(64, 1));
    const std::vector<std::byte> good = session.save();
    const uint64_t at = SafeTensors::view(good, "snap").find("policy")->begin + 2 * sizeof(double);
    double seen;
    std::memcpy(&seen, good.data() + at, sizeof seen);
    ASSERT_EQ(seen, 2);
    for (const double wrong : {0.0, 1.0, -1.0, 9.0, 1e300, double(NAN)}) {
        std::vector<std::byte> bytes = good;
        std::memcpy(bytes.data() + at, &wrong, sizeof wrong);
        expect_error(PONDER_E_FORMAT, {"snap", "'policy'", "ema"},
                     [&] { session.load(bytes, "snap"); });
        EXPECT_EQ(session.save(), good);
    }
    session.load(good, "snap");
}

TEST(Transaction, AScoreThatFailsChangesNothing) {
    for (const Case &c : cases()) {
        Session session(tiny_model("cpu", "f32"), options_of(c));
        session.expect(8);
        run(session, random_tokens(32 * 3, 6));
        session.feed(random_tokens(5, 7));
        const std::vector<std::byte> before = session.save();
        const std::vector<float> losses(session.losses().begin(), session.losses().end());
        ponder_call call{};
        call.struct_size = sizeof call;
        call.timeout_ns = 1;
        EXPECT_EQ(PONDER_E_DEADLINE,
                  thrown_status([&] { session.flush(CallGuard(session.cancel_flag(), &call)); }))
            << c.name;
        EXPECT_EQ(session.save(), before) << c.name;
        EXPECT_TRUE(std::ranges::equal(session.losses(), losses)) << c.name;
        call.timeout_ns = UINT64_MAX;
        session.flush(CallGuard(session.cancel_flag(), &call));
        EXPECT_EQ(session.losses().size(), 4u);
    }
}

// It arrives between two chunks, while a layer's own update is taken.
TEST(Transaction, ACancelIsNotLost) {
    Session session(tiny_model("cpu", "f32"), options_of({"layer", {{"adapter", "ttt-linear"}}}));
    session.feed(random_tokens(32 * 2, 6));
    const CallGuard guard = no_limits(session);
    ASSERT_TRUE(session.score(guard));
    session.cancel();
    session.learn(-1, guard);
    EXPECT_EQ(PONDER_E_CANCELLED, thrown_status([&] { session.score(guard); }));
}

TEST(Transaction, ProfilesCanBeCancelledAndChangeNothing) {
    Session session(tiny_model("cpu", "f32"), options_of({"lora", {}}));
    run(session, random_tokens(32 * 3, 6));
    const std::vector<std::byte> before = session.save();
    const CallGuard guard = no_limits(session);
    EXPECT_FALSE(session.profile(learn_segment, 2, guard).empty());
    EXPECT_EQ(session.save(), before);
    session.cancel();
    EXPECT_EQ(PONDER_E_CANCELLED, thrown_status([&] { session.profile(score_segment, 2, guard); }));
    EXPECT_EQ(session.save(), before);
}

TEST(Stream, LengthsAreCounts) {
    Session session(tiny_model("cpu", "f32"), options_of({"lora", {{"policy", "first:0.5"}}}));
    EXPECT_EQ(PONDER_E_ARGUMENT, thrown_status([&] { session.expect(UINT64_MAX); }));
    EXPECT_EQ(PONDER_E_STATE, thrown_status([&] { session.require_length(); }));
    session.expect(uint64_t(1) << 53);
    session.require_length();
    session.fork();
}

TEST(Transaction, NormBoundRollsBack) {
    Options options = options_of({"lora", {{"guard.norm", "1e-6"}}});
    Session session(tiny_model("cpu", "f32"), options);
    Options frozen_options = options_of({"none", {{"adapter", "none"}}});
    Session frozen(tiny_model("cpu", "f32"), frozen_options);
    const auto tokens = random_tokens(32 * 4, 8);
    const Trace trace = run(session, tokens), skip = run(frozen, tokens);
    for (const ponder_record &r : trace.records) {
        EXPECT_TRUE(r.flags & PONDER_RECORD_ROLLED_BACK);
        EXPECT_FALSE(r.flags & PONDER_RECORD_UPDATED);
        EXPECT_GT(r.update_norm, 1e-6);
    }
    EXPECT_LE(relative_error(trace.losses, skip.losses), 1e-6); // B is still zero
}

TEST(Transaction, NonFiniteStepRollsBackAndTheSessionGoesOn) {
    Options options = options_of(
        {"lora",
         {{"inner.optimizer", "sgd"}, {"inner.lr", "100"}, {"inner.clip", "0"}, {"steps", "40"}}});
    Session session(tiny_model("cpu", "f32"), options);
    const Trace trace = run(session, random_tokens(32 * 4, 9));
    for (const ponder_record &r : trace.records) {
        EXPECT_TRUE(std::isfinite(r.loss_before));
        EXPECT_TRUE(r.flags & (PONDER_RECORD_ROLLED_BACK | PONDER_RECORD_UPDATED));
    }
}

TEST(Transaction, CancelledCallsChangeNothing) {
    for (const Case &c : cases()) {
        Session a(tiny_model("cpu", "f32"), options_of(c)),
            b(tiny_model("cpu", "f32"), options_of(c));
        const auto tokens = random_tokens(32 * 4, 10);
        a.expect(4);
        b.expect(4);
        ponder_call late{};
        late.struct_size = sizeof late;
        late.timeout_ns = 1;
        b.feed(tokens);
        for (int i = 0; i < 4; ++i) {
            EXPECT_THROW(b.score({b.cancel_flag(), &late}), Error);
            ASSERT_TRUE(b.score(no_limits(b)));
            try {
                b.learn(-1, {b.cancel_flag(), &late});
                // Nothing to compute: done at once.
            } catch (const Error &e) {
                EXPECT_EQ(e.status(), PONDER_E_DEADLINE);
                b.learn(-1, no_limits(b));
            }
        }
        const Trace expected = run(a, tokens);
        const std::vector<ponder_record> got(b.records().begin(), b.records().end());
        expect_same_records(got, expected.records);
    }
}

TEST(Budget, IsHard) {
    Options options =
        options_of({"lora", {{"steps", "3"}, {"budget.rate", "0.5"}, {"budget.burst", "4"}}});
    Session session(tiny_model("cpu", "f32"), options);
    const Trace trace = run(session, random_tokens(32 * 40, 11));
    int64_t steps = 0;
    bool denied = false;
    for (size_t i = 0; i < trace.records.size(); ++i) {
        steps += trace.records[i].steps;
        EXPECT_EQ(trace.records[i].steps_wanted, 3);
        EXPECT_LE(double(steps), 4 + 0.5 * double(i + 1));
        denied = denied || (trace.records[i].flags & PONDER_RECORD_OVER_BUDGET);
    }
    EXPECT_TRUE(denied);
}

TEST(Learning, LowersTheLossOfARepeatedStream) {
    for (const char *dtype : {"f32", "bf16"}) {
        Session session(tiny_model("cpu", dtype), options_of({"lora", {}}));
        const auto once = random_tokens(32 * 4, 12);
        double first = 0, last = 0;
        for (int round = 0; round < 6; ++round)
            for (const ponder_record &r : run(session, once).records)
                (round == 0 ? first : last) += r.loss_before / (round == 0 ? 1 : 5);
        EXPECT_LT(last, first - 0.5) << dtype;
    }
}

TEST(Learning, MoreStepsGiveLossAfter) {
    Session session(tiny_model("cpu", "f32"),
                    options_of({"lora", {{"steps", "3"}, {"record.loss_after", "1"}}}));
    for (const ponder_record &r : run(session, random_tokens(32 * 3, 13)).records) {
        EXPECT_LT(r.loss_after, r.loss_before);
        EXPECT_EQ(r.steps, 3);
    }
}

TEST(Stream, FlushScoresTheShortEndAndGoesOn) {
    Session session(tiny_model("cpu", "f32"), options_of({"lora", {}}));
    const auto tokens = random_tokens(32 * 3 + 9, 14);
    session.feed(std::span(tokens).first(32 + 9));
    session.flush(no_limits(session));
    EXPECT_EQ(session.records().size(), 2u);
    EXPECT_EQ(session.records().back().tokens, 9u);
    EXPECT_EQ(session.losses().size(), 8u);
    session.feed(std::span(tokens).subspan(32 + 9));
    session.flush(no_limits(session));
    EXPECT_EQ(session.records().size(), 4u);
    EXPECT_EQ(session.records().back().first_token, 32u + 9 + 32);
}

TEST(Stream, AnyCutOfTheFeedGivesTheSameResult) {
    const auto tokens = random_tokens(32 * 5, 15);
    Session whole(tiny_model("cpu", "f32"), options_of({"lora", {}}));
    const Trace expected = run(whole, tokens);
    Session pieces(tiny_model("cpu", "f32"), options_of({"lora", {}}));
    Trace got;
    for (size_t at = 0, step = 1; at < tokens.size(); step = step * 3 % 41) {
        const size_t n = std::min(step, tokens.size() - at);
        const Trace more = run(pieces, std::span(tokens).subspan(at, n));
        got.losses.insert(got.losses.end(), more.losses.begin(), more.losses.end());
        at += n;
    }
    EXPECT_EQ(got.losses, expected.losses);
}

TEST(Memory, IsFlatOverManyChunks) {
    const auto m = tiny_model("cpu", "f32");
    Session session(m, options_of({"lora", {{"record.ring", "8"}}}));
    const auto tokens = random_tokens(32 * 16, 16);
    run(session, tokens);
    const uint64_t before = m->runtime().memory->in_use();
    for (int i = 0; i < 50; ++i)
        run(session, tokens);
    EXPECT_EQ(m->runtime().memory->in_use(), before);
    EXPECT_EQ(session.records().size(), 8u);
}

} // namespace
} // namespace ponder::test
