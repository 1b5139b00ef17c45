// A gate's scores against a moving threshold that holds the realised cost at its target.
#include "base/error.hpp"
#include "policy/gate.hpp"
#include "policy/policy.hpp"

#include <algorithm>
#include <cmath>

namespace ponder {

namespace {

class GatePolicy final : public Policy {
public:
    GatePolicy(std::shared_ptr<const Gate> gate, double target)
        : gate_(std::move(gate)), target_(target > 0 ? target : gate_->calibration.target),
          tracker_(gate_->features) {}

    bool observes() const override { return true; }
    void observe(const Observation &observation) override { tracker_.observe(observation); }
    std::vector<size_t> probability_rows(size_t tokens) const override {
        return ponder::probability_rows(gate_->features, tokens);
    }
    void learned(const ponder_record &record) override {
        tracker_.learned(record.steps, record.update_norm, record.gradient_norm);
    }

    std::vector<double> features(const Situation &s) const override {
        return tracker_.features({s.chunk, s.expected, s.budget_left, target_});
    }

    Decision decide(const Situation &s, Random &) override {
        const Calibration &c = gate_->calibration;
        Decision d;
        const double spent = tracker_.steps();
        const bool declared = s.expected > s.chunk;
        const double chunks = double(declared ? s.expected : s.chunk + 1);
        const double progress = declared ? std::min(spent / (target_ * chunks), 1.0) : 0.5;
        d.scale = c.scale + (c.scale_last - c.scale) * progress;
        // Steps that may still be spent: an undeclared stream borrows from the next few chunks.
        const double left = target_ * (declared ? chunks : chunks + borrowed) - spent;
        if (tracker_.chunks() == 0) { // a layer that decides before its first pass looks
            d.update = d.calibrating = true;
            return d;
        }
        const std::vector<double> outputs = gate_->evaluate(features(s));
        // How dense steps should be from here on, and the price of one at that density.
        double rate = target_ + feedback * (target_ * double(s.chunk) - spent);
        const double front = c.front + c.front_slope * (tracker_.mean_loss() - c.reference);
        if (declared) // after its last chunk nothing is left to gain
            rate = spent < std::min(front, 1.0) * target_ * chunks
                       ? most_rate
                       : left / std::max(chunks - 1 - double(s.chunk), 1.0);
        scores_.push_back(gate_->choose(outputs, 0).score);
        if (scores_.size() > memory)
            scores_.erase(scores_.begin());
        d.threshold = threshold(std::max(rate, 0.0));
        const Gate::Choice choice = gate_->choose(outputs, d.threshold);
        d.score = choice.score;
        d.steps = choice.steps;
        d.update = d.steps != 0;
        if (gate_->form == GateForm::soft)
            d.scale *= sigmoid(outputs[0]);
        const double least = declared ? 1 : 0.5; // a declared stream stays within its target
        if (rate <= 0 || left < least || (declared && s.chunk + 1 == s.expected)) {
            d.update = false;
            d.steps = 0;
        } else if (d.steps > 0) {
            d.steps = std::min(d.steps, std::max(1, int32_t(left)));
        }
        return d;
    }

    // How many scores, the scores, the features' state.
    std::vector<double> state() const override {
        std::vector<double> values{double(scores_.size())};
        values.insert(values.end(), scores_.begin(), scores_.end());
        const std::vector<double> tracked = tracker_.state();
        values.insert(values.end(), tracked.begin(), tracked.end());
        return values;
    }
    bool set_state(const std::vector<double> &values) override {
        const std::span<const double> all(values);
        if (all.empty() || !(all[0] >= 0 && all[0] <= double(all.size() - 1)))
            return false;
        const std::span<const double> scores = all.subspan(1, size_t(all[0]));
        if (!std::ranges::all_of(scores, [](double x) { return std::isfinite(x); }) ||
            !tracker_.set_state(all.subspan(1 + size_t(all[0]))))
            return false;
        scores_.assign(scores.begin(), scores.end());
        return true;
    }

private:
    // Scores differ from stream to stream more than within one: the calibrated threshold gives way
    // to the quantile of the stream's own scores.
    double threshold(double rate) const {
        const double calibrated = gate_->calibration.threshold(rate);
        if (rate >= 1)
            return calibrated;
        std::vector<double> sorted = scores_;
        std::sort(sorted.begin(), sorted.end());
        const double at = (1 - rate) * double(sorted.size() - 1);
        const size_t low = size_t(at), high = std::min(low + 1, sorted.size() - 1);
        const double own = sorted[low] + (at - double(low)) * (sorted[high] - sorted[low]);
        const double known = double(sorted.size() - 1), weight = known / (known + prior);
        return calibrated + weight * (own - calibrated);
    }

    static constexpr double feedback = 0.5; // a chunk's rate for each step that is off the plan
    static constexpr double borrowed = 3;   // chunks
    static constexpr double most_rate = 1e9;

    static constexpr double prior = 4;    // scores that the calibration counts for
    static constexpr size_t memory = 256; // scores

    std::shared_ptr<const Gate> gate_;
    std::vector<double> scores_;
    double target_;
    FeatureTracker tracker_;
};

} // namespace

std::unique_ptr<Policy> make_gate_policy(std::shared_ptr<const Gate> gate, double target) {
    return std::make_unique<GatePolicy>(std::move(gate), target);
}

} // namespace ponder
