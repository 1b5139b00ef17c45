// Gates: features, network, policy, training, calibration.
#include "policy/gate.hpp"
#include "policy/policy.hpp"
#include "support.hpp"

#include <gtest/gtest.h>

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

} // namespace
} // namespace ponder::test
