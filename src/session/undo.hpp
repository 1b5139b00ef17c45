// Takes back what a call has changed that fails: the decision, the open chunk and its losses.
#pragma once

#include "session/session.hpp"

#include <algorithm>

namespace ponder {

class Session::Undo {
public:
    explicit Undo(Session &session)
        : session_(session), budget_(session.budget_), random_(session.random_),
          policy_(session.policy_->state()), signals_(session.signals_), scale_(session.scale_),
          open_ids_(session.open_ids_), open_tokens_(session.open_tokens_),
          ran_inside_(session.ran_inside_), nll_(session.nll_), entropy_(session.entropy_) {
        std::copy_n(session.reconstruction_, 3, reconstruction_);
    }
    ~Undo() {
        if (!armed_)
            return;
        session_.budget_ = budget_;
        session_.random_ = random_;
        session_.policy_->set_state(policy_);
        session_.signals_ = signals_;
        session_.scale_ = scale_;
        session_.open_ids_.swap(open_ids_);
        session_.open_tokens_ = open_tokens_;
        session_.ran_inside_ = ran_inside_;
        session_.nll_.swap(nll_);
        session_.entropy_.swap(entropy_);
        std::copy_n(reconstruction_, 3, session_.reconstruction_);
        session_.tape_ = false;
    }
    void disarm() { armed_ = false; }

private:
    Session &session_;
    Budget budget_;
    Random random_;
    std::vector<double> policy_;
    Signals signals_;
    double scale_;
    std::vector<int32_t> open_ids_;
    int64_t open_tokens_;
    bool ran_inside_;
    std::vector<float> nll_, entropy_;
    float reconstruction_[3];
    bool armed_ = true;
};

} // namespace ponder
