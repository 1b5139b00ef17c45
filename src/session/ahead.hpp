// Chunks queued ahead on a device with its own memory: nobody waits for what came of one before the
// next ones are queued, so the device decides on it (op gate) and takes its update or leaves it (op
// commit). What came of it arrives later and makes its record. Scores, decisions and updates are
// those of score() and learn().
#pragma once

#include "session/chunk_work.hpp"

namespace ponder {

class Session::Ahead {
public:
    // Null where a chunk needs the host before the next one: learned gates and oracles look at more
    // than a device's gate does, and a gradient's norm is known too late for it.
    static std::unique_ptr<Ahead> make(Session &session);
    Ahead(Session &session, bool scheduled);
    ~Ahead();

    // Runs waiting chunks, as many as can go this way; false if none could. `total`: tokens that
    // the call found waiting.
    bool run(const CallGuard &guard, uint64_t total);
    size_t workspace_bytes() const { return work_.workspace_bytes(); }

private:
    static constexpr size_t most_under_way = 4; // chunks

    struct Sent {
        ponder_record record;
        std::shared_ptr<const Pass> pass, skipped; // as in ChunkWork::Kind
        int32_t told;
    };

    bool queue_next(const CallGuard &guard);
    void collect();
    void settle();
    void lose();
    void fill(ponder_record &record, const Sent &sent);
    ponder_gate state_of_stream() const;
    void state_to_stream();

    Session &s_;
    const bool scheduled_; // the policy needs no signals: the host decides beforehand
    ChunkWork work_;
    std::vector<float> results_;
    std::deque<Sent> sent_;
    std::vector<Device::Mailbox> mailboxes_; // of chunk i: i modulo their number
    uint64_t first_sent_ = 0;
    ponder_gate gate_{};     // as the last chunk left it
    bool on_device_ = false; // the stream's state is there
    uint64_t last_ns_ = 0;
};

} // namespace ponder
