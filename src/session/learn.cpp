// The open chunk is decided on and learned from: steps on a shadow of the fast weights, which takes
// their place if it is finite and near enough.
#include "session/undo.hpp"

#include "base/error.hpp"

#include <cmath>
#include <limits>

namespace ponder {

// The policy's wish, then what the budget grants: record.steps.
int32_t Session::decide(int32_t forced, ponder_record &record) {
    Decision decision;
    if (forced < 0) {
        require_length();
        decision = policy_->decide({record.chunk, expected_, signals_, budget_.left()}, random_);
        record.gate_score = decision.score;
        record.gate_threshold = decision.threshold;
        if (decision.calibrating)
            record.flags |= PONDER_RECORD_CALIBRATING;
    }
    // A TTT layer takes its own steps in the pass. Steps that the host gave hold for any policy.
    const bool chooses = decision.steps >= 0 && !options_.given("steps");
    const int64_t each = inside_ ? 1 : chooses ? decision.steps : steps_;
    scale_ = decision.scale;
    const int64_t wanted = forced >= 0 ? forced : decision.update ? each : 0;
    const bool can = adapted_->adapter().fast_count() > 0;
    const int64_t granted = budget_.grant(can ? wanted : 0);
    if (can && granted < wanted)
        record.flags |= PONDER_RECORD_OVER_BUDGET;
    record.steps = int32_t(granted);
    return int32_t(wanted);
}

bool Session::accept(double update_norm) const {
    return std::isfinite(update_norm) && update_norm <= guard_norm_;
}

void Session::require_steps(int32_t forced) const {
    if (open_ && !inside_ && forced > 0 && policy_->never())
        throw_error(PONDER_E_STATE,
                    "steps = %d under policy skip; a host that decides itself "
                    "uses policy always",
                    forced);
}

void Session::learn(int32_t forced, const CallGuard &guard) {
    if (!open_)
        return;
    ponder_record record = records_.back();
    if (inside_) {
        learn_inside(record);
    } else {
        require_steps(forced);
        Undo undo(*this);
        if (records_gradients())
            ensure_tape(guard);
        const uint64_t start = now_ns();
        if (policy_->looks_ahead() && forced < 0)
            forced = look_ahead(record, guard);
        if (policy_->reads() == Signal::gradient_norm && forced < 0) {
            run_backward(current_, guard);
            gradient_ready_ = true;
            record.flops += open_pass_->program->flops(learn_segment);
            rule_->norm(gradient_.data(), workspace_.data());
            record.gradient_norm = signals_.gradient_norm = rule_->numbers(workspace_.data()).norm;
        }
        record.steps_wanted = decide(forced, record);
        const uint64_t decided = now_ns();
        record.decide_ns += decided - start;
        learn_between(record.steps, record, guard);
        undo.disarm();
        record.learn_ns = now_ns() - decided;
    }
    finish(record);
}

void Session::learn_between(int32_t steps, ponder_record &record, const CallGuard &guard) {
    const Program *program = open_pass_ ? open_pass_->program.get() : nullptr;
    bool finite = true;
    for (int32_t k = 0; k < steps && finite; ++k) {
        const FastState &old = k == 0 ? current_ : shadow_;
        if (k > 0) {
            run_score(shadow_, later_nll_, guard);
            record.flops += program->flops(score_segment);
            record.loss_after = mean(later_nll_);
        }
        if (!gradient_ready_) {
            run_backward(old, guard);
            record.flops += program->flops(learn_segment);
        }
        gradient_ready_ = false;
        guard.check();
        rule_->step(old.view(), shadow_.view(), gradient_.data(),
                    optimizer_steps_ + uint64_t(k) + 1, workspace_.data());
        if (k + 1 == steps)
            break; // its norm is read with the distance
        const double norm = rule_->numbers(workspace_.data()).norm;
        if (k == 0)
            record.gradient_norm = norm;
        finite = std::isfinite(norm);
    }
    if (steps > 0) {
        apply_scale();
        rule_->distance(shadow_.weights(), current_.weights(), workspace_.data());
        const UpdateRule::Numbers numbers = rule_->numbers(workspace_.data());
        if (steps == 1)
            record.gradient_norm = numbers.norm;
        finite = finite && std::isfinite(numbers.norm);
        record.update_norm = numbers.distance;
        if (finite && accept(record.update_norm)) {
            if (loss_after_) {
                run_score(shadow_, later_nll_, guard);
                record.flops += program->flops(score_segment);
                record.loss_after = mean(later_nll_);
            }
            current_.swap(shadow_);
            ++weights_version_;
            optimizer_steps_ += uint64_t(steps);
            record.flags |= PONDER_RECORD_UPDATED;
            signals_.update_norm = record.update_norm;
        } else {
            record.flags |= PONDER_RECORD_ROLLED_BACK;
            record.loss_after = std::numeric_limits<double>::quiet_NaN();
        }
    }
    tape_ = false;
}

// The shadow's distance from the weights of now, scaled.
void Session::apply_scale() {
    if (scale_ == 1)
        return;
    rule_->rescale(current_.weights(), shadow_.weights(), scale_, gradient_.data(),
                   workspace_.data());
}

void Session::learn_inside(ponder_record &record) {
    const uint64_t start = now_ns();
    if (record.steps > 0) {
        std::atomic<bool> never{false};
        ensure_tape(CallGuard(never, nullptr)); // after a restore
        apply_scale();
        rule_->distance(shadow_.weights(), current_.weights(), workspace_.data());
        record.update_norm = rule_->numbers(workspace_.data()).distance;
        if (accept(record.update_norm)) {
            if (carry_) {
                current_.swap(shadow_);
                ++weights_version_;
            }
            record.flags |= PONDER_RECORD_UPDATED;
            signals_.update_norm = record.update_norm;
        } else {
            record.flags |= PONDER_RECORD_ROLLED_BACK;
        }
    }
    tape_ = false;
    record.learn_ns = now_ns() - start;
}

void Session::finish(ponder_record &record) {
    record.flags &= ~uint32_t(PONDER_RECORD_SCORED_ONLY);
    updated_ += (record.flags & PONDER_RECORD_UPDATED) != 0;
    steps_taken_ += uint64_t(record.steps);
    record.update_rate = double(updated_) / double(record.chunk + 1);
    policy_->learned(record);
    records_.back() = record;
    open_ = false;
    open_pass_.reset();
}

} // namespace ponder
