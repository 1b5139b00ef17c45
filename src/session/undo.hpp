// Takes a decision back when the call that made it fails.
#pragma once

#include "session/session.hpp"

namespace ponder {

class Session::Undo {
public:
    explicit Undo(Session &session)
        : session_(session), budget_(session.budget_), random_(session.random_),
          policy_(session.policy_->state()), scale_(session.scale_) {}
    ~Undo() {
        if (!armed_)
            return;
        session_.budget_ = budget_;
        session_.random_ = random_;
        session_.policy_->set_state(policy_);
        session_.scale_ = scale_;
    }
    void disarm() { armed_ = false; }

private:
    Session &session_;
    Budget budget_;
    Random random_;
    std::vector<double> policy_;
    double scale_;
    bool armed_ = true;
};

} // namespace ponder
