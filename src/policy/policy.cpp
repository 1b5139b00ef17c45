#include "policy/policy.hpp"

#include "base/error.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>

namespace ponder {

namespace {

// The signals that a device can read; the norm of a gradient is not known when it decides.
bool signal_to_device(Signal signal, ponder_gate &g) {
    switch (signal) {
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
    case Signal::gradient_norm:
    case Signal::none:
        break;
    }
    return false;
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
    Decision decide(const Situation &s, Random &) override {
        if (s.expected == 0)
            throw_error(PONDER_E_STATE, "policy 'first' needs the stream's length in chunks "
                                        "(ponder_session_expect)");
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

struct Threshold final : Policy {
    Threshold(Signal signal, double threshold) : signal(signal), threshold(threshold) {}
    Decision decide(const Situation &s, Random &) override {
        const double score = s.signals.of(signal);
        // A layer that decides before its first pass knows nothing yet and looks.
        return {std::isnan(score) || score > threshold, std::isnan(score), score, threshold};
    }
    Signal reads() const override { return signal; }
    bool to_device(ponder_gate &g) const override {
        g.rule = PONDER_GATE_THRESHOLD;
        g.threshold = threshold;
        return signal_to_device(signal, g);
    }
    const Signal signal;
    const double threshold;
};

// PonderTTT's controller (arXiv 2601.00894): a threshold from the first chunks' quantile, then
// proportional control of the running rate r towards the target.
struct Ema final : Policy {
    static constexpr size_t calibration = 8;
    static constexpr double gain = 0.1;

    Ema(Signal signal, double rate) : signal(signal), target(rate), rate(rate) {}

    Decision decide(const Situation &s, Random &) override {
        const double score = s.signals.of(signal);
        if (seen < calibration) {
            if (!std::isnan(score))
                first.push_back(score);
            if (++seen == calibration)
                threshold = quantile(1 - target);
            return {true, true, score};
        }
        const Decision decision{score > threshold, false, score, threshold};
        rate = (1 - gain) * rate + gain * decision.update;
        threshold += gain * (rate - target) * std::abs(threshold);
        return decision;
    }

    // Linear between order statistics.
    double quantile(double q) {
        if (first.empty())
            return 0;
        std::sort(first.begin(), first.end());
        const double at = q * double(first.size() - 1);
        const size_t low = size_t(at), high = std::min(low + 1, first.size() - 1);
        return first[low] + (at - double(low)) * (first[high] - first[low]);
    }

    Signal reads() const override { return signal; }
    bool to_device(ponder_gate &g) const override {
        static_assert(calibration == PONDER_GATE_FIRST);
        g.rule = PONDER_GATE_CONTROLLED;
        g.target = target;
        g.gain = gain;
        g.rate = rate;
        g.threshold = threshold;
        g.seen = int64_t(seen);
        g.count = int64_t(first.size());
        std::copy(first.begin(), first.end(), g.first);
        return signal_to_device(signal, g);
    }
    void from_device(const ponder_gate &g) override {
        rate = g.rate;
        threshold = g.threshold;
        seen = size_t(g.seen);
        first.assign(g.first, g.first + g.count);
    }
    std::vector<double> state() const override {
        std::vector<double> values{rate, threshold, double(seen)};
        values.insert(values.end(), first.begin(), first.end());
        return values;
    }
    void set_state(const std::vector<double> &values) override {
        if (values.size() < 3 || values.size() > 3 + calibration)
            throw_error(PONDER_E_FORMAT, "policy state has %zu values", values.size());
        rate = values[0];
        threshold = values[1];
        seen = size_t(std::clamp(values[2], 0.0, double(calibration)));
        first.assign(values.begin() + 3, values.end());
    }

    const Signal signal;
    const double target;
    double rate, threshold = 0;
    size_t seen = 0;
    std::vector<double> first;
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
    void set_state(const std::vector<double> &values) override {
        if (values.empty())
            throw_error(PONDER_E_FORMAT, "policy state is empty");
        spent = values[0];
        seen.assign(values.begin() + 1, values.end());
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
