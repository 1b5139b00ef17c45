// What a session is made of and how a stream goes through it, chunk by chunk.
#include "session/ahead.hpp"
#include "session/decoder.hpp"

#include "adapt/stored.hpp"
#include "base/error.hpp"

#include <algorithm>

namespace ponder {

Session::Session(std::shared_ptr<const Model> model, const Options &options)
    : Session(model, with_stored_options(options), nullptr, nullptr) {}

Session::Session(std::shared_ptr<const Model> model, const Options &options,
                 std::shared_ptr<const Adapted> adapted, std::shared_ptr<const Gate> gate)
    : model_(std::move(model)), options_(options), adapted_(std::move(adapted)),
      gate_(std::move(gate)),
      budget_(options_.number("budget.rate"), options_.number("budget.burst")) {
    const Gpt2Config &config = model_->backbone().config();
    const std::string &policy = options_.text("policy");
    if (!adapted_)
        adapted_ = model_->adapted(effective_options(options_, never_learns(policy)));
    const Adapter &adapter = adapted_->adapter();
    if (policy == "adapter" && !gate_)
        gate_ = adapter.gate();
    policy_ = new_policy();
    const Window window = window_of(options_, config);
    chunk_ = window.chunk;
    context_ = window.context;
    steps_ = options_.integer("steps");
    guard_norm_ = options_.number("guard.norm");
    carry_ = options_.boolean("ttt.carry");
    loss_after_ = options_.boolean("record.loss_after");
    analysis_ = options_.boolean("analysis");
    ring_ = size_t(options_.integer("record.ring"));

    inside_ = adapter.learns_inside();
    if (!inside_ && policy_->reads() == Signal::reconstruction)
        throw_error(PONDER_E_ARGUMENT, "policy '%s': only TTT layers have a reconstruction loss",
                    options_.text("policy").c_str());
    if (inside_ && policy_->reads() == Signal::gradient_norm)
        throw_error(PONDER_E_ARGUMENT, "policy '%s': TTT layers take no gradient of the loss",
                    options_.text("policy").c_str());
    if (inside_ && policy_->looks_ahead())
        throw_error(PONDER_E_ARGUMENT, "policy '%s': TTT layers learn before an oracle can look",
                    options_.text("policy").c_str());

    const std::shared_ptr<const Device> &device = model_->device();
    if (const size_t count = adapter.fast_count()) {
        initial_.resize(count);
        Random random(uint64_t(options_.integer("seed")));
        adapter.initial(initial_, random);
        LearnedRates<float> learned;
        if (!adapter.rates().log_rate.empty()) {
            std::vector<float> rate(count), keep(count);
            adapter.expand_rates(options_.number("inner.lr"), rate, keep);
            const size_t next = padded(int64_t(count));
            learned_ = DeviceVector<float>(device, 3 * next);
            learned_.write(rate.data(), count);
            learned_.write(keep.data(), count, next);
            learned_.write(initial_.data(), count, 2 * next);
            learned = {learned_.data(), learned_.data() + next, learned_.data() + 2 * next};
        }
        rule_ = std::make_unique<UpdateRule>(options_, count, device, learned);
        const size_t moments = inside_ ? 0 : rule_->moments();
        current_ = FastState(device, count, moments);
        shadow_ = FastState(device, count, moments);
        gradient_ = DeviceVector<float>(device, count); // inside the pass: scratch alone
    }
    ids_.resize(padded(context_) + size_t(chunk_));
    inputs_ = DeviceVector<int32_t>(device, ids_.size());
    results_.resize(2 * padded(chunk_) + 3);
    outputs_ = DeviceVector<float>(device, results_.size());
    nll_.resize(size_t(chunk_));
    entropy_.resize(size_t(chunk_));
    later_nll_.resize(size_t(chunk_));
    // Every pass of full chunks is recorded now, so that later calls allocate nothing.
    for (int64_t before = 0; before + chunk_ <= context_; before += chunk_)
        for (int inside = 0; inside <= int(inside_); ++inside)
            reserve(*adapted_->pass(shape(before + chunk_, chunk_, inside != 0), true));
    reset();
    ahead_ = Ahead::make(*this);
}

Session::~Session() { leave_group(); }

// `policy`, or the gate that has taken its place.
std::unique_ptr<Policy> Session::new_policy() const {
    if (gate_)
        return make_gate_policy(gate_, options_.number("policy.target_rate"));
    if (options_.text("policy") == "adapter")
        throw_error(PONDER_E_STATE, "policy 'adapter': the adapter '%.200s' has no gate",
                    options_.text("adapter").c_str());
    return parse_policy(options_.text("policy"));
}

void Session::use_gate(std::shared_ptr<const Gate> gate) {
    auto policy = make_gate_policy(gate, 0);
    gate_ = std::move(gate);
    policy_ = std::move(policy);
    ahead_.reset();
    open_pass_.reset(); // an open chunk runs again, watched
    tape_ = gradient_ready_ = false;
    forget_text();
}

std::unique_ptr<Session> Session::fork() const {
    std::unique_ptr<Session> copy(new Session(model_, options_, adapted_, gate_));
    if (alone_)
        copy->run_alone();
    copy->load(save(), "fork");
    return copy;
}

void Session::reset() {
    if (!initial_.empty())
        for (const FastState *state : {&current_, &shadow_}) {
            state->all().clear();
            state->all().write(initial_.data(), initial_.size());
        }
    history_.clear();
    waiting_.clear();
    policy_ = new_policy();
    random_ = Random(uint64_t(options_.integer("seed")) ^ 0x506f6c696379u);
    budget_ = Budget(options_.number("budget.rate"), options_.number("budget.burst"));
    signals_ = {};
    expected_ = chunks_ = fed_ = scored_tokens_ = updated_ = steps_taken_ = optimizer_steps_ = 0;
    records_.clear();
    open_ = tape_ = gradient_ready_ = ran_inside_ = false;
    open_tokens_ = 0;
    scale_ = 1;
    open_ids_.clear();
    open_pass_.reset();
    forget_text();
}

void Session::expect(uint64_t chunks) {
    if (chunks > uint64_t(1) << 53)
        throw_error(PONDER_E_ARGUMENT, "a stream of %llu chunks: at most 2^53",
                    static_cast<unsigned long long>(chunks));
    expected_ = chunks;
}

void Session::require_length() const {
    if (policy_->needs_length() && expected_ == 0)
        throw_error(PONDER_E_STATE,
                    "policy '%s' needs the stream's length in chunks (ponder_session_expect)",
                    options_.text("policy").c_str());
}

void Session::forget_text() {
    ++weights_version_;
    leave_group();
    text_.clear();
}

void Session::leave_group() {
    if (!decoder_)
        return;
    decoder_->leave(decoder_slot_);
    decoder_->shrink();
    decoder_.reset();
}

void Session::feed(std::span<const int32_t> ids) {
    const int64_t vocabulary = model_->backbone().config().vocabulary;
    for (size_t i = 0; i < ids.size(); ++i)
        if (ids[i] < 0 || ids[i] >= vocabulary)
            throw_error(PONDER_E_ARGUMENT, "ids[%zu] = %d is not in 0..%d", i, ids[i],
                        int(vocabulary - 1));
    if (ids.size() > most_waiting - waiting_.size())
        throw_error(PONDER_E_BUFFER, "%zu tokens wait already and at most %zu can", waiting_.size(),
                    most_waiting);
    waiting_.insert(waiting_.end(), ids.begin(), ids.end());
    fed_ += ids.size();
}

void Session::adapt(const CallGuard &guard) {
    const uint64_t total = waiting_.size();
    if (open_)
        learn(-1, guard);
    while (int64_t(waiting_.size()) >= chunk_) {
        if (ahead_ && ahead_->run(guard, total)) {
            guard.check();
            continue;
        }
        score(guard);
        learn(-1, guard);
        guard.progress(total - waiting_.size(), total);
        guard.check();
    }
}

void Session::flush(const CallGuard &guard) {
    adapt(guard);
    if (waiting_.size() < 2)
        return;
    score_chunk(int64_t(waiting_.size()), guard);
    learn(-1, guard);
}

std::span<const float> Session::losses() const {
    if (open_tokens_ == 0)
        throw_error(PONDER_E_STATE, "no chunk has been scored");
    return {nll_.data(), size_t(open_tokens_) - 1};
}

ponder_session_info Session::info() const {
    ponder_session_info info{};
    info.chunk_tokens = uint32_t(chunk_);
    info.tokens_fed = fed_;
    info.chunks_scored = chunks_;
    info.chunks_updated = updated_;
    info.steps = steps_taken_;
    info.tokens_waiting = waiting_.size();
    info.scored_open = open_;
    info.has_fast_weights = adapted_->adapter().fast_count() > 0;
    info.records = records_.size();
    info.budget_left = budget_.left();
    return info;
}

} // namespace ponder
