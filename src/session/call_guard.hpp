// Bounds of one call: throws when cancelled or late. Made at the start of every long call.
#pragma once

#include "ponder/ponder.h"

#include <atomic>
#include <cstdint>
#include <thread>

namespace ponder {

uint64_t now_ns();

class CallGuard {
public:
    CallGuard(std::atomic<bool> &cancel, const ponder_call *call);
    void check() const; // PONDER_E_CANCELLED, PONDER_E_DEADLINE
    // May cancel. Does nothing on other threads than the one that made the call.
    void progress(uint64_t done, uint64_t total) const;
    // The last report: everything is done, and an answer that cancels comes too late.
    void finished(uint64_t total) const;

private:
    bool stops(uint64_t done, uint64_t total) const; // by the callback's answer
    std::atomic<bool> &cancel_;
    const ponder_call *call_;
    uint64_t deadline_ns_ = 0;
    std::thread::id caller_ = std::this_thread::get_id();
};

} // namespace ponder
