#include "session/session.hpp"

#include "adapt/stored.hpp"
#include "base/error.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace ponder {

uint64_t now_ns() {
    return uint64_t(
        std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

CallGuard::CallGuard(std::atomic<bool> &cancel, const ponder_call *call)
    : cancel_(cancel), call_(call),
      deadline_ns_(call && call->timeout_ns ? now_ns() + call->timeout_ns : 0) {
    cancel_.store(false, std::memory_order_relaxed);
}

void CallGuard::check() const {
    if (cancel_.load(std::memory_order_relaxed))
        throw_error(PONDER_E_CANCELLED, "cancelled");
    if (deadline_ns_ && now_ns() > deadline_ns_)
        throw_error(PONDER_E_DEADLINE, "deadline passed after %llu ns",
                    static_cast<unsigned long long>(call_->timeout_ns));
}

void CallGuard::progress(uint64_t done, uint64_t total) const {
    if (call_ && call_->progress && std::this_thread::get_id() == caller_ &&
        call_->progress(call_->user_data, done, total))
        throw_error(PONDER_E_CANCELLED, "cancelled by the progress callback");
}

namespace {

// Elements until the next part of a buffer starts, so that each is aligned.
size_t padded(int64_t count) { return (size_t(count) + 15) / 16 * 16; }

} // namespace

FastState::FastState(std::shared_ptr<const Device> device, size_t count, size_t moments)
    : block_(std::move(device), count * (1 + moments)), count_(count), moments_(moments) {}

UpdateRule::State FastState::view() const {
    return {weights(), moments_ > 0 ? weights() + count_ : nullptr,
            moments_ > 1 ? weights() + 2 * count_ : nullptr};
}

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
    chunk_ = options_.integer("chunk");
    context_ = options_.integer("context");
    if (context_ == 0)
        context_ = std::max(config.context, chunk_);
    if (chunk_ > config.context || context_ > config.context)
        throw_error(PONDER_E_ARGUMENT,
                    "options 'chunk' %d and 'context' %d: the backbone has %d "
                    "positions",
                    int(chunk_), int(context_), int(config.context));
    context_ = std::max(context_, chunk_);
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
}

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
    open_pass_.reset(); // an open chunk runs again, watched
    tape_ = gradient_ready_ = false;
    forget_text();
}

