// What an open chunk would be worth: forks try it on what comes next. For oracles and for training
// gates; never for a score that counts.
#include "base/error.hpp"
#include "session/session.hpp"

#include <limits>

namespace ponder {

std::vector<Session::After> Session::losses_after(std::span<const int32_t> steps, uint64_t horizon,
                                                  bool own, const CallGuard &guard) const {
    const std::vector<std::byte> now = save();
    const std::unique_ptr<Session> fork = this->fork();
    std::vector<After> losses;
    for (const int32_t k : steps) {
        fork->load(now, "fork");
        // Decided by hand; the policy's state in the snapshot is not needed again.
        fork->policy_ = parse_policy(inside_ && k > 0 ? "always" : "random:0");
        fork->open_pass_.reset();
        fork->tape_ = false;
        fork->budget_ = Budget(std::numeric_limits<double>::infinity(), 0);
        fork->loss_after_ = own;
        After after{0, records_.back().loss_before};
        if (fork->open_) {
            fork->learn(inside_ ? 0 : k, guard);
            if (own && fork->records_.back().steps > 0)
                after.own = fork->records_.back().loss_after;
        }
        uint64_t chunks = 0;
        for (; chunks < horizon && fork->score(guard); ++chunks) {
            after.later += fork->records_.back().loss_before;
            if (inside_ && chunks == 0 && k > 0)
                after.own = fork->records_.back().reconstruction;
            fork->learn(0, guard);
            fork->policy_ = parse_policy("random:0");
        }
        after.later =
            chunks > 0 ? after.later / double(chunks) : std::numeric_limits<double>::quiet_NaN();
        losses.push_back(after);
    }
    return losses;
}

// An oracle's number of steps.
int32_t Session::look_ahead(ponder_record &record, const CallGuard &guard) {
    record.flags |= PONDER_RECORD_NOT_CAUSAL;
    static constexpr int32_t tried[] = {0, 1, 2, 4};
    const uint64_t horizon = std::min(policy_->horizon(), chunks_waiting());
    std::vector<double> losses(std::size(tried), 0.0); // nothing comes: nothing is gained
    if (horizon > 0) {
        const std::vector<After> after = losses_after(tried, horizon, false, guard);
        for (size_t i = 0; i < after.size(); ++i)
            losses[i] = after[i].later;
    }
    return policy_->choose({record.chunk, expected_, signals_, budget_.left()}, tried, losses);
}

} // namespace ponder
