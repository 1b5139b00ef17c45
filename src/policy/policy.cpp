#include "policy/policy.hpp"

#include "base/error.hpp"
#include "ponder/gate_rule.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>

namespace ponder {

namespace {

bool all_finite(std::span<const double> values) {
    return std::ranges::all_of(values, [](double x) { return std::isfinite(x); });
}

struct Always final : Policy {
    Decision decide(const Situation &, Random &) override { return {true}; }
};

struct Skip final : Policy {
    Decision decide(const Situation &, Random &) override { return {}; }
    bool never() const override { return true; }
};

struct Every final : Policy {
    explicit Every(double n) : n(uint64_t(n)) {}
    Decision decide(const Situation &s, Random &) override { return {s.chunk % n == 0}; }
    const uint64_t n;
};

struct First final : Policy {
    explicit First(double share) : share(share) {}
    bool needs_length() const override { return true; }
    Decision decide(const Situation &s, Random &) override {
        return {double(s.chunk) < share * double(s.expected)};
    }
    const double share;
};

struct Chance final : Policy {
    explicit Chance(double probability) : probability(probability) {}
    Decision decide(const Situation &, Random &random) override {
        return {random.uniform() < probability};
    }
    const double probability;
};

// Those that devices know too.
class Ruled : public Policy {
public:
    explicit Ruled(Signal signal) : signal_(signal) {}
    Decision decide(const Situation &s, Random &) override {
        const bool update = ponder_gate_decide(&gate_, s.signals.of(signal_));
        return {update, gate_.calibrating != 0, gate_.score, gate_.compared};
    }
    Signal reads() const override { return signal_; }
    bool to_device(ponder_gate &g) const override {
        g = gate_;
        switch (signal_) {
        case Signal::loss:
            g.signal = PONDER_GATE_LOSS;
            return true;
        case Signal::entropy:
            g.signal = PONDER_GATE_ENTROPY;
            return true;
        case Signal::reconstruction:
            g.signal = PONDER_GATE_RECONSTRUCTION;
            return true;
        case Signal::update_norm:
            g.signal = PONDER_GATE_UPDATE_NORM;
            return true;
        case Signal::gradient_norm: // not known when a device decides
        case Signal::none:
            break;
        }
        return false;
    }
    void from_device(const ponder_gate &g) override { gate_ = g; }

protected:
    ponder_gate gate_{};

private:
    const Signal signal_;
};

struct Threshold final : Ruled {
    Threshold(Signal signal, double threshold) : Ruled(signal) {
        gate_.rule = PONDER_GATE_THRESHOLD;
        gate_.threshold = threshold;
    }
};

struct Ema final : Ruled {
    Ema(Signal signal, double rate) : Ruled(signal) {
        gate_.rule = PONDER_GATE_CONTROLLED;
        gate_.target = gate_.rate = rate;
        gate_.gain = 0.1;
    }
    std::vector<double> state() const override {
        std::vector<double> values{gate_.rate, gate_.threshold, double(gate_.seen)};
        values.insert(values.end(), gate_.first, gate_.first + gate_.count);
        return values;
    }
    bool set_state(const std::vector<double> &values) override {
        const double count = double(values.size()) - 3;
        if (count < 0 || !(values[2] >= count && values[2] <= PONDER_GATE_FIRST))
            return false;
        gate_.rate = values[0];
        gate_.threshold = values[1];
        gate_.seen = int64_t(values[2]);
        gate_.count = int64_t(count);
        std::copy(values.begin() + 3, values.end(), gate_.first);
        return true;
    }
};

// Greedy, and not causal: the steps that lower the loss of the coming chunks most at the price that
// spends the target. The price is the value that the wanted share of what was seen so far exceeds.
struct Oracle final : Policy {
    static constexpr uint64_t looks = 8; // chunks

    explicit Oracle(double rate) : target(rate) {}
    Decision decide(const Situation &, Random &) override { return {}; }
    bool looks_ahead() const override { return true; }
    uint64_t horizon() const override { return looks; }

