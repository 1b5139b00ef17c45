// A chunk's work on a device, recorded: score, decision, and where the decision says so the steps
// and the taking of the update.
#pragma once

#include "session/session.hpp"

#include <map>

namespace ponder {

class Session::ChunkWork {
public:
    static constexpr int32_t by_rule = -1;
    struct Kind {
        std::shared_ptr<const Pass> pass;
        // Of a layer that learns inside, where the rule decides: the pass without it, else null.
        std::shared_ptr<const Pass> skipped;
        int32_t told = by_rule; // steps, told by the host
    };

    // scheduled: every kind of work is told its steps.
    ChunkWork(Session &session, bool scheduled);
    ~ChunkWork();

    // Plans what work that is told so many steps needs besides its passes.
    void plan(int32_t told);
    size_t workspace_bytes() const; // of what is planned
    // Whether work of this kind is expected to be queued: it is recorded when it comes for the
    // second time.
    bool expects(const Kind &kind) { return !impossible_ && recorded(kind).seen++ > 0; }
    // Queues the work on the inputs that were uploaded. False: nothing is queued, as it cannot be
    // recorded.
    bool queue(const Kind &kind);
    // What goes up before the first chunk and comes back with each.
    void write_state(const ponder_gate &gate) const;
    void send(const Device::Mailbox &mailbox) const { mailbox.send(memory_.data(), sent_bytes()); }
    size_t sent_bytes() const { return at_.sent * sizeof(float); }

    // Where things lie in what is sent, in numbers of 4 bytes.
    struct Layout {
        size_t losses, entropies, reconstruction, state;
        size_t later; // losses before the last step
        size_t sent;  // the end of what is
        size_t later_entropies, norms, flags, h,
            total; // norms: of each step's gradient; the distance
    };
    const Layout &layout() const { return at_; }

private:
    struct GateProgram {
        GateCall ids;
        std::unique_ptr<const Program> program;
    };
    struct CommitProgram {
        CommitCall ids;
        std::unique_ptr<const Program> program;
    };
    // Addresses change with them: a session has two sets of fast weights.
    struct Recorded {
        Kind kind;
        const float *weights;
        const std::byte *arena, *workspace;
        uint32_t seen = 0;
        void *work = nullptr;
    };

    GateProgram make_gate(int64_t told, int64_t steps, bool reads_losses) const;
    CommitProgram make_commit() const;
    Recorded &recorded(const Kind &kind);
    void forget();
    void rehearse(const Device::Queue &queue, const Kind &kind) const;
    bool record(const Device::Queue &queue, const Kind &kind) const;
    void between(const Device::Queue &queue, const Kind &kind) const;
    void inside(const Device::Queue &queue, const Kind &kind) const;
    void when(const Device::Queue &queue, const Kind &kind, size_t flag,
              const std::function<void()> &work) const;
    void score(const Device::Queue &queue, const Pass &pass, const FastState &weights,
               size_t losses, size_t entropies) const;
    void gate(const Device::Queue &queue, const GateProgram &program) const;
    void commit(const Device::Queue &queue) const;
    template <class T = float> T *at(size_t place) const {
        return reinterpret_cast<T *>(memory_.data() + place);
    }

    Session &s_;
    const std::shared_ptr<const Device> device_;
    const int64_t steps_; // at most
    Layout at_{};
    DeviceVector<float> memory_;
    GateProgram decides_, observes_;
    std::map<int32_t, GateProgram> told_; // by steps
    CommitProgram commit_;
    std::vector<Recorded> recorded_;
    bool impossible_ = false; // as it turned out
};

} // namespace ponder
