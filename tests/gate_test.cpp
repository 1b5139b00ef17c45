// Gates: features, network, policy, training, calibration.
#include "adapt/stored_gate.hpp"
#include "eval/calibrate.hpp"
#include "expect_error.hpp"
#include "free_port.hpp"
#include "policy/budget.hpp"
#include "policy/gate.hpp"
#include "policy/policy.hpp"
#include "support.hpp"
#include "train/gate_trainer.hpp"

#include <gtest/gtest.h>

#include <thread>

#include <cstring>

#include <set>

namespace ponder::test {
namespace {

// ---- PonderTTT's features and network, as its own code computed them

class Fixture : public ::testing::Test {
protected:
    const SafeTensors file = SafeTensors::open(PONDER_TEST_DATA "/ponder_gate.safetensors");
    const int64_t batch = 4, tokens = 48, width = 24, vocabulary = 97, heads = 3;
};

TEST_F(Fixture, FeaturesAreThoseOfThePaper) {
    const auto ids = test::ids(file, "input_ids");
    const auto hidden = tensor(file, "hidden"), logits = tensor(file, "logits"),
               attention = tensor(file, "attention"), expected = tensor(file, "features");
    PonderHistory history;
    history.add(2.5, 3.0);
    history.add(1.5, 1.0);
    for (int64_t b = 0; b < batch; ++b) {
        std::vector<float> probabilities;
        for (int64_t t = 0; t < tokens; ++t) {
            const float *row = logits.data() + (b * tokens + t) * vocabulary;
            const std::vector<double> wide(row, row + vocabulary);
            for (double p : softmax(wide))
                probabilities.push_back(float(p));
        }
        PonderInputs in;
        in.ids = std::span(ids).subspan(size_t(b * tokens), size_t(tokens));
        in.vocabulary = vocabulary;
        in.probabilities = {probabilities.data(), DType::f32, size_t(tokens), size_t(vocabulary)};
        in.hidden = {hidden.data() + b * tokens * width, DType::f32, size_t(tokens), size_t(width)};
        in.attention = {attention.data() + b * heads * tokens * tokens, DType::f32,
                        size_t(heads * tokens), size_t(tokens)};
        in.difficulty = history.difficulty;
        in.difficulty_deviation = std::sqrt(history.variance);
        in.cost = history.cost;
        in.budget = 0.4;
        const std::vector<double> features = ponder_features(in);
        for (size_t i = 0; i < ponder_feature_count; ++i) {
            const double wanted = double(expected[size_t(b) * ponder_feature_count + i]);
            EXPECT_NEAR(features[i], wanted, 1e-5 * std::max(1.0, std::abs(wanted)))
                << "feature " << i << " of " << b;
        }
    }
}

TEST_F(Fixture, NetworkIsThatOfThePaper) {
    GateNet net(32, 64, 2);
    for (const GateNet::Part &part : net.parts()) {
        const auto values = tensor(file, "param." + part.name);
        ASSERT_EQ(values.size(), part.count());
        std::copy(values.begin(), values.end(),
                  net.parameters().begin() + std::ptrdiff_t(part.offset));
    }
    const auto features = tensor(file, "features"), probs = tensor(file, "probs");
    const auto decision = ids(file, "decision");
    for (size_t b = 0; b < 4; ++b) {
        const std::vector<double> x(features.begin() + std::ptrdiff_t(b * 32),
                                    features.begin() + std::ptrdiff_t(b * 32 + 32));
        const std::vector<double> p = softmax(net.forward(x).out, 0.7);
        for (size_t i = 0; i < 2; ++i)
            EXPECT_NEAR(p[i], double(probs[b * 2 + i]), 1e-5);
        EXPECT_EQ(p[1] > p[0], decision[b] == 1);
    }
}

// ---- The network's gradient

TEST(GateNet, GradientIsThatOfFiniteDifferences) {
    Random random(3);
    GateNet net(9, 7, 3);
    net.draw(random);
    for (double &p : net.parameters())
        p += 0.1 * random.normal();
    std::vector<double> x(9), weight(3);
    for (double &v : x)
        v = random.normal();
    for (double &v : weight)
        v = random.normal();
    const auto loss = [&] {
        const auto out = net.forward(x).out;
        double sum = 0;
        for (size_t i = 0; i < 3; ++i)
            sum += weight[i] * out[i] * out[i] / 2;
        return sum;
    };
    const GateNet::Pass pass = net.forward(x);
    std::vector<double> dout(3), gradient(net.parameters().size());
    for (size_t i = 0; i < 3; ++i)
        dout[i] = weight[i] * pass.out[i];
    net.backward(pass, dout, gradient);
    for (size_t i = 0; i < gradient.size(); ++i) {
        const double at = net.parameters()[i], h = 1e-5;
        net.parameters()[i] = at + h;
        const double high = loss();
        net.parameters()[i] = at - h;
        const double low = loss();
        net.parameters()[i] = at;
        EXPECT_NEAR(gradient[i], (high - low) / (2 * h), 1e-7) << "parameter " << i;
    }
}

TEST(Features, EveryOneHasAName) {
    std::set<std::string_view> names;
    for (size_t i = 0; i < planned_feature_count; ++i)
        names.insert(planned_feature_name(i));
    EXPECT_EQ(names.size(), planned_feature_count);
    EXPECT_FALSE(names.contains(""));
}

// ---- Objectives

std::vector<GateSample> random_samples(size_t count, size_t inputs, Random &random) {
    std::vector<GateSample> samples(count);
    for (GateSample &sample : samples) {
        sample.features.resize(inputs);
        for (double &x : sample.features)
            x = random.normal();
        for (double &x : sample.later)
            x = 2 + 0.1 * random.normal();
        for (double &x : sample.own)
            x = 1 + 0.1 * random.normal();
    }
    return samples;
}

Gate small_gate(GateForm form, size_t inputs, Random &random) {
    Gate gate;
    gate.form = form;
    gate.net = GateNet(inputs, 6, gate_outputs(form));
    gate.net.draw(random);
    for (double &p : gate.net.parameters())
        p += 0.2 * random.normal();
    gate.mean.assign(inputs, 0.0);
    gate.deviation.assign(inputs, 1.0);
    gate.value_unit = 0.1;
    return gate;
}

// Expected values are smooth; of a Gumbel sample the straight-through gradient is that of the soft
// sample, so hard samples are compared through the cost term alone.
TEST(GateLoss, GradientIsThatOfFiniteDifferences) {
    for (const GateForm form : {GateForm::binary, GateForm::soft, GateForm::steps})
        for (const bool ponder : {false, true}) {
            Random random(5);
            Gate gate = small_gate(form, 5, random);
            std::vector<GateSample> samples = random_samples(4, 5, random);
            if (ponder && form != GateForm::soft)
                for (GateSample &sample : samples)
                    sample.later = sample.own = {};
            std::vector<const GateSample *> batch;
            for (const GateSample &sample : samples)
                batch.push_back(&sample);
            GateObjective objective;
            objective.ponder = ponder;
            objective.beta = 0.3;
            objective.gamma = 0.7;
            objective.target = 0.2;
            std::vector<double> gradient(gate.net.parameters().size());
            gate_loss(gate, batch, objective, random, gradient);
            for (size_t i = 0; i < gradient.size(); ++i) {
                std::vector<double> none(gradient.size());
                const double at = gate.net.parameters()[i], h = 1e-5;
                gate.net.parameters()[i] = at + h;
                const double high = gate_loss(gate, batch, objective, random, none).loss;
                gate.net.parameters()[i] = at - h;
                const double low = gate_loss(gate, batch, objective, random, none).loss;
                gate.net.parameters()[i] = at;
                EXPECT_NEAR(gradient[i], (high - low) / (2 * h), 1e-6)
                    << "form " << int(form) << " ponder " << ponder << " parameter " << i;
            }
        }
}

// A gate of PonderTTT's kind finds which chunks gain, and holds the target rate from both sides.
TEST(GateLoss, StraightThroughLearnsWhereToUpdate) {
    for (const double bias : {-2.0, 2.0}) {
        Random random(7);
        Gate gate = small_gate(GateForm::binary, 4, random);
        gate.net.parameters()[gate.net.parts().back().offset + 1] = bias;
        std::vector<GateSample> samples = random_samples(64, 4, random);
        for (GateSample &sample : samples) {
            sample.later = {2, sample.features[0] > 0 ? 1.5 : 2.5, 0, 0};
            sample.own = {};
        }
        std::vector<const GateSample *> batch;
        for (const GateSample &sample : samples)
            batch.push_back(&sample);
        GateObjective objective;
        objective.ponder = true;
        objective.gamma = 4;
        objective.target = 0.4;
        GateLoss loss{};
        for (int step = 0; step < 600; ++step) {
            objective.temperature = 1 - 0.0015 * step;
            std::vector<double> gradient(gate.net.parameters().size());
            loss = gate_loss(gate, batch, objective, random, gradient);
            for (size_t i = 0; i < gradient.size(); ++i)
                gate.net.parameters()[i] -= 0.2 * gradient[i];
        }
        EXPECT_NEAR(loss.cost, 0.45, 0.12);
        size_t right = 0;
        for (const GateSample &sample : samples) {
            const auto out = gate.evaluate(sample.features);
            right += (out[1] > out[0]) == (sample.features[0] > 0);
        }
        EXPECT_GE(right, 54u);
    }
}

// ---- Rates

// A gate whose score is the chunk's loss, as far as a network can say it: layer norm off, the
// first feature through.
std::shared_ptr<Gate> loss_gate() {
    auto gate = std::make_shared<Gate>();
    gate->form = GateForm::binary;
    gate->net = GateNet(planned_feature_count, 2, 2);
    gate->mean.assign(planned_feature_count, 0.0);
    gate->deviation.assign(planned_feature_count, 1e9); // all others vanish
    gate->mean[0] = 2;
    gate->deviation[0] = 1;
    const auto part = [&](size_t i) {
        return gate->net.parameters().subspan(gate->net.parts()[i].offset,
                                              gate->net.parts()[i].count());
    };
    part(0)[0] = 1;
    part(2)[0] = 1; // fc1.kernel [64, 2]: +x and -x
    part(2)[1] = -1;
    part(4)[0] = 1; // fc2: through
    part(4)[3] = 1;
    part(6)[1] = 1; // head: update logit = x
    part(6)[3] = -1;
    return gate;
}

// Decisions on made-up losses, one value for every token of a chunk of five.
double realised_rate(const std::shared_ptr<const Gate> &gate, double target, size_t chunks,
                     bool declared, uint64_t seed, double shift,
                     std::vector<std::vector<double>> *outputs = nullptr) {
    const auto policy = make_gate_policy(gate, target);
    Random random(seed);
    double steps = 0;
    const std::vector<int32_t> ids{1, 2, 3, 4, 5};
    for (size_t i = 0; i < chunks; ++i) {
        std::vector<float> nll(4);
        const double level = 2 + shift + 0.5 * random.normal();
        for (float &v : nll)
            v = float(level + 0.1 * random.normal());
        Observation o;
        o.nll = o.entropy = nll;
        o.ids = ids;
        o.vocabulary = 10;
        policy->observe(o);
        Situation situation;
        situation.chunk = i;
        situation.expected = declared ? chunks : 0;
        if (outputs)
            outputs->push_back(gate->evaluate(policy->features(situation)));
        const Decision d = policy->decide(situation, random);
        ponder_record record{};
        record.steps = d.update ? std::max(d.steps, 1) : 0;
        record.update_norm = record.gradient_norm = std::nan("");
        policy->learned(record);
        steps += record.steps;
    }
    return steps / double(chunks);
}

TEST(GatePolicy, HoldsTheRateOnOtherStreams) {
    const auto gate = loss_gate();
    gate->calibration.points = {{0.5, 0}};
    std::vector<std::vector<double>> outputs;
    realised_rate(gate, 0.5, 400, false, 1, 0, &outputs);
    fit_thresholds(*gate, outputs, gate->calibration);
    for (size_t i = 1; i < gate->calibration.points.size(); ++i)
        EXPECT_LE(gate->calibration.points[i].threshold, gate->calibration.points[i - 1].threshold);
    for (const double target : {0.1, 0.25, 0.5, 0.8})
        for (const bool declared : {false, true})
            for (const double shift : {-1.0, 0.0, 1.0}) // harder and easier than calibrated on
                for (uint64_t seed = 2; seed < 5; ++seed)
                    EXPECT_NEAR(realised_rate(gate, target, 200, declared, seed, shift), target,
                                0.1 * target)
                        << "declared " << declared << " shift " << shift;
}

TEST(GatePolicy, ThresholdsSpendWhatTheySay) {
    Random random(11);
    Gate gate = small_gate(GateForm::steps, 4, random);
    std::vector<std::vector<double>> outputs;
    for (int i = 0; i < 2000; ++i) {
        const double v = std::abs(random.normal());
        outputs.push_back({v, v * (1 + random.uniform()), v * (1 + 2 * random.uniform())});
    }
    fit_thresholds(gate, outputs, gate.calibration);
    for (const double rate : {0.05, 0.33, 0.5, 1.0, 1.6})
        EXPECT_NEAR(spending(gate, outputs, gate.calibration.threshold(rate)).steps, rate,
                    0.02 + 0.02 * rate);
}

// ---- Sessions with a gate

Options gate_options(const Values &more = {}) {
    return with(make_options({{"chunk", "16"},
                              {"context", "32"},
                              {"lora.rank", "2"},
                              {"lora.layers", "all"},
                              {"inner.lr", "0.01"}}),
                more);
}

// An adapter folder with an untrained LoRA.
void save_plain_adapter(const std::string &folder) {
    const Options options = gate_options();
    const Gpt2 &backbone = tiny_model("reference")->backbone();
    const auto adapter = make_adapter(backbone.config(), options, backbone.hash());
    std::vector<float> fast(adapter->fast_count());
    Random random(0);
    adapter->initial(fast, random);
    save_adapter(folder, "lora", backbone.hash(), options, *adapter, fast);
}

TEST(Snapshot, RefusesOtherContentOfTheAdaptersFolder) {
    const TempDir folder;
    const auto session = [&] {
        save_plain_adapter(folder.path());
        return std::make_unique<Session>(tiny_model("reference"),
                                         gate_options({{"adapter", folder.path()}}));
    };
    const auto first = session(), same = session();
    first->feed(random_tokens(16 * 3, 4));
    first->adapt(no_limits(*first));
    same->load(first->save(), "snapshot");
    const std::string file = folder.path() + "/ponder.safetensors";
    std::string bytes = read_file(file, 1 << 26);
    bytes.back() = char(bytes.back() ^ 1);
    replace_file(file, [&](const Sink &sink) { sink(bytes.data(), bytes.size()); });
    Session other(tiny_model("reference"), gate_options({{"adapter", folder.path()}}));
    expect_error(PONDER_E_MISMATCH, {"snapshot", "adapter"},
                 [&] { other.load(first->save(), "snapshot"); });
    // Steps that the host gave hold for a gate too.
    Session steps(tiny_model("reference"),
                  gate_options({{"adapter", folder.path()}, {"steps", "1"}}));
    expect_error(PONDER_E_MISMATCH, {"snapshot", "options"},
                 [&] { steps.load(other.save(), "snapshot"); });
}

class Trained : public ::testing::Test {
protected:
    Trained() {
        save_plain_adapter(folder());
        options = gate_options({{"adapter", folder()},
                                {"gate.hidden", "8"},
                                {"gate.horizon", "2"},
                                {"gate.samples", "4"},
                                {"gate.replay", "5"}});
        for (uint64_t i = 0; i < 3; ++i)
            text.push_back(random_tokens(16 * 10, 20 + i));
        for (const auto &ids : text)
            streams.push_back({ids.data(), ids.size()});
    }
    std::string folder() const { return dir.path(); }
    void train(GateTrainer &trainer, int steps) {
        std::atomic<bool> cancel{false};
        for (int i = 0; i < steps; ++i)
            last = trainer.step(streams, CallGuard(cancel, nullptr));
    }
    TempDir dir;
    Options options;
    std::vector<std::vector<int32_t>> text;
    std::vector<ponder_stream> streams;
    ponder_train_record last{};
};

// Two processes (threads stand for them) measure what one measures, in the same order.
TEST_F(Trained, ProcessesMeasureTogether) {
    GateTrainer alone(tiny_model("reference"), options);
    train(alone, 2);
    alone.save(dir.path() + "/alone", "");
    const std::string address = free_address();
    std::vector<std::thread> processes;
    for (size_t r = 0; r < 2; ++r)
        processes.emplace_back([&, r] {
            Options own = options;
            own.set("train.world", "2");
            own.set("train.rank", std::to_string(r));
            own.set("train.address", address);
            GateTrainer trainer(tiny_model("reference"), own);
            std::atomic<bool> cancel{false};
            for (int i = 0; i < 2; ++i)
                trainer.step(streams, CallGuard(cancel, nullptr));
            trainer.save(dir.path() + "/" + std::to_string(r), "");
        });
    for (std::thread &p : processes)
        p.join();
    for (const char *name : {"/0", "/1"})
        EXPECT_EQ(read_file(dir.path() + name, 1 << 24), read_file(dir.path() + "/alone", 1 << 24));
}

TEST_F(Trained, CheckpointGoesOnBitForBit) {
    GateTrainer whole(tiny_model("reference"), options), half(tiny_model("reference"), options);
    train(whole, 3);
    train(half, 2);
    half.save(dir.path() + "/checkpoint", "here");
    GateTrainer rest(tiny_model("reference"), options);
    rest.load(dir.path() + "/checkpoint");
    EXPECT_EQ(rest.steps(), 2u);
    EXPECT_EQ(rest.note(), "here");
    train(rest, 1);
    TempDir a, b;
    save_plain_adapter(a.path());
    save_plain_adapter(b.path());
    whole.export_to(a.path());
    rest.export_to(b.path());
    EXPECT_EQ(read_file(a.path() + "/ponder.safetensors", 1 << 24),
              read_file(b.path() + "/ponder.safetensors", 1 << 24));
    EXPECT_EQ(read_file(a.path() + "/ponder.json", 1 << 24),
              read_file(b.path() + "/ponder.json", 1 << 24));
    EXPECT_GT(last.tokens, 0u);
    EXPECT_TRUE(std::isfinite(last.loss));
}

TEST_F(Trained, PolicyAdapterFollowsTheStoredGate) {
    for (const char *form : {"steps", "binary", "soft"})
        for (const char *features : {"planned", "ponder"}) {
            options.set("gate.form", form);
            options.set("gate.features", features);
            options.set("gate.loss", features == std::string("ponder") ? "ponder" : "advantage");
            GateTrainer trainer(tiny_model("reference"), options);
            train(trainer, 1);
            trainer.export_to(folder());
            // The stored policy is `adapter`.
            Session session(tiny_model("reference"), gate_options({{"adapter", folder()}}));
            session.expect(10);
            session.feed(text[0]);
            session.feed(text[1]);
            // A snapshot in the middle, between score and learn, goes on bit for bit.
            for (int i = 0; i < 4; ++i) {
                ASSERT_TRUE(session.score(no_limits(session)));
                session.learn(-1, no_limits(session));
            }
            ASSERT_TRUE(session.score(no_limits(session)));
            const auto fork = session.fork();
            Session loaded(tiny_model("reference"), gate_options({{"adapter", folder()}}));
            loaded.load(session.save(), "snapshot");
            for (Session *s : {&session, fork.get(), &loaded})
                s->adapt(no_limits(*s));
            EXPECT_GT(session.info().steps, 0u);
            for (const Session *other : {static_cast<const Session *>(fork.get()),
                                         static_cast<const Session *>(&loaded)}) {
                ASSERT_EQ(other->records().size(), session.records().size());
                for (size_t i = 0; i < session.records().size(); ++i) {
                    const ponder_record &x = session.records()[i], &y = other->records()[i];
                    EXPECT_EQ(x.loss_before, y.loss_before);
                    EXPECT_EQ(x.steps, y.steps);
                    EXPECT_EQ(std::memcmp(&x.gate_score, &y.gate_score, sizeof x.gate_score), 0);
                }
            }
            // Another policy overrides; a snapshot of another gate is refused.
            Session always(tiny_model("reference"),
                           gate_options({{"adapter", folder()}, {"policy", "always"}}));
            always.feed(text[0]);
            always.adapt(no_limits(always));
            EXPECT_EQ(always.info().steps, 10u);
            const auto before = session.save();
            train(trainer, 1);
            trainer.export_to(folder());
            Session other(tiny_model("reference"), gate_options({{"adapter", folder()}}));
            expect_error(PONDER_E_MISMATCH, {"gate"}, [&] { other.load(before, "snapshot"); });
        }
}

TEST_F(Trained, FeaturesOfOneChunkDoNotDependOnLaterOnes) {
    GateTrainer trainer(tiny_model("reference"), options);
    train(trainer, 1);
    trainer.export_to(folder());
    std::vector<std::vector<double>> seen[2];
    for (int run = 0; run < 2; ++run) {
        std::vector<int32_t> ids = text[0];
        if (run == 1)
            for (size_t i = 16 * 6; i < ids.size(); ++i)
                ids[i] = 7;
        Session session(tiny_model("reference"), gate_options({{"adapter", folder()}}));
        session.feed(ids);
        while (session.score(no_limits(session))) {
            seen[run].push_back(session.features());
            session.learn(-1, no_limits(session));
        }
    }
    for (size_t chunk = 0; chunk < 6; ++chunk) {
        size_t known = 0;
        for (size_t i = 0; i < planned_feature_count; ++i) {
            known += std::isfinite(seen[0][chunk][i]);
            EXPECT_EQ(std::memcmp(&seen[0][chunk][i], &seen[1][chunk][i], sizeof(double)), 0)
                << planned_feature_name(i);
        }
        EXPECT_GE(known, chunk == 0 ? 40u : 55u); // only what needs history or a declared length
    }
}

TEST_F(Trained, CalibrationIsStoredAndHolds) {
    GateTrainer trainer(tiny_model("reference"), options);
    train(trainer, 2);
    trainer.export_to(folder());
    std::atomic<bool> cancel{false};
    CalibrationGoal goal;
    goal.target = 0.4;
    const Options with = gate_options({{"adapter", folder()}});
    const std::vector<std::vector<int32_t>> others{random_tokens(16 * 20, 77),
                                                   random_tokens(16 * 20, 78)};
    const std::vector<ponder_stream> held{{others[0].data(), others[0].size()},
                                          {others[1].data(), others[1].size()}};
    const ponder_calibration report =
        calibrate(tiny_model("reference"), with, streams, held, goal, CallGuard(cancel, nullptr));
    EXPECT_EQ(report.target, 0.4);
    EXPECT_NEAR(report.rate, 0.4, 0.05);
    EXPECT_NEAR(report.held_rate, 0.4, 0.04);
    EXPECT_NEAR(report.share[0] + report.share[1] + report.share[2] + report.share[3], 1, 1e-9);
    Session session(tiny_model("reference"), with);
    session.expect(20);
    session.feed(others[0]);
    session.adapt(no_limits(session));
    EXPECT_LE(session.info().steps, 8u);
    EXPECT_GE(session.info().steps, 7u);
    // The operating point is an option.
    Session more(tiny_model("reference"),
                 gate_options({{"adapter", folder()}, {"policy.target_rate", "0.8"}}));
    more.expect(20);
    more.feed(others[0]);
    more.adapt(no_limits(more));
    EXPECT_LE(more.info().steps, 16u);
    EXPECT_GE(more.info().steps, 14u);
}

TEST_F(Trained, HostileFoldersAreRefused) {
    GateTrainer trainer(tiny_model("reference"), options);
    train(trainer, 1);
    trainer.export_to(folder());
    const std::string file = folder() + "/ponder.json", good = read_file(file, 1 << 20);
    const auto with = [&](const std::string &from, const std::string &to) {
        std::string text = good;
        const size_t at = text.find(from);
        EXPECT_NE(at, std::string::npos) << from;
        text.replace(at, from.size(), to);
        replace_file(file, [&](const Sink &sink) { sink(text.data(), text.size()); });
    };
    const auto refused = [&](ponder_status status, const char *words) {
        expect_error(status, {words}, [&] {
            Session session(tiny_model("reference"), gate_options({{"adapter", folder()}}));
        });
    };
    with("\"form\": \"steps\"", "\"form\": \"guess\"");
    refused(PONDER_E_FORMAT, "form");
    with("\"form\": \"steps\"", "\"form\": \"soft\"");
    refused(PONDER_E_FORMAT, "gate.head");
    with("\"hidden\": 8", "\"hidden\": 4000");
    refused(PONDER_E_FORMAT, "gate.fc1");
    with("\"hidden\": 8", "\"hidden\": 1e300");
    refused(PONDER_E_FORMAT, "hidden");
    with("\"features\": \"planned\"", "\"features\": \"ponder\"");
    refused(PONDER_E_FORMAT, "gate.");
    with("\"front\": 0.7", "\"front\": 9");
    refused(PONDER_E_FORMAT, "front");
    with("\"rates\": [", "\"rates\": [7, ");
    refused(PONDER_E_FORMAT, "thresholds");
    with("\"offset\": [", "\"offset\": [0, ");
    refused(PONDER_E_FORMAT, "offset");
    with("\"calibration\": {", "\"calibratiom\": {");
    refused(PONDER_E_FORMAT, "calibration");
    with("\"gate\": {", "\"gatf\": {");
    refused(PONDER_E_STATE, "no gate");
    with("\"gate\": {", "\"gate\": 3, \"x\": {");
    refused(PONDER_E_FORMAT, "gate");
}

// ---- The rule that policies, the reference and devices share: by hand

TEST(Rule, ControlsTheThreshold) {
    const auto policy = parse_policy("ema:loss:0.25");
    Random random(0);
    const auto decide = [&](double loss) {
        Situation s;
        s.signals.loss = loss;
        return policy->decide(s, random);
    };
    for (const double loss : {3.0, 8.0, 1.0, 6.0, 2.0, 7.0, 4.0, 5.0}) {
        const Decision d = decide(loss);
        EXPECT_TRUE(d.update && d.calibrating && std::isnan(d.threshold)) << loss;
        EXPECT_EQ(d.score, loss);
    }
    // Of 1..8 a quarter lies above 6 + 0.25.
    Decision d = decide(7);
    EXPECT_TRUE(d.update && !d.calibrating);
    EXPECT_EQ(d.threshold, 6.25);
    EXPECT_NEAR(policy->state()[0], 0.325, 1e-15);    // 0.9 x 0.25 + 0.1
    EXPECT_NEAR(policy->state()[1], 6.296875, 1e-14); // 6.25 (1 + 0.1 (0.325 - 0.25))
    d = decide(6.28);
    EXPECT_FALSE(d.update);
    EXPECT_NEAR(policy->state()[0], 0.2925, 1e-15);
    EXPECT_NEAR(policy->state()[1], 6.32363671875, 1e-14);
    EXPECT_FALSE(decide(NAN).update);

    // A chunk without a signal counts among the first, with nothing: 1, 3, 5, 7 are left.
    const auto sparse = parse_policy("ema:loss:0.5");
    constexpr double none = NAN;
    for (const double loss : {none, 7.0, none, 1.0, none, 5.0, none, 3.0}) {
        Situation s;
        s.signals.loss = loss;
        EXPECT_TRUE(sparse->decide(s, random).update);
    }
    EXPECT_EQ(sparse->state()[1], 4);
}

TEST(Rule, ThresholdsAreExceeded) {
    const auto policy = parse_policy("threshold:entropy:2");
    Random random(0);
    for (const auto &[entropy, update] : {std::pair(1.0, false), {2.0, false}, {2.1, true}}) {
        Situation s;
        s.signals.entropy = entropy;
        const Decision d = policy->decide(s, random);
        EXPECT_EQ(d.update, update) << entropy;
        EXPECT_FALSE(d.calibrating);
        EXPECT_EQ(d.threshold, 2);
    }
    const Decision unknown = policy->decide({}, random);
    EXPECT_TRUE(unknown.update && unknown.calibrating);
}

TEST(Rule, ABudgetGrantsWhatItHas) {
    Budget budget(0.5, 2);
    std::vector<int64_t> granted;
    for (const int64_t wanted : {3, 1, 1, 0, 4, 1})
        granted.push_back(budget.grant(wanted));
    EXPECT_EQ(granted, (std::vector<int64_t>{2, 0, 1, 0, 1, 0}));
    EXPECT_EQ(budget.left(), 0.5);
    Budget off(INFINITY, 0);
    EXPECT_EQ(off.grant(7), 7);
}

// ---- The oracle

TEST(Oracle, HasNoLayersThatLearnInside) {
    expect_error(PONDER_E_ARGUMENT, {"oracle:0.5"}, [&] {
        Session(tiny_model("reference"),
                gate_options({{"adapter", "ttt-linear"}, {"policy", "oracle:0.5"}}));
    });
}

TEST(Oracle, SpendsItsTargetAndSaysThatItIsNotCausal) {
    const std::vector<int32_t> ids = random_tokens(16 * 16, 5);
    Session session(tiny_model("reference"), gate_options({{"policy", "oracle:0.5"}}));
    session.expect(16);
    session.feed(ids);
    session.adapt(no_limits(session));
    EXPECT_LE(session.info().steps, 8u);
    EXPECT_GE(session.info().steps, 4u);
    for (const ponder_record &record : session.records())
        EXPECT_TRUE(record.flags & PONDER_RECORD_NOT_CAUSAL);
}

} // namespace
} // namespace ponder::test
