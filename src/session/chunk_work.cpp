#include "session/chunk_work.hpp"

#include <cstring>

namespace ponder {

namespace {

constexpr size_t gate_words = sizeof(ponder_gate) / sizeof(int32_t);

std::unique_ptr<const Program> program_of(Graph g, const std::shared_ptr<const Device> &device) {
    const size_t end = g.calls().size();
    return std::make_unique<const Program>(std::move(g), std::vector{end}, device);
}

struct NoCondition {}; // the device cannot make work depend on a flag

} // namespace

Session::ChunkWork::ChunkWork(Session &session, bool scheduled)
    : s_(session), device_(session.model_->device()), steps_(session.inside_ ? 1 : session.steps_) {
    size_t end = 0;
    const auto part = [&](size_t count) {
        const size_t at = end;
        end += padded(int64_t(count));
        return at;
    };
    const size_t chunk = size_t(s_.chunk_);
    at_.losses = part(chunk);
    at_.entropies = part(chunk);
    at_.reconstruction = part(3);
    at_.state = part(gate_words);
    at_.later = part(steps_ > 1 ? chunk : 0);
    at_.sent = end;
    at_.later_entropies = part(steps_ > 1 ? chunk : 0);
    at_.norms = part(size_t(steps_) + 1);
    at_.flags = part(size_t(steps_) + 1);
    at_.h = part(size_t(steps_) * 8);
    at_.total = end;
    memory_ = DeviceVector<float>(device_, at_.total);
    if (s_.adapted_->adapter().fast_count() == 0)
        return;
    commit_ = make_commit();
    if (scheduled)
        return;
    decides_ = make_gate(by_rule, steps_, !s_.inside_);
    if (s_.inside_)
        observes_ = make_gate(0, 0, true);
}

void Session::ChunkWork::plan(int32_t told) {
    if (told > 0 && !s_.inside_ && !told_.contains(told))
        told_.emplace(told, make_gate(told, told, false));
}

Session::ChunkWork::~ChunkWork() { forget(); }

void Session::ChunkWork::forget() {
    const std::vector<Recorded> gone = std::exchange(recorded_, {}); // passes want the queue to go
    const Device::Queue queue(*device_);
    for (const Recorded &r : gone)
        if (r.work)
            queue.drop(r.work);
}

// told and what is decided as in the op; steps: flags and hyperparameters are wanted for so many.
Session::ChunkWork::GateProgram Session::ChunkWork::make_gate(int64_t told, int64_t steps,
                                                              bool reads_losses) const {
    Graph g(DType::f32);
    GateProgram p;
    GateCall &c = p.ids;
    if (reads_losses) {
        c.nll = g.external("losses", g.wide, {1, s_.chunk_});
        c.entropy = g.external("entropies", g.wide, {1, s_.chunk_});
        if (s_.inside_)
            c.reconstruction = g.external("reconstruction losses", g.wide, {1, 3});
    }
    c.state = g.external("state", DType::i32, {int64_t(gate_words)});
    c.state2 = g.external("new state", DType::i32, {int64_t(gate_words)});
    if (steps > 0) {
        c.flags = g.external("flags", DType::i32, {steps + 1});
        if (!s_.inside_)
            c.h = g.external("hyperparameters", g.wide, {steps, 8});
    }
    c.predictions = s_.chunk_ - 1;
    c.told = told;
    s_.rule_->hyperparameters(c);
    ponder::gate(g, c);
    p.program = program_of(std::move(g), device_);
    return p;
}

Session::ChunkWork::CommitProgram Session::ChunkWork::make_commit() const {
    Graph g(DType::f32);
    CommitProgram p;
    CommitCall &c = p.ids;
    const Shape all{int64_t(s_.current_.all().size())};
    if (!s_.inside_)
        c.gradient_norms = g.external("gradient norms", g.wide, {steps_});
    c.distance = g.external("distance", g.wide, {1});
    if (!s_.inside_ || s_.carry_) {
        c.fresh = g.external("new weights", g.wide, all);
        c.w = g.external("weights", g.wide, all);
    }
    c.state = g.external("state", DType::i32, {int64_t(gate_words)});
    c.state2 = g.external("new state", DType::i32, {int64_t(gate_words)});
    GateCall rates;
    s_.rule_->hyperparameters(rates);
    c.beta1 = rates.beta1;
    c.beta2 = rates.beta2;
    ponder::commit(g, c);
    p.program = program_of(std::move(g), device_);
    return p;
}

void Session::ChunkWork::write_state(const ponder_gate &gate) const {
    device_->upload(at(at_.state), &gate, sizeof gate);
}

size_t Session::ChunkWork::workspace_bytes() const {
    size_t most = 0;
    const auto add = [&](const std::unique_ptr<const Program> &program) {
        if (program)
            most = std::max(most, program->workspace_bytes());
    };
    add(decides_.program);
    add(observes_.program);
    add(commit_.program);
    for (const auto &told : told_)
        add(told.second.program);
    return most;
}

Session::ChunkWork::Recorded &Session::ChunkWork::recorded(const Kind &kind) {
    for (Recorded &r : recorded_)
        if (r.kind.pass == kind.pass && r.kind.skipped == kind.skipped &&
            r.kind.told == kind.told && r.weights == s_.current_.weights() &&
            r.arena == s_.arena_.data() && r.workspace == s_.workspace_.data())
            return r;
    constexpr size_t most = 64;
    if (recorded_.size() == most)
        forget();
    return recorded_.emplace_back(
        Recorded{kind, s_.current_.weights(), s_.arena_.data(), s_.workspace_.data()});
}

bool Session::ChunkWork::queue(const Kind &kind) {
    Recorded &r = recorded(kind);
    const Device::Queue queue(*device_);
    if (!r.work) {
        rehearse(queue, kind);
        impossible_ = !queue.can_record() || !queue.record();
        if (impossible_)
            return false;
        const bool whole = record(queue, kind);
        r.work = queue.record_end();
        if (r.work && !whole)
            queue.drop(std::exchange(r.work, nullptr));
        impossible_ = !r.work;
        if (impossible_)
            return false;
    }
    queue.replay(r.work);
    return true;
}

// False where the device has no conditions.
bool Session::ChunkWork::record(const Device::Queue &queue, const Kind &kind) const {
    try {
        s_.inside_ ? inside(queue, kind) : between(queue, kind);
        return true;
    } catch (const NoCondition &) {
        return false;
    } catch (...) {
        if (void *const work = queue.record_end())
            queue.drop(work);
        throw;
    }
}

// Kernels may make things at their first run that a recording has no room for. What the passes
// write here is written again.
void Session::ChunkWork::rehearse(const Device::Queue &queue, const Kind &kind) const {
    for (const auto &pass : {kind.skipped, kind.pass})
        if (pass)
            score(queue, *pass, s_.current_, at_.losses, at_.entropies);
    if (!s_.inside_ && kind.told != 0)
        kind.pass->program->enqueue(learn_segment, s_.bindings(*kind.pass, s_.current_),
                                    s_.arena_.data(), s_.workspace_.data(), queue);
}

// What is done where flag `flag` is set; told, it is.
void Session::ChunkWork::when(const Device::Queue &queue, const Kind &kind, size_t flag,
                              const std::function<void()> &work) const {
    const bool asks = kind.told == by_rule;
    if (asks && !queue.record_if(at<const int32_t>(at_.flags + flag)))
        throw NoCondition();
    work();
    if (asks && !queue.record_end_if())
        throw NoCondition();
}

// Steps after the score, on its own gradient and those of the weights after each.
void Session::ChunkWork::between(const Device::Queue &queue, const Kind &kind) const {
    const Pass &pass = *kind.pass;
    std::byte *const arena = s_.arena_.data(), *const workspace = s_.workspace_.data();
    score(queue, pass, s_.current_, at_.losses, at_.entropies);
    if (kind.told == 0)
        return;
    gate(queue, kind.told == by_rule ? decides_ : told_.at(kind.told));
    const int64_t most = kind.told == by_rule ? steps_ : kind.told;
    const auto step = [&](int64_t k) {
        const FastState &old = k == 0 ? s_.current_ : s_.shadow_;
        if (k > 0)
            score(queue, pass, old, at_.later, at_.later_entropies);
        pass.program->enqueue(learn_segment, s_.bindings(pass, old), arena, workspace, queue);
        s_.rule_->enqueue_step(old.view(), s_.shadow_.view(), s_.gradient_.data(),
                               at(at_.h + size_t(8 * k)), at(at_.norms + size_t(k)), workspace,
                               queue);
    };
    when(queue, kind, 0, [&] {
        step(0);
        for (int64_t k = 1; k < most; ++k)
            when(queue, kind, size_t(k), [&] { step(k); });
        commit(queue);
    });
}

// The layer takes its own steps in the pass, so it is decided on before.
void Session::ChunkWork::inside(const Device::Queue &queue, const Kind &kind) const {
    if (kind.told == 0)
        return score(queue, *kind.pass, s_.current_, at_.losses, at_.entropies);
    if (kind.told == by_rule)
        gate(queue, decides_);
    when(queue, kind, 0, [&] {
        score(queue, *kind.pass, s_.current_, at_.losses, at_.entropies);
        commit(queue);
    });
    if (kind.told != by_rule)
        return;
    when(queue, kind, size_t(steps_),
         [&] { score(queue, *kind.skipped, s_.current_, at_.losses, at_.entropies); });
    gate(queue, observes_);
}

void Session::ChunkWork::score(const Device::Queue &queue, const Pass &pass,
                               const FastState &weights, size_t losses, size_t entropies) const {
    Program::Bindings to = s_.bindings(pass, weights);
    to[size_t(pass.recording.nll)] = at(losses);
    to[size_t(pass.recording.entropy)] = at(entropies);
    if (pass.recording.reconstruction != none)
        to[size_t(pass.recording.reconstruction)] = at(at_.reconstruction);
    pass.program->enqueue(score_segment, to, s_.arena_.data(), s_.workspace_.data(), queue);
}

void Session::ChunkWork::gate(const Device::Queue &queue, const GateProgram &g) const {
    Program::Bindings to(g.program->graph().values().size());
    const auto bind = [&](Id id, size_t place) {
        if (id != none)
            to[size_t(id)] = at(place);
    };
    bind(g.ids.nll, at_.losses);
    bind(g.ids.entropy, at_.entropies);
    bind(g.ids.reconstruction, at_.reconstruction);
    bind(g.ids.state, at_.state);
    bind(g.ids.state2, at_.state);
    bind(g.ids.flags, at_.flags);
    bind(g.ids.h, at_.h);
    g.program->enqueue(0, to, nullptr, s_.workspace_.data(), queue);
}

// The update is the stream's where it is finite and near enough.
void Session::ChunkWork::commit(const Device::Queue &queue) const {
    const size_t distance = at_.norms + size_t(steps_);
    s_.rule_->enqueue_distance(s_.shadow_.weights(), s_.current_.weights(), at(distance),
                               s_.workspace_.data(), queue);
    const CommitCall &c = commit_.ids;
    Program::Bindings to(commit_.program->graph().values().size());
    const auto bind = [&](Id id, void *address) {
        if (id != none)
            to[size_t(id)] = address;
    };
    bind(c.gradient_norms, at(at_.norms));
    bind(c.distance, at(distance));
    bind(c.fresh, s_.shadow_.all().data());
    bind(c.w, s_.current_.all().data());
    bind(c.state, at(at_.state));
    bind(c.state2, at(at_.state));
    commit_.program->enqueue(0, to, nullptr, s_.workspace_.data(), queue);
}

} // namespace ponder