    int32_t choose(const Situation &s, std::span<const int32_t> steps,
                   std::span<const double> losses) override {
        const bool declared = s.expected > s.chunk;
        // Early steps serve more chunks.
        const double chunks = double(declared ? s.expected : s.chunk + 1);
        const double weight = declared ? (chunks - double(s.chunk) - 1) / chunks : 1;
        const auto value = [&](size_t i) { return weight * (losses[0] - losses[i]); };
        double best = 0;
        for (size_t i = 1; i < steps.size(); ++i)
            best = std::max(best, value(i) / double(steps[i]));
        seen.push_back(best);
        const double left = target * chunks - spent;
        const double rest = declared ? chunks - double(s.chunk) : 1;
        std::vector<double> sorted = seen;
        std::sort(sorted.begin(), sorted.end());
        const double rate = std::clamp(left / rest, 0.0, 1.0);
        const double price = sorted[size_t((1 - rate) * double(sorted.size() - 1) + 0.5)];
        size_t choice = 0;
        double most = 0;
        for (size_t i = 1; i < steps.size(); ++i) {
            const double worth = value(i) - 0.999 * price * double(steps[i]);
            if (double(steps[i]) <= left + 1e-9 && worth > most) {
                most = worth;
                choice = i;
            }
        }
        spent += double(steps[choice]);
        return steps[choice];
    }
    std::vector<double> state() const override {
        std::vector<double> values{spent};
        values.insert(values.end(), seen.begin(), seen.end());
        return values;
    }
    bool set_state(const std::vector<double> &values) override {
        if (values.empty() || !all_finite(values))
            return false;
        spent = values[0];
        seen.assign(values.begin() + 1, values.end());
        return true;
    }

    const double target;
    double spent = 0;
    std::vector<double> seen;
};

[[noreturn]] void bad_policy(const std::string &text, const char *problem) {
    throw_error(PONDER_E_ARGUMENT, "policy '%.80s': %s", text.c_str(), problem);
}

Signal parse_signal(const std::string &text, const std::string &name) {
    static constexpr std::pair<const char *, Signal> names[] = {
        {"loss", Signal::loss},
        {"entropy", Signal::entropy},
        {"reconstruction", Signal::reconstruction},
        {"gradient_norm", Signal::gradient_norm},
        {"update_norm", Signal::update_norm}};
    for (const auto &[known, signal] : names)
        if (name == known)
            return signal;
    bad_policy(text, "the signal is none of loss, entropy, reconstruction, gradient_norm, "
                     "update_norm");
}

} // namespace

double Signals::of(Signal signal) const {
    switch (signal) {
    case Signal::loss:
        return loss;
    case Signal::entropy:
        return entropy;
    case Signal::reconstruction:
        return reconstruction;
    case Signal::gradient_norm:
        return gradient_norm;
    case Signal::update_norm:
        return update_norm;
    case Signal::none:
        break;
    }
    return std::numeric_limits<double>::quiet_NaN();
}

bool never_learns(const std::string &text) {
    return text != "adapter" && parse_policy(text)->never();
}

std::unique_ptr<Policy> parse_policy(const std::string &text) {
    std::vector<std::string> part(1);
    for (char c : text)
        if (c == ':')
            part.emplace_back();
        else
            part.back() += c;
    const std::string &name = part[0];
    const auto number = [&](double minimum, double maximum, bool whole = false) {
        const std::string &last = part.back();
        double value = 0;
        const char *end = last.data() + last.size();
        const auto [stop, problem] = std::from_chars(last.data(), end, value);
        if (problem != std::errc() || stop != end || !(value >= minimum && value <= maximum) ||
            (whole && value != std::floor(value)))
            bad_policy(text, "the number is missing or out of range");
        return value;
    };
    const auto expect = [&](size_t parts, const char *form) {
        if (part.size() != parts)
            bad_policy(text, form);
    };
    if (name == "skip")
        return expect(1, "takes nothing more"), std::make_unique<Skip>();
    if (name == "always")
        return expect(1, "takes nothing more"), std::make_unique<Always>();
    if (name == "every")
        return expect(2, "the form is every:N"), std::make_unique<Every>(number(1, 1e9, true));
    if (name == "first")
        return expect(2, "the form is first:P"), std::make_unique<First>(number(0, 1));
    if (name == "random")
        return expect(2, "the form is random:P"), std::make_unique<Chance>(number(0, 1));
    if (name == "threshold") {
        expect(3, "the form is threshold:SIGNAL:X");
        const Signal signal = parse_signal(text, part[1]);
        return std::make_unique<Threshold>(signal, number(-1e300, 1e300));
    }
    if (name == "ema") {
        expect(3, "the form is ema:SIGNAL:RATE");
        const Signal signal = parse_signal(text, part[1]);
        return std::make_unique<Ema>(signal, number(0, 1));
    }
    if (name == "oracle")
        return expect(2, "the form is oracle:RATE"), std::make_unique<Oracle>(number(0, 64));
    bad_policy(text, "no such policy; there are skip, always, every:N, first:P, random:P, "
                     "threshold:SIGNAL:X, ema:SIGNAL:RATE, oracle:RATE, adapter");
}

} // namespace ponder
