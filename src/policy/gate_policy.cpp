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
    void learned(const ponder_record &record) override {
        tracker_.learned(record.steps, record.update_norm, record.gradient_norm);
    }

    std::vector<double> features(const Situation &s) const override {
        return tracker_.features({s.chunk, s.expected, s.budget_left, target_});
    }

    Decision decide(const Situation &s, Random &) override {
        const Calibration &c = gate_->calibration;
        Decision d;
        d.scale =
            std::clamp(c.scale * (1 + c.slope * (tracker_.mean_loss() - c.reference)), 0.25, 4.0);
        const double spent = tracker_.steps();
        const bool declared = s.expected > s.chunk;
        const double chunks = double(declared ? s.expected : s.chunk + 1);
        // Steps that may still be spent: an undeclared stream borrows from the next few chunks.
        const double left = target_ * (declared ? chunks : chunks + borrowed) - spent;
        if (tracker_.chunks() == 0) { // a layer that decides before its first pass looks
            d.update = d.calibrating = true;
            return d;
        }
        const std::vector<double> outputs = gate_->evaluate(features(s));
        // How dense steps should be from here on, and the price of one at that density.
        double rate = target_ + feedback * (target_ * double(s.chunk) - spent);
        if (declared) // after its last chunk nothing is left to gain
            rate = spent < c.front * target_ * chunks
                       ? most_rate
                       : left / std::max(chunks - 1 - double(s.chunk), 1.0);
        d.threshold = c.threshold(std::max(rate, 0.0));
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

    std::vector<double> state() const override { return tracker_.state(); }
    void set_state(const std::vector<double> &values) override {
        if (!tracker_.set_state(values))
            throw_error(PONDER_E_FORMAT, "gate state has %zu values", values.size());
    }

private:
    static constexpr double feedback = 0.5; // a chunk's rate for each step that is off the plan
    static constexpr double borrowed = 3;   // chunks
    static constexpr double most_rate = 1e9;

    std::shared_ptr<const Gate> gate_;
    double target_;
    FeatureTracker tracker_;
};

} // namespace

std::unique_ptr<Policy> make_gate_policy(std::shared_ptr<const Gate> gate, double target) {
    return std::make_unique<GatePolicy>(std::move(gate), target);
}

} // namespace ponder