PassShape Session::shape(int64_t tokens, int64_t scored, bool inside) const {
    return {tokens, scored, records_gradients(), inside, policy_->observes()};
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

void Session::forget_text() {
    ++weights_version_;
    decoder_.reset();
    text_.clear();
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

// Whole earlier chunks that fit before `scored` tokens.
int64_t Session::context_tokens(int64_t scored) const {
    const int64_t chunks =
        std::min((context_ - scored) / chunk_, int64_t(history_.size()) / chunk_);
    return chunks * chunk_;
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
    size_t each = pass.program->workspace_bytes();
    if (rule_)
        each = std::max(each, rule_->workspace_bytes());
    fit(workspace_, each * (alone_ ? 1 : device->workers()));
}

Program::Bindings Session::bindings(const FastState &weights) {
    const Recording &r = open_pass_->recording;
    Program::Bindings at(open_pass_->program->graph().values().size());
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
    run_segment(score_segment, bindings(weights), guard);
    outputs_.read(results_.data(), results_.size());
    const float *const losses = results_.data(), *const entropies = losses + padded(chunk_);
    std::copy_n(losses, open_tokens_, nll.begin());
    std::copy_n(entropies, open_tokens_, entropy_.begin());
    std::copy_n(losses + 2 * padded(chunk_), 3, reconstruction_);
}

void Session::run_backward(const FastState &weights, const CallGuard &guard) {
    run_segment(learn_segment, bindings(weights), guard);
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

bool Session::score(const CallGuard &guard) {
    if (open_)
        throw_error(PONDER_E_STATE, "the last scored chunk has not been learned");
    if (int64_t(waiting_.size()) < chunk_)
        return false;
    score_chunk(chunk_, guard);
    return true;
}

void Session::score_chunk(int64_t tokens, const CallGuard &guard) {
    const uint64_t start = now_ns();
    const size_t context = size_t(context_tokens(tokens));
    open_ids_.assign(history_.end() - std::ptrdiff_t(context), history_.end());
    open_ids_.insert(open_ids_.end(), waiting_.begin(), waiting_.begin() + tokens);
    open_tokens_ = tokens;

    ponder_record record{};
    const double unknown = std::numeric_limits<double>::quiet_NaN();
    record.struct_size = sizeof record;
    record.flags = PONDER_RECORD_SCORED_ONLY;
    record.chunk = chunks_;
    record.first_token = scored_tokens_;
    record.tokens = uint32_t(tokens);
    record.predictions = uint32_t(tokens - 1);
    record.loss_after = record.reconstruction = record.gradient_norm = record.update_norm =
        record.gate_score = record.gate_threshold = unknown;

    ran_inside_ = tape_ = false;
    Undo undo(*this);
    if (inside_ && !analysis_) {
        // The layer changes this chunk's own scores: decide on earlier chunks only.
        const uint64_t before = now_ns();
        record.steps_wanted = decide(-1, record);
        record.decide_ns = now_ns() - before;
        ran_inside_ = record.steps > 0;
    } else if (inside_) {
        ran_inside_ = true; // look first, decide then
        record.flags |= PONDER_RECORD_NOT_CAUSAL;
    }
    ensure_tape(guard);
    record.flops = open_pass_->program->flops(score_segment);
    if (policy_->observes()) {
        const uint64_t before = now_ns();
        observe();
        record.decide_ns += now_ns() - before;
    }
    if (inside_ && analysis_) {
        signals_.loss = mean(nll_);
        signals_.entropy = mean(entropy_);
        signals_.reconstruction = reconstruction_[1];
        record.steps_wanted = decide(-1, record);
        if (record.steps == 0) {
            ran_inside_ = tape_ = false;
            ensure_tape(guard);
            record.flops += open_pass_->program->flops(score_segment);
        }
    }
    record.loss_before = mean(nll_);
    record.entropy = mean(entropy_);
    if (ran_inside_)
        record.reconstruction = reconstruction_[1];
    record.bytes = arena_.size() + workspace_.size();
    signals_.loss = record.loss_before;
    signals_.entropy = record.entropy;
    if (ran_inside_)
        signals_.reconstruction = record.reconstruction;

    // Only now is the chunk taken from the stream: a cancelled pass leaves everything as it was.
    undo.disarm();
    history_.insert(history_.end(), waiting_.begin(), waiting_.begin() + tokens);
    waiting_.erase(waiting_.begin(), waiting_.begin() + tokens);
    const size_t keep = size_t(context_);
    if (history_.size() > 2 * keep)
        history_.erase(history_.begin(), history_.end() - std::ptrdiff_t(keep));
    scored_tokens_ += uint64_t(tokens);
    chunks_ += 1;
    open_ = true;
    record.score_ns = now_ns() - start - record.decide_ns;
    records_.push_back(record);
    if (records_.size() > ring_)
        records_.pop_front();
}

// The open chunk's forward pass with its activations; again after a restore.
void Session::ensure_tape(const CallGuard &guard) {
    if (tape_)
        return;
    const int64_t total = int64_t(open_ids_.size());
    open_pass_ = adapted_->pass(shape(total, open_tokens_, ran_inside_), open_tokens_ == chunk_);
    reserve(*open_pass_);
    std::copy(open_ids_.begin(), open_ids_.end(), ids_.begin());
    const auto scored = open_ids_.end() - open_tokens_;
    int32_t *const targets = ids_.data() + padded(context_);
    std::copy(scored + 1, open_ids_.end(), targets);
    targets[open_tokens_ - 1] = -1;
    inputs_.write(ids_.data(), ids_.size());
    run_score(current_, nll_, guard);
    tape_ = true;
    gradient_ready_ = false;
}

// Shows the policy the open chunk; its pass has just run.
void Session::observe() {
    const Recording &r = open_pass_->recording;
    const Gpt2Config &config = model_->backbone().config();
    const Graph &graph = open_pass_->program->graph();
    const Device &device = *model_->device();
    const auto view = [&](size_t i) -> MatrixView {
        const Id id = r.watched()[i];
        if (id == none)
            return {};
        const Shape &shape = graph.shape(id);
        const size_t columns = size_t(shape[shape.rank - 1]);
        const std::byte *data = watched_[i].data();
        if (!device.on_host()) {
            device.download(seen_[i].data(), data, graph.value(id).bytes());
            data = seen_[i].data();
        }
        return {data, graph.value(id).type, size_t(shape.count()) / columns, columns};
    };
    Observation o;
    const size_t predictions = size_t(open_tokens_) - 1;
    o.nll = {nll_.data(), predictions};
    o.entropy = {entropy_.data(), predictions};
    o.ids = std::span(open_ids_).last(size_t(open_tokens_));
    o.vocabulary = config.vocabulary;
    o.hidden = view(0);
    o.qkv = view(1);
    o.heads = config.heads;
    o.probabilities = view(2);
    policy_->observe(o);
}

std::vector<double> Session::features() const {
    return policy_->features({chunks_ - open_, expected_, signals_, budget_.left()});
}

// The policy's wish, then what the budget grants: record.steps.
int32_t Session::decide(int32_t forced, ponder_record &record) {
    Decision decision;
    if (forced < 0) {
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
    budget_.next_chunk();
    const int64_t granted = adapted_->adapter().fast_count() == 0 ? 0 : budget_.grant(wanted);
    if (granted < wanted && !budget_.off())
        record.flags |= PONDER_RECORD_OVER_BUDGET;
    budget_.spend(granted);
    record.steps = int32_t(granted);
    return int32_t(wanted);
}

bool Session::accept(double update_norm) const {
    return std::isfinite(update_norm) && update_norm <= guard_norm_;
}

void Session::learn(int32_t forced, const CallGuard &guard) {
    if (!open_)
        return;
    ponder_record record = records_.back();
    if (inside_) {
        learn_inside(record);
    } else {
        if (forced > 0 && policy_->never())
            throw_error(PONDER_E_STATE,
                        "steps = %d under policy skip; a host that decides itself "
                        "uses policy always",
                        forced);
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
        const CallGuard unlimited(cancel_, nullptr);
        ensure_tape(unlimited); // after a restore
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
    record.update_rate = double(updated_) / double(chunks_);
    policy_->learned(record);
    records_.back() = record;
    open_ = false;
    open_pass_.reset();
}

void Session::adapt(const CallGuard &guard) {
    const uint64_t total = waiting_.size();
    if (open_)
        learn(-1, guard);
    while (score(guard)) {
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
    if (chunks_ == 0)
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

std::vector<CallTime> Session::profile(Segment segment, uint32_t repeat) {
    if (open_ids_.empty())
        throw_error(PONDER_E_STATE, "no chunk has been scored");
    std::atomic<bool> never{false};
    const CallGuard unlimited(never, nullptr);
    std::vector<CallTime> times;
    const std::vector<float> nll = nll_, entropy = entropy_;
    for (uint32_t i = 0; i < repeat; ++i) {
        tape_ = false;
        ensure_tape(unlimited);
        if (segment == learn_segment && open_pass_->recording.gradient.empty())
            break;
        open_pass_->program->profile(segment, bindings(current_), arena_.data(), workspace_.data(),
                                     times);
    }
    // The chunk's losses stay those of its own scoring.
    nll_ = nll;
    entropy_ = entropy;
    tape_ = false;
    return times;
}

} // namespace ponder
