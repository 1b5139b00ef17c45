// The open chunk's pass: its buffers, where its inputs and outputs lie, and running it.
#include "base/error.hpp"
#include "session/ahead.hpp"
#include "session/undo.hpp"

#include <algorithm>

namespace ponder {

PassShape Session::shape(int64_t tokens, int64_t scored, bool inside) const {
    return {tokens, scored, records_gradients(), inside, policy_->observes()};
}

// A policy that never learns needs no backward pass.
bool Session::records_gradients() const {
    return !inside_ && !policy_->never() && adapted_->adapter().fast_count() > 0;
}

void Session::reserve(const Pass &pass) {
    const std::shared_ptr<const Device> &device = model_->device();
    const auto fit = [&](DeviceBuffer &buffer, size_t bytes) {
        if (bytes <= buffer.size())
            return;
        buffer = DeviceBuffer(); // the old one first: both together might break the limit
        buffer = DeviceBuffer(device, bytes);
    };
    fit(arena_, pass.program->arena_bytes());
    for (size_t i = 0; i < watched_.size(); ++i)
        if (const Id id = pass.recording.watched()[i]; id != none) {
            const size_t bytes = pass.program->graph().value(id).bytes();
            fit(watched_[i], bytes);
            if (!device->on_host() && seen_[i].size() < bytes)
                seen_[i].resize(bytes);
        }
    if (const Id id = pass.recording.probabilities; id != none && !device->on_host()) {
        const size_t rows = size_t(pass.shape.scored);
        fit(picked_, policy_->probability_rows(rows).size() *
                         (pass.program->graph().value(id).bytes() / rows));
    }
    size_t each = pass.program->workspace_bytes();
    if (rule_)
        each = std::max(each, rule_->workspace_bytes());
    if (ahead_)
        each = std::max(each, ahead_->workspace_bytes());
    fit(workspace_, each * (alone_ ? 1 : device->workers()));
}

Program::Bindings Session::bindings(const Pass &pass, const FastState &weights) {
    const Recording &r = pass.recording;
    Program::Bindings at(pass.program->graph().values().size());
    const auto bind = [&](Id id, void *address) {
        if (id != none)
            at[size_t(id)] = address;
    };
    const std::vector<FastTensor> &fast = adapted_->adapter().fast_tensors();
    for (size_t i = 0; i < fast.size(); ++i) {
        bind(Adapter::fast_id(i), weights.weights() + fast[i].offset);
        if (!r.gradient.empty())
            bind(r.gradient[i], gradient_.data() + fast[i].offset);
        if (!r.new_state.empty())
            bind(r.new_state[i], shadow_.weights() + fast[i].offset);
    }
    bind(r.tokens, inputs_.data());
    bind(r.targets, inputs_.data() + padded(context_));
    bind(r.nll, outputs_.data());
    bind(r.entropy, outputs_.data() + padded(chunk_));
    bind(r.reconstruction, outputs_.data() + 2 * padded(chunk_));
    for (size_t i = 0; i < watched_.size(); ++i)
        bind(r.watched()[i], watched_[i].data());
    return at;
}

void Session::run_score(const FastState &weights, std::vector<float> &nll, const CallGuard &guard) {
    run_segment(score_segment, bindings(*open_pass_, weights), guard);
    outputs_.read(results_.data(), results_.size());
    const float *const losses = results_.data(), *const entropies = losses + padded(chunk_);
    std::copy_n(losses, open_tokens_, nll.begin());
    std::copy_n(entropies, open_tokens_, entropy_.begin());
    std::copy_n(losses + 2 * padded(chunk_), 3, reconstruction_);
}

void Session::run_backward(const FastState &weights, const CallGuard &guard) {
    run_segment(learn_segment, bindings(*open_pass_, weights), guard);
    tape_ = false; // its places have been used again
}

void Session::run_segment(Segment segment, const Program::Bindings &bindings,
                          const CallGuard &guard) {
    const auto run = alone_ ? &Program::run_serial : &Program::run;
    (*open_pass_->program.*run)(segment, bindings, arena_.data(), workspace_.data(),
                                [&] { guard.check(); });
}

double Session::mean(const std::vector<float> &per_token) const {
    double sum = 0;
    for (int64_t t = 0; t + 1 < open_tokens_; ++t)
        sum += per_token[size_t(t)];
    return sum / double(open_tokens_ - 1);
}

void Session::upload_inputs() {
    std::copy(open_ids_.begin(), open_ids_.end(), ids_.begin());
    const auto scored = open_ids_.end() - open_tokens_;
    int32_t *const targets = ids_.data() + padded(context_);
    std::copy(scored + 1, open_ids_.end(), targets);
    targets[open_tokens_ - 1] = -1;
    inputs_.write(ids_.data(), ids_.size());
}

// The open chunk's forward pass with its activations; again after a restore.
void Session::ensure_tape(const CallGuard &guard) {
    if (tape_)
        return;
    const int64_t total = int64_t(open_ids_.size());
    open_pass_ = adapted_->pass(shape(total, open_tokens_, ran_inside_), open_tokens_ == chunk_);
    reserve(*open_pass_);
    upload_inputs();
    run_score(current_, nll_, guard);
    tape_ = true;
    gradient_ready_ = false;
}

std::vector<CallTime> Session::profile(Segment segment, uint32_t repeat, const CallGuard &guard) {
    if (open_ids_.empty())
        throw_error(PONDER_E_STATE, "no chunk has been scored");
    const Undo undo(*this); // the chunk's losses stay those of its own scoring
    std::vector<CallTime> times;
    for (uint32_t i = 0; i < repeat; ++i) {
        guard.check();
        tape_ = false;
        ensure_tape(guard);
        if (segment == learn_segment && open_pass_->recording.gradient.empty())
            break;
        open_pass_->program->profile(segment, bindings(*open_pass_, current_), arena_.data(),
                                     workspace_.data(), times);
    }
    return times;
}

} // namespace ponder
