#include "session/ahead.hpp"

#include "session/undo.hpp"

#include "base/error.hpp"

#include <cmath>
#include <cstring>

namespace ponder {

std::unique_ptr<Session::Ahead> Session::Ahead::make(Session &session) {
    const Device &device = *session.model_->device();
    const Policy &policy = *session.policy_;
    ponder_gate gate{};
    const bool scheduled = policy.reads() == Signal::none;
    if (!scheduled && session.adapted_->adapter().fast_count() == 0)
        return nullptr; // nothing could be granted
    if (device.on_host() || !device.has_mailboxes() || policy.observes() || policy.looks_ahead() ||
        session.analysis_ || session.loss_after_ ||
        (!scheduled && (!device.can_record_if() || !policy.to_device(gate))))
        return nullptr;
    return std::make_unique<Ahead>(session, scheduled);
}

Session::Ahead::Ahead(Session &session, bool scheduled)
    : s_(session), scheduled_(scheduled), work_(session, scheduled),
      results_(work_.sent_bytes() / sizeof(float)) {
    for (size_t i = 0; i < most_under_way; ++i)
        mailboxes_.emplace_back(s_.model_->device(), work_.sent_bytes());
}

Session::Ahead::~Ahead() = default;

bool Session::Ahead::run(const CallGuard &guard, uint64_t total) {
    bool any = false;
    last_ns_ = now_ns();
    try {
        while (queue_next(guard)) {
            any = true;
            if (sent_.size() < most_under_way)
                continue;
            collect();
            guard.progress(total - s_.waiting_.size() - sent_.size() * size_t(s_.chunk_), total);
        }
        settle();
    } catch (...) {
        try {
            settle();
        } catch (...) { // for the reason that is thrown already
            lose();
        }
        throw;
    }
    if (any)
        guard.progress(total - s_.waiting_.size(), total);
    return any;
}

// Decides where the host can, and queues a chunk. Nothing has changed where it returns false.
bool Session::Ahead::queue_next(const CallGuard &guard) {
    const int64_t chunk = s_.chunk_;
    if (int64_t(s_.waiting_.size()) < chunk)
        return false;
    guard.check();
    Undo undo(s_);
    Sent sent{s_.new_record(chunk), nullptr, nullptr, ChunkWork::by_rule};
    if (scheduled_) {
        sent.record.steps_wanted = s_.decide(-1, sent.record);
        sent.told = sent.record.steps;
    }
    work_.plan(sent.told);
    const int64_t all = s_.context_tokens(chunk) + chunk;
    const auto pass = [&](bool inside) {
        const auto p = s_.adapted_->pass(s_.shape(all, chunk, inside), true);
        s_.reserve(*p);
        return p;
    };
    sent.pass = pass(s_.inside_ && sent.told != 0);
    if (s_.inside_ && !scheduled_)
        sent.skipped = pass(false);
    const ChunkWork::Kind kind{sent.pass, sent.skipped, sent.told};
    if (!work_.expects(kind))
        return false;
    s_.open_next(chunk);
    s_.upload_inputs();
    if (!on_device_)
        work_.write_state(gate_ = state_of_stream());
    if (!work_.queue(kind))
        return false;
    on_device_ = true;
    work_.send(mailboxes_[(first_sent_ + sent_.size()) % most_under_way]);
    undo.disarm();
    s_.take(chunk);
    sent_.push_back(std::move(sent));
    return true;
}

void Session::Ahead::settle() {
    while (!sent_.empty())
        collect();
    if (on_device_)
        state_to_stream();
    on_device_ = false;
}

// The oldest chunk under way becomes a record.
void Session::Ahead::collect() {
    mailboxes_[first_sent_ % most_under_way].receive(results_.data(), work_.sent_bytes());
    s_.append(sent_.front().record);
    ++first_sent_;
    const Sent sent = std::move(sent_.front());
    sent_.pop_front();
    std::memcpy(&gate_, results_.data() + work_.layout().state, sizeof gate_);
    ponder_record record = sent.record;
    fill(record, sent);
    const uint64_t now = now_ns();
    record.score_ns = now - last_ns_;
    last_ns_ = now;
    s_.finish(record);
}

// What is under way will not arrive: the device has failed. The stream has moved on, its last chunk
// has no losses.
void Session::Ahead::lose() {
    sent_.clear();
    on_device_ = false;
    s_.open_ids_.clear();
    s_.open_tokens_ = 0;
}

void Session::Ahead::fill(ponder_record &record, const Sent &sent) {
    const ChunkWork::Layout &at = work_.layout();
    const size_t tokens = size_t(s_.chunk_);
    const bool told = sent.told != ChunkWork::by_rule;
    if (!told) {
        record.steps_wanted = int32_t(gate_.wanted);
        record.steps = int32_t(gate_.granted);
        record.gate_score = gate_.score;
        record.gate_threshold = gate_.compared;
        if (gate_.calibrating)
            record.flags |= PONDER_RECORD_CALIBRATING;
        if (gate_.granted < gate_.wanted)
            record.flags |= PONDER_RECORD_OVER_BUDGET;
    }
    s_.open_tokens_ = s_.chunk_;
    std::copy_n(results_.data() + at.losses, tokens, s_.nll_.begin());
    std::copy_n(results_.data() + at.entropies, tokens, s_.entropy_.begin());
    record.loss_before = s_.signals_.loss = s_.mean(s_.nll_);
    record.entropy = s_.signals_.entropy = s_.mean(s_.entropy_);
    record.bytes = s_.arena_.size() + s_.workspace_.size();
    const bool updates = record.steps > 0;
    s_.ran_inside_ = s_.inside_ && updates;
    if (s_.ran_inside_) {
        std::copy_n(results_.data() + at.reconstruction, 3, s_.reconstruction_);
        record.reconstruction = s_.signals_.reconstruction = s_.reconstruction_[1];
    }
    const Program &program = *(updates || !sent.skipped ? sent.pass : sent.skipped)->program;
    record.flops = program.flops(score_segment);
    if (!updates)
        return;
    if (!s_.inside_)
        record.flops += uint64_t(record.steps) * program.flops(learn_segment) +
                        uint64_t(record.steps - 1) * program.flops(score_segment);
    record.gradient_norm = gate_.gradient_norm;
    record.update_norm = gate_.update_norm;
    if (!gate_.accepted) {
        record.flags |= PONDER_RECORD_ROLLED_BACK;
        return;
    }
    record.flags |= PONDER_RECORD_UPDATED;
    s_.signals_.update_norm = record.update_norm;
    s_.weights_version_ += !s_.inside_ || s_.carry_;
    if (record.steps > 1) {
        std::copy_n(results_.data() + at.later, tokens, s_.later_nll_.begin());
        record.loss_after = s_.mean(s_.later_nll_);
    }
}

ponder_gate Session::Ahead::state_of_stream() const {
    ponder_gate g{};
    if (!scheduled_)
        s_.policy_->to_device(g);
    g.steps = s_.inside_ ? 1 : s_.steps_;
    g.budget_rate = s_.options_.number("budget.rate");
    g.budget_burst = s_.options_.number("budget.burst");
    g.budget_left = s_.budget_.off() ? 0 : s_.budget_.left();
    g.guard_norm = s_.guard_norm_;
    g.signals[PONDER_GATE_LOSS] = s_.signals_.loss;
    g.signals[PONDER_GATE_ENTROPY] = s_.signals_.entropy;
    g.signals[PONDER_GATE_RECONSTRUCTION] = s_.signals_.reconstruction;
    g.signals[PONDER_GATE_UPDATE_NORM] = s_.signals_.update_norm;
    g.optimizer_steps = int64_t(s_.optimizer_steps_);
    g.power1 = std::pow(s_.options_.number("inner.beta1"), double(s_.optimizer_steps_));
    g.power2 = std::pow(s_.options_.number("inner.beta2"), double(s_.optimizer_steps_));
    return g;
}

void Session::Ahead::state_to_stream() {
    if (!s_.inside_) // a layer's own steps are none of the optimizer's
        s_.optimizer_steps_ = uint64_t(gate_.optimizer_steps);
    if (scheduled_)
        return;
    s_.policy_->from_device(gate_);
    if (!s_.budget_.off())
        s_.budget_.set_left(gate_.budget_left);
}

} // namespace ponder
